"""Types of the configuration, so that a wrong value ends before anything is loaded, and the run folder's name."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class MetricsConfig:
    """What the metrics of `conf/eval/` use for a model."""

    clip_model: str | None = "ViT-L-14"
    clip_pretrained: str | None = "openai"
    fid_reference: str | None = None
    image_reward_weights: str | None = None


@dataclass
class ModelConfig:
    loader: str = "dpcache.models.pretrained.load"
    path: str = MISSING
    dtype: str = MISSING
    device: str = "auto"
    offload: bool = False
    vae_dtype: str | None = None
    vae_tiling: bool = False
    scheduler: dict[str, Any] = field(default_factory=lambda: {"name": None})
    batch_size: int = 1
    fps: int = 16
    prompts: str | None = MISSING
    images: list[str] = field(default_factory=list)
    call: dict[str, Any] = field(default_factory=dict)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


@dataclass
class CalibrationConfig:
    path: str | None = MISSING
    prompts: str | None = MISSING
    num_prompts: int = MISSING
    seed: int = MISSING


@dataclass
class TimingConfig:
    repeats: int = 3
    batch_size: int | None = None


@dataclass
class EvalConfig:
    metrics: list[str] = MISSING
    require_all: bool = False
    timing: TimingConfig = field(default_factory=TimingConfig)


class Group(Enum):
    """Kinds of methods in the order of the board: the plain alternatives to a cache; caches that reuse or forecast
    features at fixed steps, that decide their steps online, or plan them; those whose weights are trained; those that
    skip parts of steps; those of libraries; and methods without a record."""

    plain = "plain"
    reuse = "reuse"
    forecast = "forecast"
    online = "online"
    planned = "planned"
    learned = "learned"
    partial = "partial"
    library = "library"
    other = "other"


@dataclass
class About:
    """What the board says of a method: its title, the address of its paper, the paper's year, and its group.
    own_grid: its steps are not among the T steps of the others. reference: it computes every step, and the others are
    compared with its samples; one method says so. trial: settings with which a method that is trained for minutes takes
    seconds, to see that it works. later: settings that came after the first results, with the values at which they
    change nothing."""

    title: str = ""
    paper: str | None = None
    year: int | None = None
    group: Group = Group.other
    own_grid: bool = False
    reference: bool = False
    trial: dict[str, Any] = field(default_factory=dict)
    later: dict[str, Any] = field(default_factory=dict)


class Stage(Enum):
    """run: sample and evaluate. calibrate: only calibrate and build the method. eval: score finished run folders
    again."""

    run = "run"
    calibrate = "calibrate"
    eval = "eval"


@dataclass
class ReferenceConfig:
    num_inference_steps: int | None = MISSING


@dataclass
class RunConfig:
    """All settings of a run. A setting that is MISSING here has its default in `conf/config.yaml`, or in a file of its
    group."""

    stage: Stage = MISSING
    dir: str | None = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    about: About = field(default_factory=About)
    method: Any = MISSING
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: Any = MISSING
    budget: int = MISSING
    quality: float | None = MISSING
    quality_metric: str | None = MISSING
    num_inference_steps: int = MISSING
    seed: int = MISSING
    num_prompts: int = MISSING
    prompts: str | None = MISSING
    batch_size: int | None = MISSING
    overwrite: bool = MISSING
    dry_run: bool | None = MISSING
    label: str | None = MISSING
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    output_dir: str = MISSING


ConfigStore.instance().store(name="schema", node=RunConfig)


LATER = {"quality": None, "quality_metric": None, "reference": {"num_inference_steps": None}}
"""Settings that were added after the first results, as they are where nobody sets them."""
LATER_OF_MODELS = {"images": []}
"""The same of models. Those of methods stand in their records, see `About`."""


UNHASHED = ("about", "hydra", "logger", "output_dir", "overwrite", "dry_run", "label", "stage", "dir")
"""Settings that do not shape results, the board's record of the method among them."""


def config_hash(config: DictConfig) -> str:
    """12 hex digits of all settings that shape the results. Settings of later versions are left out where they are not
    set: a run keeps the name that it had before."""
    keys = [key for key in config if key not in UNHASHED]
    content = OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True)
    content = {key: value for key, value in content.items() if value != LATER.get(key, ())}
    content["model"] = {key: value for key, value in content["model"].items() if value != LATER_OF_MODELS.get(key, ())}
    later = config.about.later
    content["method"] = {key: value for key, value in content["method"].items() if value != later.get(key, ())}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def label(config: DictConfig, method: str, calibrated: bool, overrides: Iterable[str]) -> str:
    """The run's row on the board: `config.label`, else the method and what the command changed of it and, where it is
    calibrated, of its calibration. `overrides` as Hydra lists them."""
    telling = ("method.", "calibration.") if calibrated else ("method.",)
    changed = sorted(o.removeprefix("method.") for o in overrides if o.startswith(telling))
    return (config.label or "").strip() or " ".join([method, *changed])


def run_name(_root_: DictConfig) -> str:
    """Name of the run folder. The same command always has the same name, so that a killed run goes on where it was."""
    choices, c = _root_.hydra.runtime.choices, _root_
    if c.stage is Stage.eval:  # Hydra's notes on this command, beside the run folders
        return "../evaluations"
    if c.dry_run or c.stage is Stage.calibrate:
        return "../dry_runs"
    spent = f"K{c.budget}"
    if c.quality is not None:
        spent = f"{c.quality_metric}{c.quality:g}" if c.quality_metric else f"{c.quality:g}dB"
    return f"{choices.model}-{choices.method}-{spent}-T{c.num_inference_steps}-seed{c.seed}-{config_hash(_root_)}"


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
