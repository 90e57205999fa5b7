"""The circumstances (model, steps, call) for which a calibration or a method was made, and the checks when it is
used."""

import hashlib
import inspect
import json
import logging
from ast import literal_eval
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from dpcache.denoisers import denoisers
from dpcache.errors import SettingError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dpcache.denoisers import Pipe

log = logging.getLogger(__name__)

_SHAPE = ("num_frames", "height", "width")


def _is_guidance(name: str) -> bool:
    return "guidance" in name or "cfg" in name


def fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits of the model's class, configuration, and the shape and a sample of every parameter and of every
    buffer that is saved. A text encoder's configuration also names the version of transformers, which is left out."""
    digest = hashlib.sha256(type(model).__name__.encode())
    config = getattr(model, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    config = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    saved = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]  # as of FLUX.2's VAE
    for name, tensor in sorted([*model.named_parameters(), *buffers]):
        values = tensor.detach().flatten()[:: max(tensor.numel() // 8, 1)][:8].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{values.tolist()}".encode())
    return digest.hexdigest()[:16]


def describe(pipe: "DiffusionPipeline", num_inference_steps: int, **call) -> dict[str, str]:
    """The circumstances under which a pipeline's samples and features stay the same, field by field."""
    shape, guidance, rest = {}, {}, {}
    for name, value in sorted(call.items()):
        kind = shape if name in _SHAPE else guidance if _is_guidance(name) else rest
        kind[name] = value
    return {
        "model": _models(pipe),
        "num_inference_steps": str(num_inference_steps),
        "scheduler": _scheduler(pipe.scheduler),
        "resolution": " x ".join(str(shape[name]) for name in _SHAPE if name in shape),
        "guidance": str(guidance),
        "call": str(rest),
        "dtype": _dtype(pipe),
    }


def _models(pipe) -> str:
    return ", ".join(f"{type(model).__name__} {fingerprint(model)}" for model in denoisers(pipe).values())


def _scheduler(scheduler) -> str:
    config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    return json.dumps({"class": type(scheduler).__name__} | config, sort_keys=True, default=str)


def _dtype(pipe) -> str:
    return str(next(iter(denoisers(pipe).values())).dtype).removeprefix("torch.")


def told_guidance(pipe: "DiffusionPipeline") -> dict[str, object]:
    """The guidance scales of the latest run of a pipeline, defaults included, as far as the pipeline tells them."""
    names = [name for name in inspect.signature(type(pipe).__call__).parameters if _is_guidance(name)]
    told = {name: getattr(pipe, name, None) for name in names}
    return {name: value for name, value in told.items() if value is not None}


def check_use(pipe: "Pipe", made_for: Mapping[str, str], what: str = "method") -> None:
    """Warn where a method (or another thing, named by `what`) was made for other weights than the pipeline's: another
    dtype, or a fine-tuned model. A model without a pipeline is checked too.

    Raises SettingError where it was made for another class of model or for another scheduler.
    """
    if "model" not in made_for:  # not known
        return
    models = _models(pipe)
    kinds, kinds_now = ([part.split()[0] for part in text.split(", ")] for text in (made_for["model"], models))
    if kinds != kinds_now:
        raise SettingError(f"this {what} was made for the model {made_for['model']}, this pipeline has {models}")
    scheduler = getattr(pipe, "scheduler", None)
    if hasattr(scheduler, "config") and made_for["scheduler"] != _scheduler(scheduler):
        made, found = json.loads(made_for["scheduler"]), json.loads(_scheduler(scheduler))
        differing = [
            f"{key}={made.get(key)}, this pipeline has {found.get(key)}"
            for key in sorted(made | found)
            if made.get(key) != found.get(key)
        ]
        raise SettingError(f"this {what} was made for a scheduler of {'; '.join(differing)}")
    if made_for["model"] != models:
        log.warning(
            "this %s was made for other weights (%s in %s; these are %s in %s): its quality may differ",
            *(what, made_for["model"], made_for["dtype"], models, _dtype(pipe)),
        )


def other_use(
    pipe: "Pipe",
    made_for: Mapping[str, str],
    input_shape: Sequence[int],
    branches: Sequence[str],
) -> list[str]:
    """A line for each way in which a run differs from what its method was made for: another resolution, other guidance
    branches, another guidance scale. Guidance scales are compared if the pipeline tells them; some do not."""
    made = literal_eval(made_for.get("guidance", "{}"))
    told = {name: getattr(pipe, name, None) for name in made}
    guidance = {name: value if told[name] in (None, value) else told[name] for name, value in made.items()}
    facts = (("input", list(input_shape)), ("branches", list(branches)), ("guidance", guidance))
    return [
        f"this method was made for the model's {what} {made_for[what]}, this run has {now}: its quality may differ"
        for what, now in facts
        if made_for.get(what, str(now)) != str(now)
    ]


def other_times(made_for: Mapping[str, str], timesteps: Sequence[float]) -> list[str]:
    """A line if a run's timesteps differ from those that its method was made for: because of custom timesteps, or a
    shift of the noise levels that is not in the configuration. A method with a grid of its own has another number of
    timesteps than its calibration; then nothing is compared."""
    made = literal_eval(made_for.get("timesteps", "[]"))
    if not made or len(made) != len(timesteps) or np.abs(np.subtract(made, timesteps)).max() <= 1e-3 * max(made):
        return []
    return [
        f"this method was made for the timesteps {made[0]:.4g}, {made[1 % len(made)]:.4g}, ..., {made[-1]:.4g}, this "
        f"run has {timesteps[0]:.4g}, {timesteps[1 % len(timesteps)]:.4g}, ..., {timesteps[-1]:.4g}: its quality may "
        "differ"
    ]
