"""FLUX.1."""

import diffusers

from helpers.families import clip_text, image_vae, t5, tokenizer
from pipelines.parts import flow, image, mask
from pipelines.records import Case, assemble, pipeline

_SIZES = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def flux(kind, controlnet=None, **sizes):
    return assemble(
        kind,
        scheduler=flow(use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=clip_text(),
        tokenizer=tokenizer(12),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(12),
        transformer=diffusers.FluxTransformer2DModel(**_SIZES | sizes),
        controlnet=controlnet,
    )


def fill(kind):
    """Masked image and mask beside the latents' channels."""
    return flux(kind, in_channels=3 * 16, out_channels=16)


def control(kind):
    return flux(kind, in_channels=2 * 16, out_channels=16)


def controlnet(kind):
    return flux(kind, diffusers.FluxControlNetModel(**_SIZES | {"num_single_layers": 1, "axes_dims_rope": [4, 6, 6]}))


_TEXT = {"prompt": ["two boats"], "height": 16, "width": 16, "max_sequence_length": 12}
_GUIDANCE = {"negative_prompt": ["an old clock at night"], "true_cfg_scale": 3.0}
_IMAGE = {"image": image(16)}
_START = _IMAGE | {"strength": 1.0}
_MASK = {"mask_image": mask(16)}
_CONTROL = {"control_image": image(16, seed=1)}
_KONTEXT = {"max_area": 256, "_auto_resize": False}


def _add(name, builder, more=None, **cases):
    """All take the same text; `cases` beside the plain one."""
    call = _TEXT | (more or {})
    others = {case: Case(call | arguments, calls) for case, (arguments, calls) in cases.items()}
    pipeline(name, builder, plain=Case(call, 1), **others)


_add("FluxPipeline", flux, guided=(_GUIDANCE, 2))
_add("FluxImg2ImgPipeline", flux, _START, guided=(_GUIDANCE, 2), strength=({"strength": 0.6}, 1))
_add("FluxInpaintPipeline", flux, _START | _MASK, guided=(_GUIDANCE, 2))
_add("FluxKontextPipeline", flux, _IMAGE | _KONTEXT, guided=(_GUIDANCE, 2))
_add("FluxKontextInpaintPipeline", flux, _START | _MASK | _KONTEXT, guided=(_GUIDANCE, 2))
_add("FluxFillPipeline", fill, _IMAGE | _MASK)
_add("FluxControlPipeline", control, _CONTROL)
_add("FluxControlImg2ImgPipeline", control, _START | _CONTROL)
_add("FluxControlInpaintPipeline", control, _START | _MASK | _CONTROL)
_add("FluxControlNetPipeline", controlnet, _CONTROL, guided=(_GUIDANCE, 2))
_add("FluxControlNetImg2ImgPipeline", controlnet, _START | _CONTROL)
_add("FluxControlNetInpaintPipeline", controlnet, _START | _MASK | _CONTROL)
