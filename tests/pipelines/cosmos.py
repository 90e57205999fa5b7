"""Cosmos."""

import diffusers

from helpers.families import wan_scheduler, wan_vae
from pipelines.parts import NEGATIVE, TEXT, WIDTH, flow, image
from pipelines.records import Case, assemble, pipeline


class NoSafetyChecker:
    """Lets all texts and videos pass."""

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video

    def to(self, *args, **kwargs):
        return self


_SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "mlp_ratio": 2,
    "text_embed_dim": WIDTH,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "patch_size": (1, 2, 2),
}


def _transformer(in_channels, out_channels, **sizes):
    return diffusers.CosmosTransformer3DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=2,
        concat_padding_mask=True,
        **_SIZES | sizes,
    )


def cosmos1(kind):
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    condition = int("Video" in kind.__name__)
    transformer = _transformer(4 + condition, 4, rope_scale=(2.0, 1.0, 1.0), extra_pos_embed_type="learnable")
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    return assemble(kind, transformer=transformer, vae=vae, scheduler=scheduler, safety_checker=NoSafetyChecker())


def cosmos2(kind):
    condition = int("Video" in kind.__name__)
    transformer = _transformer(16 + condition, 16, rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None)
    return assemble(
        kind,
        transformer=transformer,
        vae=wan_vae(),
        scheduler=flow(use_karras_sigmas=True),
        safety_checker=NoSafetyChecker(),
    )


def predict(kind):
    transformer = _transformer(17, 16, rope_scale=(2.0, 1.0, 1.0), extra_pos_embed_type="learnable")
    return assemble(
        kind, transformer=transformer, vae=wan_vae(), scheduler=wan_scheduler(), safety_checker=NoSafetyChecker()
    )


def transfer(kind):
    features = {"img_context_dim_in": WIDTH, "img_context_dim_out": 32}
    embedding = {"rope_scale": (2.0, 1.0, 1.0), "extra_pos_embed_type": "learnable"}
    controlnet = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2, in_channels=18, latent_channels=18, model_channels=32, **_SIZES, **embedding, **features
    )
    return assemble(
        kind,
        transformer=_transformer(17, 16, controlnet_block_every_n=1, **embedding, **features, img_context_num_tokens=4),
        vae=wan_vae(),
        controlnet=controlnet,
        scheduler=wan_scheduler(),
        safety_checker=NoSafetyChecker(),
    )


_VIDEO = TEXT | {"height": 32, "width": 32}
_OFF = {"guidance_scale": 1.0}
_ON = NEGATIVE | {"guidance_scale": 5.0}
_FRAMES = {"num_frames": 9}


def _add(name, builder, more):
    call = _VIDEO | more
    pipeline(name, builder, plain=Case(call | _OFF, 1), guided=Case(call | _ON, 2))


_add("CosmosTextToWorldPipeline", cosmos1, _FRAMES)
_add("CosmosVideoToWorldPipeline", cosmos1, _FRAMES | {"image": image(32)})
_add("Cosmos2TextToImagePipeline", cosmos2, {})
_add("Cosmos2VideoToWorldPipeline", cosmos2, _FRAMES | {"image": image(32)})
_add("Cosmos2_5_PredictBasePipeline", predict, {"num_frames": 5, "image": image(32)})
_add(
    "Cosmos2_5_TransferPipeline",
    transfer,
    {"num_frames": 5, "num_frames_per_chunk": 5, "controls": [image(32, seed) for seed in range(5)]},
)
