"""Z-Image."""

import diffusers

from helpers import families
from pipelines.parts import WIDTH, image, mask, randn
from pipelines.records import Case, assemble, pipeline


def z_image(kind, controlnet=None):
    own = families.z_image(channels=16)
    if controlnet is not None:
        controlnet = type(controlnet).from_transformer(controlnet, own.transformer)
    parts = {"scheduler": own.scheduler, "vae": own.vae, "transformer": own.transformer}
    return assemble(kind, **parts, controlnet=controlnet)


def controlnet(kind):
    """Its embedders are the transformer's."""
    inpaint = "Inpaint" in kind.__name__
    net = diffusers.ZImageControlNetModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=2 * 16 + 1 if inpaint else 16,
    )
    return z_image(kind, net)


_CALL = {"prompt_embeds": [randn(7, WIDTH)], "height": 32, "width": 32}
_OFF = {"guidance_scale": 0.0}
_ON = {"negative_prompt_embeds": [randn(5, WIDTH, seed=6)], "guidance_scale": 4.0}
_START = {"image": image(32), "strength": 1.0}
_MASK = {"mask_image": mask(32)}
_CONTROL = {"control_image": image(32, seed=1)}


def _add(name, builder, more, **cases):
    call = _CALL | more
    pipeline(
        name,
        builder,
        plain=Case(call | _OFF, 1),
        guided=Case(call | _ON, 1),
        **{case: Case(call | _ON | arguments, 1) for case, arguments in cases.items()},
    )


_add("ZImagePipeline", z_image, {}, truncated={"cfg_truncation": 0.5})
_add("ZImageImg2ImgPipeline", z_image, _START, strength={"strength": 0.6})
_add("ZImageInpaintPipeline", z_image, _START | _MASK)
_add("ZImageControlNetPipeline", controlnet, _CONTROL)
_add("ZImageControlNetInpaintPipeline", controlnet, _CONTROL | {"image": image(32)} | _MASK)
