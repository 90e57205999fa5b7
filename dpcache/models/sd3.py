"""Stable Diffusion 3."""

from dpcache.models.family import Block, Family, Request, adaptive_norm


def inputs(request: Request) -> dict:
    """With guidance the batch holds every sample twice. CLIP's 77 tokens stand before T5's."""
    config, batch = request.config, request.batch * (2 if request.call.get("guidance_scale", 7.0) > 1 else 1)
    words = 77 + request.call.get("max_sequence_length", 256)
    return {
        "hidden_states": request.random(batch, config["in_channels"], *request.size()),
        "timestep": request.time()[:1].expand(batch),
        "encoder_hidden_states": request.random(batch, words, config["joint_attention_dim"]),
        "pooled_projections": request.random(batch, config["pooled_projection_dim"]),
    }


_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}

FAMILY = Family(
    "SD3Transformer2DModel",
    blocks=(
        Block(
            "JointTransformerBlock",
            kept=("attn", "attn2", "ff", "ff_context"),
            feed_forwards=(("norm2", "ff"), ("norm2_context", "ff_context")),
            modulated_input=adaptive_norm,
        ),
    ),
    published={
        "stabilityai/stable-diffusion-3.5-medium": _MEDIUM,
        "stabilityai/stable-diffusion-3.5-large": _MEDIUM
        | {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "dual_attention_layers": [],
        },
    },
    guidance=None,
    inputs=inputs,
)
