"""HunyuanVideo."""

import diffusers
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from helpers import families
from pipelines.parts import MASKED, NEGATIVE_MASKED, flow, image, ones, randn
from pipelines.records import Case, assemble, pipeline

_SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}


def hunyuan_video(kind, **sizes):
    transformer = diffusers.HunyuanVideoTransformer3DModel(**_SIZES | sizes)
    return assemble(kind, **families.hunyuan_video().components | {"transformer": transformer})


def skyreels(kind):
    return hunyuan_video(kind, in_channels=8)


def image_to_video(kind):
    return hunyuan_video(kind, in_channels=9, image_condition_type="latent_concat")


_VIDEO = MASKED | {"pooled_prompt_embeds": randn(1, 16), "height": 32, "width": 32, "num_frames": 5}
_GUIDANCE = NEGATIVE_MASKED | {"negative_pooled_prompt_embeds": randn(1, 16, seed=6), "true_cfg_scale": 3.0}
_IMAGE = {"image": image(32)}


def _add(name, builder, call):
    pipeline(name, builder, plain=Case(call, 1), guided=Case(call | _GUIDANCE, 2))


_add("HunyuanVideoPipeline", hunyuan_video, _VIDEO)
pipeline(
    "HunyuanSkyreelsImageToVideoPipeline",
    skyreels,
    plain=Case(_VIDEO | _IMAGE | {"guidance_scale": 1.0}, 1),
    guided=Case(_VIDEO | _IMAGE | _GUIDANCE, 2),
)
_add("HunyuanVideoImageToVideoPipeline", image_to_video, _VIDEO | _IMAGE)


def framepack(kind):
    """Makes a video in sections, each from the last one's end."""
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **_SIZES | {"attention_head_dim": 10, "rope_axes_dim": (2, 4, 4)},
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    return assemble(
        kind,
        **families.hunyuan_video().components
        | {
            "transformer": transformer,
            "image_encoder": SiglipVisionModel(vision),
            "feature_extractor": SiglipImageProcessor(size={"height": 32, "width": 32}),
        },
    )


_FRAMEPACK = _VIDEO | _IMAGE | {"num_frames": 9, "latent_window_size": 3}
pipeline(
    "HunyuanVideoFramepackPipeline",
    framepack,
    plain=Case(_FRAMEPACK, 1),
    guided=Case(_FRAMEPACK | _GUIDANCE, 2),
    sections=Case(_FRAMEPACK | _GUIDANCE | {"num_frames": 18}, 2),
)


def hunyuan_video15(kind):
    task = "i2v" if "Image" in kind.__name__ else "t2v"
    return assemble(kind, **families.hunyuan_video15(task_type=task).components)


def hunyuan_video15_distilled(kind):
    pipe = hunyuan_video15(kind)
    pipe.guider.disable()
    return pipe


_TWO_TEXTS = {
    "prompt_embeds": randn(1, 7, 16),
    "prompt_embeds_mask": ones(1, 7),
    "prompt_embeds_2": randn(1, 7, 16, seed=8),
    "prompt_embeds_mask_2": ones(1, 7),
}
_TWO_NEGATIVES = {
    "negative_prompt_embeds": randn(1, 7, 16, seed=6),
    "negative_prompt_embeds_mask": ones(1, 7),
    "negative_prompt_embeds_2": randn(1, 7, 16, seed=9),
    "negative_prompt_embeds_mask_2": ones(1, 7),
}
_SIZE = {"height": 16, "width": 16}
pipeline(
    "HunyuanVideo15Pipeline",
    hunyuan_video15,
    guided=Case(_TWO_TEXTS | _TWO_NEGATIVES | _SIZE | {"num_frames": 5}, 2),
)


def hunyuan_image(kind):
    own = families.hunyuan_image()
    return assemble(kind, scheduler=flow(), vae=own.vae, transformer=own.transformer, guider=own.guider)


pipeline("HunyuanImagePipeline", hunyuan_image, guided=Case(_TWO_TEXTS | _TWO_NEGATIVES | _SIZE, 2))
