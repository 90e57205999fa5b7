"""For which model, steps and call something was made: calibrations and methods remember it."""

import hashlib
import json
import logging
from ast import literal_eval
from collections.abc import Mapping, Sequence

import torch

from dpcache.denoisers import denoisers
from dpcache.errors import SettingError

log = logging.getLogger(__name__)

_SHAPE = ("num_frames", "height", "width")


def fingerprint(transformer: torch.nn.Module) -> str:
    """16 hex digits of the model's class, configuration, parameter shapes and a sample of every parameter."""
    digest = hashlib.sha256(type(transformer).__name__.encode())
    config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(transformer.named_parameters()):
        values = parameter.detach().flatten()[:: max(parameter.numel() // 8, 1)][:8].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{values.tolist()}".encode())
    return digest.hexdigest()[:16]


def describe(pipe, num_inference_steps: int, **call) -> dict[str, str]:
    """The circumstances under which a pipeline's samples and features stay the same, field by field."""
    models = list(denoisers(pipe).values())
    shape, guidance, rest = {}, {}, {}
    for name, value in sorted(call.items()):
        kind = shape if name in _SHAPE else guidance if "guidance" in name or "cfg" in name else rest
        kind[name] = value
    scheduler = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    return {
        "model": ", ".join(f"{type(model).__name__} {fingerprint(model)}" for model in models),
        "num_inference_steps": str(num_inference_steps),
        "scheduler": json.dumps({"class": type(pipe.scheduler).__name__} | scheduler, sort_keys=True, default=str),
        "resolution": " x ".join(str(shape[name]) for name in _SHAPE if name in shape),
        "guidance": str(guidance),
        "call": str(rest),
        "dtype": str(models[0].dtype).removeprefix("torch."),
    }


def check_use(pipe, made_for: Mapping[str, str]) -> None:
    """Warn where a method was made for other weights than the pipeline's: another dtype, or a fine-tuned model.

    Raises SettingError where it was made for another class of model or for another scheduler.
    """
    if not made_for or getattr(pipe, "scheduler", None) is None:
        return
    now = describe(pipe, int(made_for["num_inference_steps"]))
    kinds, kinds_now = ([part.split()[0] for part in text.split(", ")] for text in (made_for["model"], now["model"]))
    if kinds != kinds_now:
        raise SettingError(f"this method was made for the model {made_for['model']}, this pipeline has {now['model']}")
    if made_for["scheduler"] != now["scheduler"]:
        made, found = json.loads(made_for["scheduler"]), json.loads(now["scheduler"])
        differing = [
            f"{key}={made.get(key)}, this pipeline has {found.get(key)}"
            for key in sorted(made | found)
            if made.get(key) != found.get(key)
        ]
        raise SettingError(f"this method was made for a scheduler of {'; '.join(differing)}")
    if made_for["model"] != now["model"]:
        log.warning(
            "this method was made for other weights (%s in %s; these are %s in %s): its quality may differ",
            *(made_for["model"], made_for["dtype"], now["model"], now["dtype"]),
        )


def warn_of_other_use(pipe, made_for: Mapping[str, str], input_shape: Sequence[int], branches: Sequence[str]) -> None:
    """Warn where a method runs at another resolution, with other guidance branches, or at another guidance scale than
    it was made for. Scales are those that the pipeline tells; some tell none."""
    made = literal_eval(made_for.get("guidance", "{}"))
    told = {name: getattr(pipe, name, None) for name in made}
    guidance = {name: value if told[name] in (None, value) else told[name] for name, value in made.items()}
    for what, now in (("input", list(input_shape)), ("branches", list(branches)), ("guidance", guidance)):
        if made_for.get(what, str(now)) != str(now):
            log.warning(
                "this method was made for the model's %s %s, this run has %s: its quality may differ",
                *(what, made_for[what], now),
            )
