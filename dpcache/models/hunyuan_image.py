"""HunyuanImage 2.1, whose blocks are double- and single-stream ones as HunyuanVideo's."""

import torch

from dpcache.models.family import Block, Family, Request, adaptive_norm

WORDS, LETTERS = 1000, 128
"""Tokens of the prompt, and of the texts that stand in quotes in it."""


def inputs(request: Request) -> dict:
    """How the two texts are joined depends on the values of their masks. On the device "meta" one text stands for both,
    which is as long."""
    config, batch, meta = request.config, request.batch, request.device == "meta"
    words = WORDS + LETTERS if meta else WORDS
    made = {
        "hidden_states": request.random(batch, config["in_channels"], *request.size()),
        "timestep": request.time().to(request.dtype),
        "encoder_hidden_states": request.random(batch, words, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(batch, words, dtype=torch.long, device=request.device),
        "guidance": request.full(3250.0) if config["guidance_embeds"] else None,
    }
    if not meta:
        made["encoder_hidden_states_2"] = request.random(batch, LETTERS, config["text_embed_2_dim"])
        made["encoder_attention_mask_2"] = torch.ones(batch, LETTERS, dtype=torch.long, device=request.device)
    return made


FAMILY = Family(
    "HunyuanImageTransformer2DModel",
    blocks=(
        Block(
            "HunyuanImageTransformerBlock",
            part="double",
            kept=("attn", "ff", "ff_context"),
            feed_forwards=(("norm2", "ff"), ("norm2_context", "ff_context")),
            modulated_input=adaptive_norm,
        ),
        Block(
            "HunyuanImageSingleTransformerBlock",
            part="single",
            kept=("proj_out",),  # of the attention and of the feed-forward's second layer in one
            feeders=("attn", "proj_mlp"),
            feed_forwards=(("norm", "proj_out"),),
        ),
    ),
    embedders=("x_embedder", "context_embedder", "context_embedder_2", "rope"),
    published={
        "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": {
            "in_channels": 64,
            "out_channels": 64,
            "num_attention_heads": 28,
            "attention_head_dim": 128,
            "num_layers": 20,
            "num_single_layers": 40,
            "num_refiner_layers": 2,
            "patch_size": [1, 1],
            "guidance_embeds": False,
            "text_embed_dim": 3584,
            "text_embed_2_dim": 1472,
            "rope_axes_dim": [64, 64],
        },
    },
    spatial=32,
    guidance=("guidance_scale", 3.5),  # of the pipeline's guider, not of its call
    inputs=inputs,
)
