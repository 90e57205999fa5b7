"""Qwen-Image."""

import diffusers

from helpers import families
from pipelines.parts import NEGATIVE, TEXT, image, mask, ones
from pipelines.records import Case, assemble, pipeline

_SIZES = {
    "in_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


def qwen(kind, **parts):
    return assemble(kind, **families.qwen_image().components | parts)


def controlnet(kind):
    return qwen(kind, controlnet=diffusers.QwenImageControlNetModel(**_SIZES | {"num_layers": 1}, out_channels=4))


def controlnet_inpaint(kind):
    """Its ControlNet sees the mask as one more channel, in each of a patch's four places."""
    net = diffusers.QwenImageControlNetModel(**_SIZES | {"num_layers": 1}, out_channels=4, extra_condition_channels=4)
    return qwen(kind, controlnet=net)


def layered(kind):
    transformer = diffusers.QwenImageTransformer2DModel(
        **_SIZES, out_channels=4, use_additional_t_cond=True, use_layer3d_rope=True
    )
    return qwen(kind, transformer=transformer)


_TEXT = TEXT | {"prompt_embeds_mask": ones(1, 7)}
_GUIDANCE = NEGATIVE | {"negative_prompt_embeds_mask": ones(1, 7), "true_cfg_scale": 4.0}
_SIZE = {"height": 16, "width": 16}
_IMAGE = {"image": image(32)}
_START = {"image": image(16), "strength": 1.0}
_MASK = {"mask_image": mask(16)}


def _add(name, builder, more, patches=None, **cases):
    call = _TEXT | more
    others = {case: Case(call | arguments, calls) for case, (arguments, calls) in cases.items()}
    pipeline(name, builder, patches, plain=Case(call, 1), guided=Case(call | _GUIDANCE, 2), **others)


# In place of about 1024 x 1024.
_SMALL = {"calculate_dimensions": lambda area, ratio: (32, 32, None)}
_SMALL_PLUS = {"calculate_dimensions": lambda area, ratio: (32, 32)}

_add("QwenImagePipeline", qwen, _SIZE)
_add("QwenImageImg2ImgPipeline", qwen, _SIZE | _START, strength=({"strength": 0.6}, 1))
_add("QwenImageInpaintPipeline", qwen, _SIZE | _START | _MASK)
_add("QwenImageEditPipeline", qwen, _SIZE | _IMAGE, _SMALL)
_add("QwenImageEditInpaintPipeline", qwen, _SIZE | _START | _MASK, _SMALL)
_add("QwenImageEditPlusPipeline", qwen, _SIZE | {"image": [image(32)]}, _SMALL_PLUS)
_add("QwenImageControlNetPipeline", controlnet, _SIZE | {"control_image": image(16)})
_add(
    "QwenImageControlNetInpaintPipeline",
    controlnet_inpaint,
    _SIZE | {"control_image": image(16), "control_mask": mask(16)},
)
_add(
    "QwenImageLayeredPipeline",
    layered,
    {"image": image(32), "layers": 2, "prompt": "two boats", "output_type": "pt"},
    _SMALL_PLUS,
)
