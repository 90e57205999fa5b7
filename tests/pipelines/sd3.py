"""Stable Diffusion 3."""

import diffusers

from helpers import families
from pipelines.parts import flow, image, mask
from pipelines.records import Case, assemble, pipeline

_SIZES = {
    "sample_size": 8,
    "patch_size": 2,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
}


def sd3(kind, channels=4, **parts):
    components = families.sd3().components | {"vae": families.image_vae(channels), "scheduler": flow(shift=3.0)}
    if channels != 4 or "pag_applied_layers" in parts:  # perturbed attention knows no second attention in a block
        components["transformer"] = diffusers.SD3Transformer2DModel(
            in_channels=channels, out_channels=channels, **_SIZES
        )
    return assemble(kind, **components | parts)


def inpaint(kind):
    """The pipeline knows models with 16 channels only."""
    return sd3(kind, channels=16)


def controlnet(kind):
    return sd3(kind, controlnet=diffusers.SD3ControlNetModel(**_SIZES | {"num_layers": 1, "in_channels": 4}))


def controlnet_inpainting(kind):
    """Its ControlNet sees the mask as one more channel."""
    net = diffusers.SD3ControlNetModel(**_SIZES | {"num_layers": 1, "in_channels": 4}, extra_conditioning_channels=1)
    return sd3(kind, controlnet=net)


def perturbed_attention(kind):
    return sd3(kind, pag_applied_layers=["blocks.0"])


_TEXT = {"prompt": ["two boats"], "height": 16, "width": 16, "max_sequence_length": 12}
_NEGATIVE = {"negative_prompt": ["an old clock at night"], "guidance_scale": 5.0}
_START = {"image": image(16), "strength": 1.0}
_MASK = {"mask_image": mask(16)}
_CONTROL = {"control_image": image(16, seed=1)}


def _add(name, builder, more, **cases):
    call = _TEXT | more
    pipeline(
        name,
        builder,
        plain=Case(call | {"guidance_scale": 1.0}, 1),
        guided=Case(call | _NEGATIVE, 1),
        **{case: Case(call | _NEGATIVE | arguments, calls) for case, (arguments, calls) in cases.items()},
    )


_SKIP = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}

_add("StableDiffusion3Pipeline", sd3, {}, skipped_layer=(_SKIP, None))
_add("StableDiffusion3Img2ImgPipeline", sd3, _START, strength=({"strength": 0.6}, 1))
_add("StableDiffusion3InpaintPipeline", inpaint, _START | _MASK)
_add("StableDiffusion3ControlNetPipeline", controlnet, _CONTROL)
_add(
    "StableDiffusion3ControlNetInpaintingPipeline",
    controlnet_inpainting,
    {"control_image": image(16), "control_mask": mask(16)},
)
_add("StableDiffusion3PAGPipeline", perturbed_attention, {"pag_scale": 2.0})
_add("StableDiffusion3PAGImg2ImgPipeline", perturbed_attention, _START | {"pag_scale": 2.0})
