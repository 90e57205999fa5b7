"""HunyuanVideo, whose blocks are double- and single-stream ones like FLUX's."""

import torch

from dpcache.models.family import Block, Family, Request, adaptive_norm


def inputs(request: Request) -> dict:
    config, batch, words = request.config, request.batch, request.call.get("max_sequence_length", 256)
    return {
        "hidden_states": request.random(batch, config.get("in_channels", 16), request.frames(), *request.size()),
        "timestep": request.time(),
        "encoder_hidden_states": request.random(batch, words, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(batch, words, dtype=torch.bool, device=request.device),
        "pooled_projections": request.random(batch, config["pooled_projection_dim"]),
        "guidance": request.full(6000.0) if config.get("guidance_embeds") else None,
    }


FAMILY = Family(
    "HunyuanVideoTransformer3DModel",
    blocks=(
        Block(
            "HunyuanVideoTransformerBlock",
            part="double",
            kept=("attn", "ff", "ff_context"),
            feed_forwards=(("norm2", "ff"), ("norm2_context", "ff_context")),
            modulated_input=adaptive_norm,
        ),
        Block(
            "HunyuanVideoSingleTransformerBlock",
            part="single",
            kept=("proj_out",),  # of the attention and of the feed-forward's second layer in one
            feeders=("attn", "proj_mlp"),
            feed_forwards=(("norm", "proj_out"),),
        ),
    ),
    embedders=("x_embedder", "context_embedder", "rope"),
    published={
        "hunyuanvideo-community/HunyuanVideo": {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 20,
            "num_single_layers": 40,
            "num_refiner_layers": 2,
            "guidance_embeds": True,
            "text_embed_dim": 4096,
            "pooled_projection_dim": 768,
        },
    },
    inputs=inputs,
)
