"""LTX-Video."""

import diffusers

from helpers.families import t5, tokenizer
from pipelines.parts import MASKED, NEGATIVE_MASKED, flow, image
from pipelines.records import Case, assemble, pipeline


def video_vae() -> diffusers.AutoencoderKLLTXVideo:
    """Takes a quarter of height, width and time."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )


def ltx(kind):
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    return assemble(kind, scheduler=flow(), vae=video_vae(), transformer=transformer)


def windows(kind):
    pipe = ltx(kind)
    pipe.register_modules(
        scheduler=diffusers.LTXEulerAncestralRFScheduler(), text_encoder=t5(), tokenizer=tokenizer(12)
    )
    return pipe


_VIDEO = MASKED | {"height": 32, "width": 32, "num_frames": 9}
_OFF = {"guidance_scale": 1.0}
_ON = NEGATIVE_MASKED | {"guidance_scale": 3.0}


def _add(name, more=None):
    call = _VIDEO | (more or {})
    pipeline(name, ltx, plain=Case(call | _OFF, 1), guided=Case(call | _ON, 1))


_add("LTXPipeline")
_add("LTXImageToVideoPipeline", {"image": image(32)})
_add("LTXConditionPipeline", {"image": image(32)})
_LONG = {"prompt": "two boats", "height": 32, "width": 32, "num_frames": 9, "cond_image": image(32)}
_GUIDED = {"negative_prompt": "an old clock at night", "guidance_scale": 3.0}
_WINDOWS = {"num_frames": 25, "temporal_tile_size": 16, "temporal_overlap": 8}
pipeline(
    "LTXI2VLongMultiPromptPipeline",
    windows,
    plain=Case(_LONG | _OFF, 1),
    guided=Case(_LONG | _GUIDED, 1),
    windows=Case(_LONG | _GUIDED | _WINDOWS, 1),
)
