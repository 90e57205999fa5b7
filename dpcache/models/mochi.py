"""Mochi 1."""

import torch

from dpcache.models.family import Block, Family, Request, adaptive_norm


def inputs(request: Request) -> dict:
    """With guidance the batch holds every sample twice."""
    config, batch = request.config, request.batch * (2 if request.call.get("guidance_scale", 4.5) > 1 else 1)
    words = request.call.get("max_sequence_length", 256)
    return {
        "hidden_states": request.random(batch, config["in_channels"], request.frames(), *request.size()),
        "encoder_hidden_states": request.random(batch, words, config["text_embed_dim"]),
        "timestep": request.time()[:1].expand(batch).to(request.dtype),
        "encoder_attention_mask": torch.ones(batch, words, dtype=torch.bool, device=request.device),
    }


def shapes_alone(model: torch.nn.Module) -> None:
    """The attention reads from a mask how many words a sample has. Its outputs have the shapes of its inputs, but the
    last block's text is as wide as the image. Angles are computed in a precision that the device does not know."""
    for block in model.transformer_blocks:
        block.attn1.processor = _shapes
    model.rope._create_rope = lambda freqs, pos: (pos.new_empty(len(pos), *freqs.shape[1:]),) * 2


def _shapes(attn: torch.nn.Module, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=None):
    text = encoder_hidden_states if hasattr(attn, "to_add_out") else attn.add_v_proj(encoder_hidden_states)
    return hidden_states, text


FAMILY = Family(
    "MochiTransformer3DModel",
    blocks=(
        # Its attention takes the samples of a batch one by one, of each its own number of words: ToCa, which looks at
        # the attention of a whole batch, is left out.
        Block(
            "MochiTransformerBlock",
            kept=("attn1", "ff", "ff_context"),
            attention="attn1",
            modulated_input=adaptive_norm,
        ),
    ),
    embedders=("patch_embed", "rope"),
    shapes_alone=shapes_alone,
    published={
        "genmo/mochi-1-preview": {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 48,
            "pooled_projection_dim": 1536,
            "in_channels": 12,
            "text_embed_dim": 4096,
            "time_embed_dim": 256,
        },
    },
    temporal=6,
    guidance=None,
    inputs=inputs,
)
