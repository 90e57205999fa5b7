"""Lumina-Image 2.0."""

from collections.abc import Mapping

import torch

from dpcache.arguments import argument
from dpcache.models.family import Block, Family, Request, Streams


def inputs(request: Request) -> dict:
    config, batch, words = request.config, request.batch, request.call.get("max_sequence_length", 256)
    return {
        "hidden_states": request.random(batch, config["in_channels"], *request.size()),
        "timestep": (1 - request.time() / 1000).to(request.dtype),
        "encoder_hidden_states": request.random(batch, words, config["cap_feat_dim"]),
        "encoder_attention_mask": torch.ones(batch, words, dtype=torch.bool, device=request.device),
    }


def shapes_alone(model: torch.nn.Module) -> None:
    """The lengths of the texts are read off their mask, here off one without padding."""
    positions = model.rope_embedder
    forward = positions.forward
    positions.forward = lambda latents, mask: forward(latents, torch.ones(mask.shape, dtype=torch.bool))


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    return block.norm1(argument(0, "hidden_states", args, kwargs), argument(3, "temb", args, kwargs))[0]


FAMILY = Family(
    "Lumina2Transformer2DModel",
    blocks=(
        Block(
            "Lumina2TransformerBlock",
            streams=Streams(other=None),
            kept=("attn", "feed_forward"),
            feed_forwards=(("ffn_norm1", "feed_forward"),),
            modulated_input=modulated_input,
        ),
    ),
    embedders=("x_embedder", "time_caption_embed.caption_embedder", "context_refiner", "noise_refiner"),
    shapes_alone=shapes_alone,
    published={
        "Alpha-VLLM/Lumina-Image-2.0": {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "hidden_size": 2304,
            "num_layers": 26,
            "num_refiner_layers": 2,
            "num_attention_heads": 24,
            "num_kv_heads": 8,
            "multiple_of": 256,
            "axes_dim_rope": [32, 32, 32],
            "axes_lens": [300, 512, 512],
            "cap_feat_dim": 2304,
        },
    },
    guidance=("guidance_scale", 4.0),
    inputs=inputs,
)
