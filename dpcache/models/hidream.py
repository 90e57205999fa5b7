"""HiDream-I1, whose feed-forwards of the image are mixtures of experts."""

from collections.abc import Mapping

import torch

from dpcache.arguments import argument
from dpcache.models.family import Block, Family, Request, Streams


def inputs(request: Request) -> dict:
    """With guidance the batch holds every sample twice. Llama's features are those of all its layers."""
    config, batch = request.config, request.batch * (2 if request.call.get("guidance_scale", 5.0) > 1 else 1)
    words, (t5, llama) = request.call.get("max_sequence_length", 128), config["caption_channels"]
    return {
        "hidden_states": request.random(batch, config["in_channels"], *request.size()),
        "timesteps": request.time()[:1].expand(batch),
        "encoder_hidden_states_t5": request.random(batch, words, t5),
        "encoder_hidden_states_llama3": request.random(max(config["llama_layers"]) + 1, batch, words, llama),
        "pooled_embeds": request.random(batch, config["text_emb_dim"]),
    }


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Each is wrapped in a block of another class, which only hands its arguments on."""
    return [wrapper.block for wrapper in (*model.double_stream_blocks, *model.single_stream_blocks)]


def shapes_alone(model: torch.nn.Module) -> None:
    """Which expert a token goes to does not matter for the shapes; the image's sides are read as numbers."""
    for module in model.modules():
        if type(module).__name__ == "MOEFeedForwardSwiGLU":
            module.forward = torch.empty_like

    patchify = model.patchify

    def patchify_by_numbers(latents):
        tokens, mask, _, positions = patchify(latents)
        sides = [side // model.config.patch_size for side in latents.shape[-2:]]
        return tokens, mask, [sides] * len(latents), positions

    model.patchify = patchify_by_numbers


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    shift, scale = block.adaLN_modulation(argument(3, "temb", args, kwargs)).unsqueeze(1).chunk(12, dim=-1)[:2]
    return block.norm1_i(argument(0, "hidden_states", args, kwargs)) * (1 + scale) + shift


_LLAMA_LAYERS = 32

FAMILY = Family(
    "HiDreamImageTransformer2DModel",
    blocks=(
        Block(
            "HiDreamImageTransformerBlock",
            streams=Streams(other_index=1),
            part="double",
            kept=("attn1", "ff_i", "ff_t"),
            attention="attn1",
            feed_forwards=(("norm3_i", "ff_i"), ("norm3_t", "ff_t")),
            modulated_input=modulated_input,
        ),
        Block(
            "HiDreamImageSingleTransformerBlock",
            streams=Streams(other=None),
            part="single",
            kept=("attn1", "ff_i"),
            attention="attn1",
            feed_forwards=(("norm3_i", "ff_i"),),
        ),
    ),
    blocks_of=blocks_of,
    embedders=("x_embedder", "pe_embedder", "caption_projection"),
    shapes_alone=shapes_alone,
    published={
        "HiDream-ai/HiDream-I1-Full": {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 16,
            "num_single_layers": 32,
            "attention_head_dim": 128,
            "num_attention_heads": 20,
            "caption_channels": [4096, 4096],
            "text_emb_dim": 2048,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": [64, 32, 32],
            "max_resolution": [128, 128],
            # The last blocks all read the last layer.
            "llama_layers": [min(block, _LLAMA_LAYERS - 1) for block in range(16 + 32)],
        },
    },
    guidance=None,
    inputs=inputs,
)
