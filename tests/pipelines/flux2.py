"""FLUX.2."""

from functools import partial

import diffusers

from helpers import families
from pipelines.parts import NEGATIVE, TEXT, WIDTH, image, mask
from pipelines.records import Case, assemble, pipeline


def flux2(kind, **options):
    name = "Flux2Pipeline" if kind is diffusers.Flux2Pipeline else "Flux2KleinPipeline"
    own = families.flux2(name, num_layers=2, joint_attention_dim=WIDTH)
    return assemble(kind, scheduler=own.scheduler, vae=own.vae, transformer=own.transformer, **options)


_klein = partial(flux2, is_distilled=False)
_distilled = partial(flux2, is_distilled=True)

_CALL = TEXT | {"height": 16, "width": 16}
_OFF = {"guidance_scale": 1.0}
_ON = NEGATIVE | {"guidance_scale": 4.0}
_IMAGE = {"image": image(64)}
_START = {"image": image(16), "mask_image": mask(16), "strength": 1.0}

pipeline("Flux2Pipeline", flux2, plain=Case(_CALL, 1), image=Case(_CALL | _IMAGE, 1))
pipeline(
    "Flux2KleinPipeline",
    _klein,
    plain=Case(_CALL | _OFF, 1),
    guided=Case(_CALL | _ON, 2),
    image=Case(_CALL | _ON | _IMAGE, 2),
)
pipeline(
    "Flux2KleinInpaintPipeline",
    _klein,
    plain=Case(_CALL | _START | _OFF, 1),
    guided=Case(_CALL | _START | _ON, 2),
)
pipeline("Flux2KleinKVPipeline", _distilled, plain=Case(_CALL, 1), image=Case(_CALL | _IMAGE, 1))
