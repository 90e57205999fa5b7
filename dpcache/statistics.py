"""What calibration can measure on full-step trajectories. A recipe names the statistics that it needs; only those are
measured.

A statistic is a small frozen dataclass. `Folded` statistics are computed from the trajectories while these are made,
one batch after the other; all of them at one site share the trajectories. `Rerun` statistics run the pipeline again.
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
        features: what the site keeps, by guidance branch, (T, B, ...).
        inputs: the model's input, by guidance branch, (T, B, ...), at the sites `output` and `output_residual`.
        input_changes: by guidance branch, T relative changes of the first block's modulated input from the step before,
            at site=stack; empty if the model's modulated input is not known.
        prompts: how many are in the batch. Guided pipelines may stack their branches in B, one after the other.
        share: the fraction of all prompts that is in this batch.
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
        version: raise it when the numbers change their meaning, so that old files are not taken for new ones.
        needs: other statistics that have to be measured before.
    """

    version: ClassVar[int] = 1

    @property
    def needs(self) -> "tuple[Statistic, ...]":
        return ()

    @property
    def name(self) -> str:
        """Its name in files: class, version and settings."""
        settings = [f"{field.name}={getattr(self, field.name)}" for field in fields(self)]
        return " ".join([f"{type(self).__name__}.{self.version}", *settings])


class Folded(Statistic, ABC):
    """A statistic that is accumulated over batches of trajectories.

    Attributes:
        site: short name of the site whose features it uses.
    """

    site: str

    @abstractmethod
    def fold(self, total: np.ndarray | None, batch: Trajectories) -> np.ndarray:
        """`total` with this batch added; `total` is None before the first batch."""


class Mean(Folded):
    """A mean over prompts and guidance branches."""

    @abstractmethod
    def measure(self, batch: Trajectories, branch: str) -> np.ndarray:
        """The statistic of one guidance branch of a batch, mean over the batch's prompts."""

    def fold(self, total: np.ndarray | None, batch: Trajectories) -> np.ndarray:
        share = batch.share / len(batch.features)
        for branch in batch.features:
            part = share * self.measure(batch, branch)
            total = part if total is None else total + part
        return total


class Rerun(Statistic, ABC):
    """A statistic that runs the pipeline on the calibration's prompts."""

    @abstractmethod
    def measure(self, pipe: "DiffusionPipeline", calibration: "Calibration") -> np.ndarray:
        """The statistic's array. `calibration` holds the statistics in `needs`; its `rerun` counts the cost of the
        runs."""


@dataclass(frozen=True)
class L1Cost(Mean):
    """The path-aware cost tensor (T, T+1, T+1), float64 (arXiv 2602.22654, Eq. 6), see `dpcache.pact.l1_cost`. The
    features are the image stream of the last block, because only this stream reaches the output (the authors' code adds
    the text).

    Args:
        predictor: short name of the predictor whose errors the tensor holds; taylor2 is the paper's.
        path_aware, cumulative: for the paper's ablation, see `l1_cost`.
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
    """For every block, the relative L1 change from step to step of what it adds to the image stream: mean over steps,
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
    Gram matrix, and ends a measured distance from the full-step latents. The gain is measured at `points` steps on the
    first `prompts` prompts, and interpolated on a logarithmic scale between these steps. It combines the scheduler's
    step size, the sensitivity of the output layers and the sensitivity of later steps in one number.
    """

    version: ClassVar[int] = 2

    site: str
    points: int = 12
    prompts: int = 2

    @property
    def needs(self) -> tuple[Statistic, ...]:
        return (Gram(self.site),)

    def measure(self, pipe: "DiffusionPipeline", calibration: "Calibration") -> np.ndarray:
        G, T, prompts = calibration[Gram(self.site)], calibration.num_inference_steps, self.prompts
        steps = np.unique(np.linspace(1, T - 1, min(self.points, T - 1)).round().astype(int))
        steps = np.setdiff1d(steps, calibration.switches)  # these cannot be skipped
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
    """The statistics that `calibrate` measures by default: all that need no run beyond the trajectories at `site`.

    Raises SettingError for a site other than stack and output.
    """
    if site not in ("stack", "output"):
        raise SettingError(f"site={site}: calibration takes stack or output")
    changes = (InputChange(),) if site == "stack" else ()
    return (L1Cost(site), Gram(site), OutputChange(site), *changes)
