"""Chroma, which is FLUX.1 with one small network in place of all modulations, and real guidance."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from dpcache.arguments import argument
from dpcache.models import flux
from dpcache.models.family import Family, Request, Streams


def inputs(request: Request) -> dict:
    """As FLUX.1's, and a mask of text and image."""
    made = flux.packed(request)
    length = made["txt_ids"].shape[0] + made["hidden_states"].shape[1]
    return made | {"attention_mask": torch.ones(request.batch, length, device=request.device, dtype=request.dtype)}


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    modulation = argument(2, "temb", args, kwargs)[:, :6]
    return block.norm1(argument(0, "hidden_states", args, kwargs), emb=modulation)[0]


_DOUBLE, _SINGLE = flux.FAMILY.blocks

FAMILY = Family(
    "ChromaTransformer2DModel",
    blocks=(
        replace(
            _DOUBLE,
            kind="ChromaTransformerBlock",
            streams=Streams(image_index=1, other_index=0),
            modulated_input=modulated_input,
        ),
        replace(_SINGLE, kind="ChromaSingleTransformerBlock", streams=Streams(other=None), text_first=True),
    ),
    embedders=flux.FAMILY.embedders,
    published={
        "lodestones/Chroma1-HD": {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "approximator_num_channels": 64,
            "approximator_hidden_dim": 5120,
            "approximator_layers": 5,
        },
    },
    guidance=("guidance_scale", 5.0),
    inputs=inputs,
    token_grid=flux.token_grid,
)
