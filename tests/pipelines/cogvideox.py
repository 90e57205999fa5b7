"""CogVideoX."""

from functools import partial

import diffusers

from helpers import families
from pipelines.parts import NEGATIVE, TEXT, image, video
from pipelines.records import Case, assemble, pipeline


def cogvideox(kind, scheduler="CogVideoXDDIMScheduler", **sizes):
    """As the 2B model, without rotary embeddings."""
    small = {"use_rotary_positional_embeddings": False, "attention_head_dim": 8, "max_text_seq_length": 7}
    parts = families.cogvideox(getattr(diffusers, scheduler), **small | sizes).components
    return assemble(kind, **parts)


def rotary(kind):
    """As the 5B model: rotary embeddings, and a scheduler that keeps its last prediction."""
    return assemble(kind, **families.cogvideox().components)


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
