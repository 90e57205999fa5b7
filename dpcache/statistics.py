"""What calibration can measure on full-step trajectories. A recipe names the statistics that it needs, and only those
are measured.

A statistic is a small frozen record. `Folded` ones look at the trajectories as they are made, one batch at a time, and
those at the same site share them. `Rerun` ones run the pipeline once more.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from dpcache.denoisers import denoiser
from dpcache.errors import SettingError
from dpcache.gram import gram
from dpcache.method import Method
from dpcache.pact import l1_cost
from dpcache.predictors import Reuse, short_names
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.sites import Blocks, transformer_blocks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dpcache.calibration import Calibration


@dataclass
class Trajectories:
    """Full-step trajectories of one batch, seen at one site.

    Attributes:
        features: of every guidance branch what the site keeps, (T, B, ...).
        inputs: of every guidance branch the model's input, (T, B, ...), at the sites `output` and `output_residual`.
        input_changes: of every guidance branch the relative change of the first block's modulated input against the
            step before, T numbers, at site=stack; empty where the model's modulated input is not known.
        prompts: how many are in the batch. Guided pipelines may stack their branches in B, one after the other.
        share: of the batch in all prompts.
        first: whether it is the calibration's first batch.
        device: where to compute.
    """

    features: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    input_changes: dict[str, list[float]]
    prompts: int
    share: float
    first: bool
    device: torch.device


class Statistic:
    """Base of all statistics, each a frozen dataclass.

    Attributes:
        version: to be raised when the statistic's numbers change their meaning, so that old files are not taken for
            new ones.
        needs: other statistics, which are measured before.
    """

    version: ClassVar[int] = 1

    @property
    def needs(self) -> "tuple[Statistic, ...]":
        return ()

    @property
    def name(self) -> str:
        """What it is called in files: kind, version and settings."""
        settings = [f"{field.name}={getattr(self, field.name)}" for field in fields(self)]
        return " ".join([f"{type(self).__name__}.{self.version}", *settings])


class Folded(Statistic, ABC):
    """Looks at one batch of trajectories after the other.

    Attributes:
        site: where it looks: a site's short name.
    """

    site: str

    @abstractmethod
    def fold(self, total: np.ndarray | None, batch: Trajectories) -> np.ndarray:
        """`total`, None before the first batch, with this batch added."""


class Mean(Folded):
    """A mean over prompts and guidance branches."""

    @abstractmethod
    def measure(self, batch: Trajectories, branch: str) -> np.ndarray:
        """Of one guidance branch of a batch, mean over its prompts."""

    def fold(self, total: np.ndarray | None, batch: Trajectories) -> np.ndarray:
        share = batch.share / len(batch.features)
        for branch in batch.features:
            part = share * self.measure(batch, branch)
            total = part if total is None else total + part
        return total


class Rerun(Statistic, ABC):
    """Runs the pipeline on the calibration's prompts."""

    @abstractmethod
    def measure(self, pipe: "DiffusionPipeline", calibration: "Calibration") -> np.ndarray:
        """`calibration` holds what the statistic `needs`, and its `rerun` counts what the runs cost."""


@dataclass(frozen=True)
class L1Cost(Mean):
    """The path-aware cost tensor (T, T+1, T+1), float64 (arXiv 2602.22654, Eq. 6), see `dpcache.pact.l1_cost`. Of the
    last block it takes the image stream, which alone reaches the output (the authors' code adds the text).

    Args:
        predictor: short name of the one whose errors it holds; taylor2 is the paper's.
        path_aware, cumulative: the paper's ablation.
    """

    site: str = "stack"
    predictor: str = "taylor2"
    path_aware: bool = True
    cumulative: bool = True

    def measure(self, batch: Trajectories, branch: str) -> np.ndarray:
        return l1_cost(
            batch.features[branch],
            short_names()[self.predictor](),
            path_aware=self.path_aware,
            cumulative=self.cumulative,
            device=batch.device,
        )


@dataclass(frozen=True)
class Gram(Mean):
    """The Gram matrix of the features, mean over prompts, guidance branches and elements (`dpcache.gram`): (T, T); at
    the sites `output` and `output_residual` (2T, 2T), features and then the model's inputs, or (T, T) where the two
    differ in shape. At `output_residual` the condition that image-to-video models append to their input is left out.
    """

    site: str

    def measure(self, batch: Trajectories, branch: str) -> np.ndarray:
        rows, inputs = batch.features[branch], batch.inputs.get(branch)
        if inputs is not None and self.site == "output_residual":
            inputs = inputs[:, :, : rows.shape[2]]
        joined = [rows, inputs] if inputs is not None and inputs.shape == rows.shape else rows
        return gram(joined, device=batch.device)


@dataclass(frozen=True)
class InputChange(Folded):
    """Relative L1 change of the first block's modulated input against the step before (TeaCache, arXiv 2411.19108, Eq.
    4), of the first guidance branch: (n, T) for n batches, 0 at step 0; (0, T) where the model's modulated input is not
    known."""

    site: ClassVar[str] = "stack"

    def fold(self, total: np.ndarray | None, batch: Trajectories) -> np.ndarray:
        steps = len(next(iter(batch.features.values())))
        rows = np.reshape(np.array(list(batch.input_changes.values())[:1], dtype=float), (-1, steps))
        return rows if total is None else np.concatenate([total, rows])


@dataclass(frozen=True)
class OutputChange(Folded):
    """Relative L1 change of the feature against the step before, of the first guidance branch: (n, T) for n batches, 0
    at step 0."""

    site: str = "stack"

    def fold(self, total: np.ndarray | None, batch: Trajectories) -> np.ndarray:
        features = next(iter(batch.features.values()))
        changes = [0.0, *(relative_change(b.float(), a.float()).item() for a, b in pairwise(features))]
        row = np.array([changes])
        return row if total is None else np.concatenate([total, row])


@dataclass(frozen=True)
class BlockChanges(Rerun):
    """Of every block, the relative L1 change of what it adds to the image stream, from step to step: mean over steps,
    prompts and guidance branches, (blocks,)."""

    def measure(self, pipe: "DiffusionPipeline", calibration: "Calibration") -> np.ndarray:
        T, count = calibration.num_inference_steps, len(transformer_blocks(denoiser(pipe)))
        previous, changes = {}, defaultdict(list)

        def observe(branch, step, name, added):
            added = added[0] if isinstance(added, tuple) else added
            if step:
                changes[name].append(relative_change(added, previous[branch, name]).item())
            previous[branch, name] = added

        full = Method(EvenlySpaced(T, T), Blocks(range(count), apart=True), Reuse())
        calibration.rerun(pipe, full, observe=observe)
        return np.array([sum(changes[str(block)]) / len(changes[str(block)]) for block in range(count)])


@dataclass(frozen=True)
class Gain(Rerun):
    """How far the final latents move per unit of feature error at each step, (T,), mean 1.

    A run that skips one step alone and reuses the feature before it makes a known error there, |h_k - h_{k-1}| by the
    Gram matrix, and ends a measured distance from the full-step latents. Measured at `points` steps on the first
    `prompts` prompts, and interpolated on a logarithmic scale between them. It holds the scheduler's step size, the
    output layers' sensitivity and the sampler's own in one figure.
    """

    site: str
    points: int = 12
    prompts: int = 2

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (Gram(self.site),)

    def measure(self, pipe: "DiffusionPipeline", calibration: "Calibration") -> np.ndarray:
        G, T, prompts = calibration[Gram(self.site)], calibration.num_inference_steps, self.prompts
        steps = np.unique(np.linspace(1, T - 1, min(self.points, T - 1)).round().astype(int))
        moved = []
        for step in tqdm(steps, desc="measuring gains", unit="run", leave=False):
            method = Method(Schedule([s for s in range(T) if s != step], T), self.site, Reuse())
            latents, _ = calibration.rerun(pipe, method, prompts)
            moved.append(np.linalg.norm(latents - calibration.latents[:prompts]))
        error = np.sqrt(np.maximum(G[steps, steps] - 2 * G[steps, steps - 1] + G[steps - 1, steps - 1], 1e-12))
        gain = np.exp(np.interp(np.arange(T), steps, np.log(np.maximum(moved, 1e-12) / error)))
        return gain / gain.mean()


def relative_change(current: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """mean|current - previous| / mean|previous| (TeaCache, arXiv 2411.19108, Eq. 4)."""
    return (current - previous).abs().mean() / previous.abs().mean()


def of_one_pass(site: str = "stack") -> tuple[Statistic, ...]:
    """What `calibrate` measures unless it is told otherwise: all that takes no run beyond the trajectories at `site`.

    Raises SettingError for a site other than stack and output.
    """
    if site not in ("stack", "output"):
        raise SettingError(f"site={site}: calibration takes stack or output")
    changes = (InputChange(),) if site == "stack" else ()
    return (L1Cost(site), Gram(site), OutputChange(site), *changes)
