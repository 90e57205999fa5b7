"""Wan2.1 and Wan2.2, text- and image-to-video."""

from collections.abc import Mapping

import torch

from dpcache.arguments import argument
from dpcache.models.family import Block, Family, Request

TI2V_CHANNELS = 48


def inputs(request: Request) -> dict:
    config, batch, words = request.config, request.batch, request.call.get("max_sequence_length", 512)
    """A model that edits a given frame in place, TI2V's, is told the time of every token."""
    rows, columns = request.size()
    made = {
        "hidden_states": request.random(batch, config.get("in_channels", 16), request.frames(), rows, columns),
        "timestep": request.time(),
        "encoder_hidden_states": request.random(batch, words, config["text_dim"]),
    }
    if config.get("image_dim"):
        made["encoder_hidden_states_image"] = request.random(batch, 257, config["image_dim"])
    if config.get("in_channels") == TI2V_CHANNELS:
        tokens = request.frames() * (rows // 2) * (columns // 2)
        made["timestep"] = made["timestep"][:, None].expand(-1, tokens)
    return made


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    """The time embedding that modulates the input, (B, 6, D), as in TeaCache's code for Wan2.1: every sample has the
    same, and so the same schedule."""
    return argument(2, "temb", args, kwargs)


_14B = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "ffn_dim": 13824,
    "num_layers": 40,
}

FAMILY = Family(
    "WanTransformer3DModel",
    blocks=(
        Block(
            "WanTransformerBlock",
            kept=("attn1", "attn2", "ffn"),
            attention="attn1",
            feed_forwards=(("norm3", "ffn"),),
            modulated_input=modulated_input,
        ),
    ),
    embedders=(
        "patch_embedding",
        "condition_embedder.time_proj",
        "condition_embedder.text_embedder",
        "condition_embedder.image_embedder",  # of image-to-video models alone
        "rope",
    ),
    published={
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": _14B,
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _14B
        | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _14B,
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _14B | {"in_channels": 36},
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _14B
        | {
            "num_attention_heads": 24,
            "in_channels": TI2V_CHANNELS,
            "out_channels": TI2V_CHANNELS,
            "ffn_dim": 14336,
            "num_layers": 30,
        },
    },
    experts={"Wan-AI/Wan2.2-T2V-A14B-Diffusers": 2, "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 2},
    coarser={"Wan-AI/Wan2.2-TI2V-5B-Diffusers": 16},
    guidance=("guidance_scale", 5.0),
    inputs=inputs,
)
