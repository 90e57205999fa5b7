"""FLUX.2."""

from functools import partial

import diffusers

from pipelines.parts import NEGATIVE, TEXT, flow, image, mask
from pipelines.records import Case, assemble, pipeline


def flux2(kind, **options):
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
    )
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=kind is diffusers.Flux2Pipeline,
    )
    return assemble(kind, scheduler=flow(use_dynamic_shifting=True), vae=vae, transformer=transformer, **options)


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
