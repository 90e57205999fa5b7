"""HunyuanVideo."""

import diffusers
import families

from pipelines.parts import MASKED, NEGATIVE_MASKED, image, randn
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
