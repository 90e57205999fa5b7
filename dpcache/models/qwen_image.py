"""Qwen-Image, and Qwen-Image-Edit."""

from collections.abc import Mapping

import torch

from dpcache.arguments import argument
from dpcache.models.family import Block, Family, Request


def inputs(request: Request) -> dict:
    """The pipeline packs 2 x 2 latents into a token. The tokens of an image to be edited, here of the same size, stand
    behind."""
    config, batch, words = request.config, request.batch, request.call.get("max_sequence_length", 512)
    rows, columns = (side // 2 for side in request.size())
    images = 2 if request.edits() else 1
    return {
        "hidden_states": request.random(batch, images * rows * columns, config["in_channels"]),
        "timestep": (request.time() / 1000).to(request.dtype),
        "encoder_hidden_states": request.random(batch, words, config["joint_attention_dim"]),
        "img_shapes": [[(1, rows, columns)] * images] * batch,
    }


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    modulation, index = block.img_mod(kwargs["temb"]).chunk(2, dim=-1)[0], kwargs.get("modulate_index")
    return block._modulate(block.img_norm1(argument(0, "hidden_states", args, kwargs)), modulation, index)[0]


def token_grid(kwargs: Mapping) -> tuple[int, int]:
    _, rows, columns = kwargs["img_shapes"][0][0]
    return rows, columns


_IMAGE = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
}

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
        "Qwen/Qwen-Image": _IMAGE,
        "Qwen/Qwen-Image-2512": _IMAGE,
        "Qwen/Qwen-Image-Edit-2511": _IMAGE | {"zero_cond_t": True},  # the input image's tokens are told the time 0
    },
    inputs=inputs,
    token_grid=token_grid,
)
