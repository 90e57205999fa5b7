"""CogVideoX."""

from functools import partial

import diffusers

from pipelines.parts import NEGATIVE, TEXT, image, video
from pipelines.records import Case, assemble, pipeline


def cogvideox(kind, scheduler="CogVideoXDDIMScheduler", **sizes):
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 7,
        }
        | sizes
    )
    return assemble(kind, vae=vae, transformer=transformer, scheduler=getattr(diffusers, scheduler)())


def rotary(kind):
    """As the 5B model: rotary embeddings, and a scheduler that keeps its last prediction."""
    return cogvideox(kind, "CogVideoXDPMScheduler", use_rotary_positional_embeddings=True, attention_head_dim=16)


def _add(name, builder, more, **cases):
    call = TEXT | {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 7} | more
    call = {argument: value for argument, value in call.items() if value is not None}
    guided = call | NEGATIVE | {"guidance_scale": 6.0}
    others = {case: Case(guided | arguments, 1) for case, arguments in cases.items()}
    pipeline(name, builder, plain=Case(call | {"guidance_scale": 1.0}, 1), guided=Case(guided, 1), **others)


_with_condition = partial(cogvideox, in_channels=8)
_CLIP = {"num_frames": None, "max_sequence_length": None}

_add("CogVideoXPipeline", rotary, {})
_add("CogVideoXImageToVideoPipeline", _with_condition, {"image": image(32)})
_add(
    "CogVideoXVideoToVideoPipeline",
    cogvideox,
    _CLIP | {"video": video(9, 32), "strength": 1.0},
    strength={"strength": 0.6},
)
_add("CogVideoXFunControlPipeline", _with_condition, _CLIP | {"control_video": video(9, 32)})
