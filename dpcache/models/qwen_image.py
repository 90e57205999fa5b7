"""Qwen-Image."""

from collections.abc import Mapping

import torch

from dpcache.arguments import argument
from dpcache.models.family import Block, Family, Request


def inputs(request: Request) -> dict:
    """The pipeline packs 2 x 2 latents into a token."""
    config, batch, words = request.config, request.batch, request.call.get("max_sequence_length", 512)
    rows, columns = (side // 2 for side in request.size())
    return {
        "hidden_states": request.random(batch, rows * columns, config["in_channels"]),
        "timestep": (request.time() / 1000).to(request.dtype),
        "encoder_hidden_states": request.random(batch, words, config["joint_attention_dim"]),
        "img_shapes": [[(1, rows, columns)]] * batch,
    }


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    modulation = block.img_mod(kwargs["temb"]).chunk(2, dim=-1)[0]
    return block._modulate(block.img_norm1(argument(0, "hidden_states", args, kwargs)), modulation)[0]


def token_grid(kwargs: Mapping) -> tuple[int, int]:
    _, rows, columns = kwargs["img_shapes"][0][0]
    return rows, columns


FAMILY = Family(
    "QwenImageTransformer2DModel",
    blocks=(
        Block(
            "QwenImageTransformerBlock",
            kept=("attn", "img_mlp", "txt_mlp"),
            feed_forwards=(("txt_norm2", "txt_mlp"), ("img_norm2", "img_mlp")),
            modulated_input=modulated_input,
        ),
    ),
    published={
        "Qwen/Qwen-Image": {
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
        },
    },
    inputs=inputs,
    token_grid=token_grid,
)
