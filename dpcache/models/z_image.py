"""Z-Image."""

from collections.abc import Mapping

import torch

from dpcache.arguments import argument
from dpcache.models.family import Block, Family, Request


def inputs(request: Request) -> dict:
    """Lists of one sample each; with guidance they hold every sample twice."""
    config, batch = request.config, request.batch * (2 if request.call.get("guidance_scale", 5.0) > 1 else 1)
    words = request.call.get("max_sequence_length", 512)
    return {
        "x": [request.random(config["in_channels"], 1, *request.size()) for _ in range(batch)],
        "t": (1 - request.time()[:1] / 1000).to(request.dtype).expand(batch),
        "cap_feats": [request.random(words, config["cap_feat_dim"]) for _ in range(batch)],
    }


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    scale = block.adaLN_modulation(argument(3, "adaln_input", args, kwargs)).unsqueeze(1).chunk(4, dim=2)[0]
    return block.attention_norm1(argument(0, "x", args, kwargs)) * (1 + scale)


_BASE = {
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}

FAMILY = Family(
    "ZImageTransformer2DModel",
    blocks=(
        Block(
            "ZImageTransformerBlock",
            kept=("attention", "feed_forward"),
            attention="attention",
            feed_forwards=(("ffn_norm1", "feed_forward"),),
            modulated_input=modulated_input,
        ),
    ),
    embedders=("all_x_embedder", "noise_refiner", "cap_embedder", "context_refiner"),
    published={"Tongyi-MAI/Z-Image": _BASE, "Tongyi-MAI/Z-Image-Turbo": _BASE},
    guidance=None,
    inputs=inputs,
)
