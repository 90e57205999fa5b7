"""Chroma."""

import torch

from helpers import families
from pipelines.parts import NEGATIVE, TEXT, flow, image, mask
from pipelines.records import Case, assemble, pipeline


def chroma(kind):
    own = families.chroma()
    return assemble(kind, scheduler=flow(), vae=own.vae, transformer=own.transformer)


def inpaint(kind):
    """The pipeline reads `guidance_embeds` in the transformer's config, where it is not (diffusers 0.42.1)."""
    pipe = chroma(kind)
    pipe.transformer.register_to_config(guidance_embeds=False)
    return pipe


_TEXT = TEXT | {"prompt_attention_mask": torch.ones(1, 7), "height": 16, "width": 16}
_ON = NEGATIVE | {"negative_prompt_attention_mask": torch.ones(1, 7), "guidance_scale": 4.0}
_START = {"image": image(16), "strength": 1.0}


def _add(name, more, builder=chroma):
    call = _TEXT | more
    pipeline(name, builder, plain=Case(call | {"guidance_scale": 1.0}, 1), guided=Case(call | _ON, 2))


_add("ChromaPipeline", {})
_add("ChromaImg2ImgPipeline", _START)
_add("ChromaInpaintPipeline", _START | {"mask_image": mask(16), "true_cfg_scale": 3.0}, inpaint)
