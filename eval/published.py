"""What a method's authors have published for a model, in place of a calibration: `method.NAME=published`.

`conf/published/MODEL.yaml` has a record for each method: its `settings`, the `source` where they stand, and the
`num_inference_steps` and `size` (rows x columns) that its authors ran them with, null where they do not tell. A setting
that is a mapping has a list of computed steps for each budget.
"""

import logging
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dpcache.errors import SettingError

log = logging.getLogger("run")

FOLDER = Path(__file__).parents[1] / "conf" / "published"


@cache
def records() -> dict[str, dict[str, dict]]:
    """All records, by model and method."""
    return {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in sorted(FOLDER.glob("*.yaml"))}


def resolve(settings: DictConfig, model: str, method: str) -> DictConfig:
    """The settings of `method` with what is published for `model` where they say `published`.

    Other numbers of steps than its authors' are only refused for lists of steps: thresholds and polynomials do not
    depend on it, and diffusers takes MagCache's ratios from the nearest steps, as their authors do.

    Raises:
        SettingError: nothing is published for this model, budget or number of steps.
    """
    wanted = [name for name, value in settings.items() if value == "published"]
    if not wanted:
        return settings
    found = {name: _value(name, settings, model, method) for name in wanted}
    _tell(records()[model][method]["num_inference_steps"], settings.num_inference_steps, method, ", ".join(wanted))
    return OmegaConf.merge(settings, found)


def _value(name: str, settings: DictConfig, model: str, method: str):
    asked, T = f"method.{name}=published", settings.num_inference_steps
    known = [other for other, methods in records().items() if name in methods.get(method, {}).get("settings", ())]
    if model not in known:
        only = f"only for model={','.join(known)}" if known else "nor for any other model"
        raise SettingError(f"{asked}: none is known for model={model}, {only}")
    record = records()[model][method]
    value = record["settings"][name]
    if not isinstance(value, dict):
        return value
    if record["num_inference_steps"] != T:
        raise SettingError(f"{asked} takes num_inference_steps={record['num_inference_steps']}, not {T}")
    if settings.budget not in value:
        raise SettingError(f"{asked} takes one of budget={','.join(map(str, value))}, not {settings.budget}")
    return value[settings.budget]


@cache
def _tell(theirs: int | None, ours: int, method: str, names: str) -> None:
    """Once for each command."""
    if theirs not in (None, ours):
        log.warning(
            "%s: %s published for num_inference_steps=%d, used for %d: expect another speed",
            method,
            names,
            theirs,
            ours,
        )
