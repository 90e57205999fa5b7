"""Types of the configuration, so that a wrong value ends before anything is loaded."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class ModelConfig:
    loader: str = MISSING
    path: str = MISSING
    dtype: str = MISSING
    device: str = "auto"
    offload: bool = False
    batch_size: int = 1
    prompts: str = MISSING
    call: dict[str, Any] = field(default_factory=dict)


@dataclass
class CalibrationConfig:
    path: str | None = None
    num_prompts: int = 10
    seed: int = 100000


@dataclass
class TimingConfig:
    repeats: int = 3
    batch_size: int | None = None


@dataclass
class EvalConfig:
    metrics: list[str] = MISSING
    timing: TimingConfig = field(default_factory=TimingConfig)


@dataclass
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = MISSING
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: Any = MISSING
    experiment: str | None = None
    budget: int = 10
    num_inference_steps: int = 50
    seed: int = 0
    num_prompts: int = 16
    prompts: str | None = None
    batch_size: int | None = None
    overwrite: bool = False
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    output_dir: str = "outputs"


ConfigStore.instance().store(name="schema", node=RunConfig)
