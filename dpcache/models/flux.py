"""FLUX.1 of Black Forest Labs, and its double- and single-stream blocks."""

import functools
from collections.abc import Mapping

import torch

from dpcache.models.family import Block, Family, Request, adaptive_norm


def inputs(request: Request) -> dict:
    config = request.config
    return packed(request) | {
        "pooled_projections": request.random(request.batch, config["pooled_projection_dim"]),
        "guidance": request.full(3.5) if config.get("guidance_embeds") else None,
    }


def packed(request: Request) -> dict:
    """Arguments of all transformers of this kind. The pipeline packs 2 x 2 latents into a token. The tokens of an image
    to be edited, here of the same size, stand behind; FLUX.1-Fill has them in further channels instead."""
    config, batch, words = request.config, request.batch, request.call.get("max_sequence_length", 512)
    rows, columns = (side // 2 for side in request.size())
    images = 2 if request.edits() and "out_channels" not in config else 1
    axes = (torch.arange(size, device=request.device) for size in (images, rows, columns))
    return {
        "hidden_states": request.random(batch, images * rows * columns, config["in_channels"]),
        "timestep": (request.time() / 1000).to(request.dtype),
        "encoder_hidden_states": request.random(batch, words, config["joint_attention_dim"]),
        "img_ids": torch.cartesian_prod(*axes).to(request.dtype),
        "txt_ids": torch.zeros(words, 3, device=request.device, dtype=request.dtype),
    }


def token_grid(kwargs: Mapping) -> tuple[int, int]:
    return _last_positions(kwargs["img_ids"])


@functools.lru_cache(maxsize=1)  # a generation has one tensor of positions, and on a GPU every look waits for it
def _last_positions(positions: torch.Tensor) -> tuple[int, int]:
    """Of the image that is made; an image to be edited has another first coordinate."""
    rows, columns = torch.where(positions[:, :1] == 0, positions[:, 1:], 0).amax(0).tolist()
    return int(rows) + 1, int(columns) + 1


_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}

FAMILY = Family(
    "FluxTransformer2DModel",
    blocks=(
        Block(
            "FluxTransformerBlock",
            part="double",
            kept=("attn", "ff", "ff_context"),
            feed_forwards=(("norm2_context", "ff_context"), ("norm2", "ff")),
            modulated_input=adaptive_norm,
        ),
        Block(
            "FluxSingleTransformerBlock",
            part="single",
            kept=("proj_out",),  # of the attention and of the feed-forward's second layer in one
            feeders=("attn", "proj_mlp"),
            feed_forwards=(("norm", "proj_out"),),
        ),
    ),
    embedders=("x_embedder", "context_embedder", "pos_embed"),
    published={
        "black-forest-labs/FLUX.1-dev": _DEV,
        "black-forest-labs/FLUX.1-schnell": _DEV | {"guidance_embeds": False},
        "black-forest-labs/FLUX.1-Kontext-dev": _DEV,
        "black-forest-labs/FLUX.1-Fill-dev": _DEV | {"in_channels": 384, "out_channels": 64},
    },
    inputs=inputs,
    token_grid=token_grid,
)
