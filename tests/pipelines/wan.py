"""Wan and what is made of it."""

import diffusers

from helpers import families
from pipelines.parts import image, video
from pipelines.records import Case, assemble, pipeline

_SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan(kind, **parts):
    return assemble(kind, **families.wan21_t2v().components | parts)


def vace(kind):
    transformer = diffusers.WanVACETransformer3DModel(**_SIZES, vace_layers=[0, 1], vace_in_channels=96)
    return wan(kind, transformer=transformer)


def image_to_video(kind, **parts):
    return assemble(kind, **families.wan21_i2v().components | parts)


def lucy(kind):
    return wan(kind, transformer=families.wan_transformer(in_channels=32))


def sky(kind):
    return wan(kind, transformer=diffusers.SkyReelsV2Transformer3DModel(**_SIZES))


def sky_image_to_video(kind):
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        **_SIZES | {"in_channels": 36}, image_dim=16, added_kv_proj_dim=24
    )
    return image_to_video(kind, transformer=transformer)


def two_experts(kind):
    """Wan2.2: the first for the noisier steps."""
    return wan(kind, transformer_2=families.wan_transformer(), boundary_ratio=0.8)


def two_experts_from_an_image(kind):
    """Wan2.2: the image goes to the latents alone."""
    parts = {"transformer": families.wan_transformer(in_channels=36), "image_encoder": None, "image_processor": None}
    parts["transformer_2"] = families.wan_transformer(in_channels=36)
    return image_to_video(kind, **parts, boundary_ratio=0.8)


def token_times(kind):
    """Wan2.2's TI2V."""
    return wan(kind, expand_timesteps=True)


_VIDEO = {"prompt": ["two boats"], "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 12}
_OFF = {"guidance_scale": 1.0}
_ON = {"negative_prompt": "an old clock at night", "guidance_scale": 5.0}


def _add(name, builder, call, **cases):
    call = {argument: value for argument, value in call.items() if value is not None}
    others = {case: Case(call | arguments, calls) for case, (arguments, calls) in cases.items()}
    pipeline(name, builder, plain=Case(call | _OFF, 1), guided=Case(call | _ON, 2), **others)


_IMAGE = {"image": image(32), "max_sequence_length": 512}  # attention takes all but the last 512 tokens for the image's
_CLIP = {"video": video(5, 32), "num_frames": None}

_add("WanPipeline", wan, _VIDEO)
_add("WanImageToVideoPipeline", image_to_video, _VIDEO | _IMAGE)
_add("WanVACEPipeline", vace, _VIDEO | {"prompt": "two boats"})
_add(
    "WanVideoToVideoPipeline",
    wan,
    _VIDEO | _CLIP | {"strength": 1.0},
    strength=(_ON | {"strength": 0.6}, 2),
)
_add("LucyEditPipeline", lucy, _VIDEO | {"video": video(5, 32)})
_add("SkyReelsV2Pipeline", sky, _VIDEO)
_add("SkyReelsV2ImageToVideoPipeline", sky_image_to_video, _VIDEO | _IMAGE)
_FORCING = _VIDEO | {"base_num_frames": 5}
_LONG = {"base_num_frames": 9, "num_frames": 17, "overlap_history": 5, "addnoise_condition": 0}
_CAUSAL = {"base_num_frames": 9, "num_frames": 9, "ar_step": 2, "causal_block_size": 1}
_add(
    "SkyReelsV2DiffusionForcingPipeline",
    sky,
    _FORCING,
    long=(_ON | _LONG, 2),
    causal=(_ON | _CAUSAL, None),
)
_add("SkyReelsV2DiffusionForcingImageToVideoPipeline", sky, _FORCING | {"image": image(32)})
_add(
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    sky,
    _FORCING | {"video": video(5, 32), "num_frames": 9, "overlap_history": 5, "base_num_frames": 9},
)
_add("WanPipeline, two transformers", two_experts, _VIDEO)
_add("WanImageToVideoPipeline, two transformers", two_experts_from_an_image, _VIDEO | {"image": image(32)})
for _name, _more in {"WanPipeline": {}, "WanImageToVideoPipeline": {"image": image(32)}}.items():
    _add(f"{_name}, token times", token_times, _VIDEO | _more)
