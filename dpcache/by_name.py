"""A method by its short name, calibrated, built and enabled in one call."""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from dpcache.calibration import calibrate
from dpcache.errors import SettingError
from dpcache.method import Recipe, Runnable, enable
from dpcache.quality import find_budget

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

METHODS = Path(__file__).parents[1] / "conf" / "method"


def recipe(name: str, budget: int, num_inference_steps: int = 50, **settings) -> Recipe:
    """The recipe that `conf/method/NAME.yaml` describes.

    Args:
        settings: of the method, in place of those in the file.

    Raises SettingError for a name or a setting that is not known.
    """
    from omegaconf import OmegaConf  # here: the rest of the library does without

    found = OmegaConf.create({"budget": budget, "num_inference_steps": num_inference_steps, "method": _settings(name)})
    values = OmegaConf.to_container(found, resolve=True)["method"]
    module, _, function = values.pop("_target_").rpartition(".")
    if unknown := settings.keys() - values.keys():
        known = ", ".join(sorted(values.keys() - {"budget", "num_inference_steps"})) or "none"
        raise SettingError(f"method={name} has no setting {', '.join(sorted(unknown))}, but {known}")
    return getattr(import_module(module), function)(**{**values, **settings})


def _settings(name: str):
    """The settings under `method` in the file, merged over those of the files that it names as defaults."""
    from omegaconf import OmegaConf

    path = METHODS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in METHODS.glob("*.yaml")))
        raise SettingError(f"method={name} is not one of {known or 'any: the folder conf is not beside this package'}")
    own = OmegaConf.load(path)
    parts = [_settings(other) for other in own.get("defaults", []) if other != "_self_"]
    return OmegaConf.merge(*parts, own.method)


def accelerate(
    pipe: "DiffusionPipeline",
    name: str,
    budget: int | None = None,
    prompts: Sequence[str] = (),
    num_inference_steps: int = 50,
    seeds: Sequence[int] | None = None,
    batch_size: int = 1,
    settings: dict | None = None,
    quality: float | None = None,
    **call,
) -> Runnable:
    """Calibrate a method for a pipeline, build it and enable it.

    Args:
        name: as on the command line: "dpcache_lsq", "taylorseer", ...
        budget: computed steps of `num_inference_steps`.
        quality: in place of a budget: the PSNR in dB against the full-step images, mean over `prompts`, that is to be
            reached. The smallest such budget is searched for, see `dpcache.quality.find_budget`.
        prompts: about ten, for calibration; a method without calibration needs none if a budget is given.
        seeds, batch_size: of calibration, see `dpcache.calibrate`.
        settings: of the method, in place of those in its file.
        call: the arguments that the pipeline will be called with (height, width, guidance_scale, ...).

    Returns:
        The method, which can be saved. `dpcache.disable(pipe)` takes it off again.

    Raises SettingError for a name, budget or setting that is not known or does not fit the model.
    """
    if (budget is None) == (quality is None):
        raise SettingError(f"budget={budget} and quality={quality}: give one of the two")
    make = partial(recipe, name, num_inference_steps=num_inference_steps, **(settings or {}))
    made = make(num_inference_steps if budget is None else budget)
    if made.statistics is None and quality is None:
        method = made.build(pipe, None)
    elif not prompts:
        why = "is calibrated" if quality is None else f"is tried for quality={quality:g}"
        raise SettingError(f"method={name} {why}: give it some prompts=[...] that are like yours")
    else:
        calibration = calibrate(pipe, prompts, num_inference_steps, (), seeds=seeds, batch_size=batch_size, **call)
        if quality is not None:
            method = find_budget(pipe, make, calibration, quality).method
        else:
            calibration.measure(pipe, made.statistics)
            method = made.build(pipe, calibration)
    enable(pipe, method)
    return method
