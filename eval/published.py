"""What a method's authors have published for a model, in place of a calibration: `method.NAME=published`.

`conf/published/MODEL.yaml` has a record for each method: its `settings`, the `source` where they stand, and the
`num_inference_steps` and `size` (rows x columns) with which its authors used them, null if they do not tell. A setting
that is a mapping has one value for each budget.
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
    """The settings of `method`, in which each `published` is replaced by the value that is published for `model`.

    If the number of steps differs from the authors', only lists of steps are refused. For other settings there is a
    warning: thresholds and polynomials do not belong to single steps, and diffusers takes MagCache's ratios from the
    nearest steps, as the authors do. There is also a warning if a setting that was published together with these has
    another value.

    Raises:
        SettingError: nothing is published for this model, budget or number of steps.
    """
    wanted = [name for name, value in settings.items() if value == "published"]
    if not wanted:
        return settings
    found = {name: _value(name, settings, model, method) for name in wanted}
    record, asked = records()[model][method], f"{method}: {', '.join(wanted)} published for"
    theirs, ours = record["num_inference_steps"], settings.num_inference_steps
    if theirs not in (None, ours):
        _warn(f"{asked} num_inference_steps={theirs}, used for {ours}: expect another speed")
    resolved = OmegaConf.merge(settings, found)
    for name, value in record["settings"].items():
        if not isinstance(value, dict) and resolved[name] not in (None, value):
            _warn(f"{asked} {name}={value}, used with {resolved[name]}: method.{name}=published takes it too")
    return resolved


def _value(name: str, settings: DictConfig, model: str, method: str):
    asked, T = f"method.{name}=published", settings.num_inference_steps
    having = [other for other, methods in records().items() if name in methods.get(method, {}).get("settings", ())]
    known = [other for other in having if (FOLDER.parent / "model" / f"{other}.yaml").exists()]
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
def _warn(line: str) -> None:
    """Once for each command."""
    log.warning(line)
