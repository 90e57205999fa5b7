"""LTX-2, which denoises a video and its sound together."""

from collections.abc import Mapping

import torch

from dpcache.arguments import argument
from dpcache.models.family import Block, Family, Request, Streams


def branches(call: Mapping) -> list[str]:
    """Text and no text in one call, and one more for each further kind of guidance."""
    found = ["cond_uncond"]
    if max(call.get("stg_scale", 1.0), call.get("audio_stg_scale", 1.0)) > 0:
        found.append("uncond_stg")
    if max(call.get("modality_scale", 3.0), call.get("audio_modality_scale", 3.0)) > 1:
        found.append("uncond_modality")
    return found


def inputs(request: Request) -> dict:
    """With guidance by the text the batch of the first call holds every sample twice. A second of sound is 25 latents
    of 10 ms x 4, at 16 kHz."""
    config, call, batch = request.config, request.call, request.batch
    guided = max(call.get("guidance_scale", 3.0), call.get("audio_guidance_scale", 7.0)) > 1
    if guided and request.branch == "cond_uncond":
        batch *= 2
    rate, words = call.get("frame_rate", 24.0), call.get("max_sequence_length", 1024)
    second = config["audio_sampling_rate"] / config["audio_hop_length"] / config["audio_scale_factor"]
    sound, frames, (rows, columns) = round(call["num_frames"] / rate * second), request.frames(), request.size()
    width = config["caption_channels"] if config.get("use_prompt_embeddings", True) else config["cross_attention_dim"]
    time = request.time()[:1].expand(batch)
    return {
        "hidden_states": request.random(batch, frames * rows * columns, config["in_channels"]),
        "audio_hidden_states": request.random(batch, sound, config["audio_in_channels"]),
        "encoder_hidden_states": request.random(batch, words, width),
        "audio_encoder_hidden_states": request.random(batch, words, width),
        "timestep": time,
        "sigma": time,
        "encoder_attention_mask": torch.ones(batch, words, dtype=torch.long, device=request.device),
        "audio_encoder_attention_mask": torch.ones(batch, words, dtype=torch.long, device=request.device),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "fps": rate,
        "audio_num_frames": sound,
    }


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    """The video's."""
    stream, times = argument(0, "hidden_states", args, kwargs), argument(4, "temb", args, kwargs)
    shift, scale = block.get_mod_params(block.scale_shift_table, times, len(stream))[:2]
    return block.norm1(stream) * (1 + scale) + shift


FAMILY = Family(
    "LTX2VideoTransformer3DModel",
    blocks=(
        Block(
            "LTX2VideoTransformerBlock",
            streams=Streams(other="audio_hidden_states", other_index=1, both=True),
            kept=(
                "attn1",
                "attn2",
                "ff",
                "audio_attn1",
                "audio_attn2",
                "audio_ff",
                "audio_to_video_attn",
                "video_to_audio_attn",
            ),
            attention="attn1",
            modulated_input=modulated_input,
        ),
    ),
    embedders=("proj_in", "audio_proj_in", "rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope"),
    published={
        "Lightricks/LTX-2": {
            "in_channels": 128,
            "out_channels": 128,
            "num_attention_heads": 32,
            "attention_head_dim": 128,
            "cross_attention_dim": 4096,
            "audio_in_channels": 128,
            "audio_out_channels": 128,
            "audio_num_attention_heads": 32,
            "audio_attention_head_dim": 64,
            "audio_cross_attention_dim": 2048,
            "audio_scale_factor": 4,
            "audio_sampling_rate": 16000,
            "audio_hop_length": 160,
            "num_layers": 48,
            "caption_channels": 3840,
            "rope_type": "split",
        },
    },
    spatial=32,
    temporal=8,
    guidance=branches,
    inputs=inputs,
)
