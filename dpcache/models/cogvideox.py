"""CogVideoX, text- and image-to-video."""

from collections.abc import Mapping

import torch

from dpcache.arguments import argument
from dpcache.models.family import Block, Family, Request


def inputs(request: Request) -> dict:
    """With guidance the batch holds every sample twice. The frames stand before the channels. A model that has learned
    the positions takes the size that it has learned, whatever is asked."""
    config, batch = request.config, request.batch * (2 if request.call.get("guidance_scale", 6.0) > 1 else 1)
    frames, (rows, columns) = request.frames(), request.size()
    if config.get("use_learned_positional_embeddings"):
        frames, rows, columns = 13, 60, 90
    words = config.get("max_text_seq_length", 226)
    made = {
        "hidden_states": request.random(batch, frames, config["in_channels"], rows, columns),
        "timestep": request.time()[:1].expand(batch),
        "encoder_hidden_states": request.random(batch, words, config["text_embed_dim"]),
    }
    if config.get("use_rotary_positional_embeddings"):
        tokens = frames * (rows // 2) * (columns // 2)
        angles = (request.random(tokens, config["attention_head_dim"]).float() for _ in range(2))
        made["image_rotary_emb"] = tuple(angles)
    return made


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    names = ("hidden_states", "encoder_hidden_states", "temb")
    return block.norm1(*(argument(place, name, args, kwargs) for place, name in enumerate(names)))[0]


_5B = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}

FAMILY = Family(
    "CogVideoXTransformer3DModel",
    # Its feed-forward takes the text's tokens and the image's together, but the norm before it apart: ToCa's place is
    # not there.
    blocks=(
        Block(
            "CogVideoXBlock",
            text_first=True,
            kept=("attn1", "ff"),
            attention="attn1",
            modulated_input=modulated_input,
        ),
    ),
    embedders=("patch_embed",),
    published={
        "THUDM/CogVideoX-2b": _5B
        | {"num_attention_heads": 30, "num_layers": 30, "use_rotary_positional_embeddings": False},
        "THUDM/CogVideoX-5b": _5B,
        "THUDM/CogVideoX-5b-I2V": _5B | {"in_channels": 32, "use_learned_positional_embeddings": True},
    },
    guidance=None,
    inputs=inputs,
)
