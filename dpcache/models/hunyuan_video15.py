"""HunyuanVideo 1.5, text- and image-to-video."""

import torch

from dpcache.models.family import Block, Family, Request, Streams, adaptive_norm

WORDS, LETTERS, PATCHES = 1000, 256, 729
"""Tokens of the prompt, of the texts that stand in quotes in it, and of the image."""


def inputs(request: Request) -> dict:
    config, batch = request.config, request.batch
    widths = {"": config["text_embed_dim"], "_2": config["text_embed_2_dim"]}
    made = {
        "hidden_states": request.random(batch, config["in_channels"], request.frames(), *request.size()),
        "timestep": request.time().to(request.dtype),
        "image_embeds": request.random(batch, PATCHES, config["image_embed_dim"]),
    }
    for (name, width), words in zip(widths.items(), (WORDS, LETTERS)):
        made[f"encoder_hidden_states{name}"] = request.random(batch, words, width)
        made[f"encoder_attention_mask{name}"] = torch.ones(batch, words, dtype=request.dtype, device=request.device)
    return made


def shapes_alone(model: torch.nn.Module) -> None:
    """The forward joins the tokens of texts and image in an order that it reads from their masks. In the order in which
    they come, they are as many."""

    def forward(
        hidden_states,
        timestep,
        encoder_hidden_states,
        encoder_attention_mask,
        encoder_hidden_states_2,
        encoder_attention_mask_2,
        image_embeds,
        return_dict=True,
    ):
        times, positions = model.time_embed(timestep), model.rope(hidden_states)
        words = model.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
        parts = model.image_embedder(image_embeds), model.context_embedder_2(encoder_hidden_states_2), words
        image, text = model.x_embedder(hidden_states), torch.cat(parts, dim=1)
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        for block in model.transformer_blocks:
            image, text = block(image, text, times, mask, positions)
        predicted = model.proj_out(model.norm_out(image, times))
        return (predicted.transpose(1, 2).unflatten(2, hidden_states.shape[2:]),)

    model.forward = forward


_480P = {
    "in_channels": 65,
    "out_channels": 32,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 54,
    "num_refiner_layers": 2,
    "text_embed_dim": 3584,
    "text_embed_2_dim": 1472,
    "image_embed_dim": 1152,
    "target_size": 640,
    "task_type": "t2v",
}
_COMMUNITY = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers"

FAMILY = Family(
    "HunyuanVideo15Transformer3DModel",
    blocks=(
        Block(
            "HunyuanVideo15TransformerBlock",
            streams=Streams(other_index=1),
            kept=("attn", "ff", "ff_context"),
            feed_forwards=(("norm2", "ff"), ("norm2_context", "ff_context")),
            modulated_input=adaptive_norm,
        ),
    ),
    embedders=("x_embedder", "context_embedder", "context_embedder_2", "image_embedder", "rope"),
    shapes_alone=shapes_alone,
    published={
        f"{_COMMUNITY}-480p_t2v": _480P,
        f"{_COMMUNITY}-480p_i2v": _480P | {"task_type": "i2v"},
        f"{_COMMUNITY}-720p_t2v": _480P | {"target_size": 960},
    },
    spatial=16,
    guidance=("guidance_scale", 6.0),  # of the pipeline's guider, not of its call
    inputs=inputs,
)
