"""DiT, class-conditional."""

from collections.abc import Mapping

import torch

from dpcache.arguments import argument
from dpcache.models.family import Block, Family, Request


def inputs(request: Request) -> dict:
    """With guidance the batch holds every sample twice."""
    config, batch = request.config, request.batch * (2 if request.call.get("guidance_scale", 4.0) > 1 else 1)
    return {
        "hidden_states": request.random(batch, config["in_channels"], config["sample_size"], config["sample_size"]),
        "timestep": request.time()[:1].expand(batch),
        "class_labels": torch.zeros(batch, dtype=torch.long, device=request.device),
    }


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    stream = argument(0, "hidden_states", args, kwargs)
    if block.norm_type == "ada_norm_single":  # PixArt's: each block adds a table of its own to the time's modulation
        modulation = block.scale_shift_table + kwargs["timestep"].unflatten(-1, (6, -1))
        shift, scale = modulation.chunk(6, dim=1)[:2]
        return block.norm1(stream) * (1 + scale) + shift
    conditions = {name: kwargs[name] for name in ("timestep", "class_labels")}
    return block.norm1(stream, **conditions, hidden_dtype=stream.dtype)[0]


_XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
}

BLOCK = Block(
    "BasicTransformerBlock",
    square_grid=True,
    kept=("attn1", "attn2", "ff"),  # attn2: in PixArt's and Latte's blocks of this class
    attention="attn1",
    feed_forwards=(("norm3", "ff"), ("norm2", "ff")),  # PixArt's and Latte's have no norm3, and DiT's no norm2
    modulated_input=modulated_input,
)

FAMILY = Family(
    "DiTTransformer2DModel",
    blocks=(BLOCK,),
    embedders=("pos_embed",),
    published={"facebook/DiT-XL-2-256": _XL, "facebook/DiT-XL-2-512": _XL | {"sample_size": 64}},
    guidance=None,
    inputs=inputs,
)
