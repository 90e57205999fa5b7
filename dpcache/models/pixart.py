"""PixArt-Sigma."""

import torch

from dpcache.models.dit import BLOCK
from dpcache.models.family import Family, Request


def inputs(request: Request) -> dict:
    """With guidance the batch holds every sample twice."""
    config, batch = request.config, request.batch * (2 if request.call.get("guidance_scale", 4.5) > 1 else 1)
    words = request.call.get("max_sequence_length", 300)
    return {
        "hidden_states": request.random(batch, config["in_channels"], *request.size()),
        "timestep": request.time()[:1].expand(batch),
        "encoder_hidden_states": request.random(batch, words, config["caption_channels"]),
        "encoder_attention_mask": torch.ones(batch, words, dtype=torch.long, device=request.device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


_1024 = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 128,
    "patch_size": 2,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}

FAMILY = Family(
    "PixArtTransformer2DModel",
    blocks=(BLOCK,),
    embedders=("pos_embed", "caption_projection"),
    published={
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": _1024,
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": _1024 | {"sample_size": 64, "interpolation_scale": 1},
    },
    guidance=None,
    inputs=inputs,
)
