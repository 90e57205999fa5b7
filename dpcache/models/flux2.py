"""FLUX.2 of Black Forest Labs: dev, and the smaller klein."""

import functools
from collections.abc import Mapping

import torch

from dpcache.arguments import argument
from dpcache.models.family import Block, Family, Request

REFERENCE_TIME = 10
"""The first coordinate of an input image's tokens; that of the image to be made is 0."""


def inputs(request: Request) -> dict:
    """The pipeline packs 2 x 2 latents into a token. An input image, here of the same size, stands behind."""
    config, batch, words = request.config, request.batch, request.call.get("max_sequence_length", 512)
    rows, columns = (side // 2 for side in request.size())
    times = [0, REFERENCE_TIME] if request.edits() else [0]
    image = [_positions((time,), range(rows), range(columns), (0,)) for time in times]
    return {
        "hidden_states": request.random(batch, len(times) * rows * columns, config["in_channels"]),
        "timestep": (request.time() / 1000).to(request.dtype),
        "guidance": request.full(4.0, torch.float32) if config["guidance_embeds"] else None,
        "encoder_hidden_states": request.random(batch, words, config["joint_attention_dim"]),
        "txt_ids": _positions((0,), (0,), (0,), range(words)).to(request.device).expand(batch, -1, -1),
        "img_ids": torch.cat(image).to(request.device).expand(batch, -1, -1),
    }


def _positions(*axes) -> torch.Tensor:
    """Time, row, column and place in the text of each token, (N, 4)."""
    return torch.cartesian_prod(*(torch.tensor([*axis]) for axis in axes))


def token_grid(kwargs: Mapping) -> tuple[int, int]:
    return _last_positions(kwargs["img_ids"])


@functools.lru_cache(maxsize=1)  # a generation has one tensor of positions, and on a GPU every look waits for it
def _last_positions(positions: torch.Tensor) -> tuple[int, int]:
    own = positions[0][positions[0, :, 0] == 0]
    rows, columns = own[:, 1:3].amax(0).tolist()
    return int(rows) + 1, int(columns) + 1


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    shift, scale = argument(2, "temb_mod_img", args, kwargs).unsqueeze(-2).chunk(6, dim=-1)[:2]
    return (1 + scale) * block.norm1(argument(0, "hidden_states", args, kwargs)) + shift


_DEV = {
    "in_channels": 128,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "guidance_embeds": True,
}
_KLEIN = _DEV | {"guidance_embeds": False}
_4B = _KLEIN | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
_9B = _KLEIN | {"num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}

FAMILY = Family(
    "Flux2Transformer2DModel",
    blocks=(
        Block(
            "Flux2TransformerBlock",
            part="double",
            kept=("attn", "ff", "ff_context"),
            feed_forwards=(("norm2_context", "ff_context"), ("norm2", "ff")),
            modulated_input=modulated_input,
        ),
        # Its attention holds the feed-forward as well.
        Block("Flux2SingleTransformerBlock", part="single", text_first=True, kept=("attn",)),
    ),
    embedders=(
        "x_embedder",
        "context_embedder",
        "pos_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    ),
    published={
        "black-forest-labs/FLUX.2-dev": _DEV,
        "black-forest-labs/FLUX.2-klein-4B": _4B,
        "black-forest-labs/FLUX.2-klein-base-4B": _4B,
        "black-forest-labs/FLUX.2-klein-9B": _9B,
        "black-forest-labs/FLUX.2-klein-base-9B": _9B,
    },
    guidance=("guidance_scale", 4.0),
    inputs=inputs,
    token_grid=token_grid,
)
