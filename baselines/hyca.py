"""HyCa: Let Features Decide Their Own Solvers (Zheng et al., arXiv 2510.04188)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Multistep
from dpcache.schedules import EvenlySpaced, check_budget
from dpcache.statistics import Folded, Trajectories

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# The paper's pool (A.2.2, after a public reproduction): F_t+1 = F_t + a (F_t - F_t-1) + b (F_t-1 - F_t-2).
SOLVERS = {
    "rk2": (1 / 2, 1 / 2),
    "ab2": (3 / 2, -1 / 2),
    "taylor": (1.0, 0.0),
    "bdf2": (1 / 3, 0.0),
    "am": (31 / 24, -7 / 24),  # corrects ab2
}


@dataclass(frozen=True)
class Indicators(Folded):
    """`indicators` of the last block's output, (D, 6), on the first prompt's trajectory."""

    site: ClassVar[str] = "stack"

    def fold(self, total: np.ndarray | None, batch: Trajectories) -> np.ndarray:
        return indicators(first_prompt(batch)) if batch.first else total


@dataclass(frozen=True)
class NextStepErrors(Folded):
    """`next_step_errors` of the last block's output, (solvers, D), on the first prompt's trajectory."""

    site: ClassVar[str] = "stack"

    def fold(self, total: np.ndarray | None, batch: Trajectories) -> np.ndarray:
        return next_step_errors(first_prompt(batch)) if batch.first else total


def first_prompt(batch: Trajectories) -> torch.Tensor:
    """Features of the batch's first prompt, its guidance branches side by side, (T, N, D)."""
    parts = (kept.unflatten(1, (-1, batch.prompts))[:, :, :1] for kept in batch.features.values())
    return torch.cat([part.flatten(1, -2) for part in parts], 1)


@dataclass(frozen=True)
class HyCa(CalibratedRecipe):
    """The recipe: the channels of the last block's output are clustered by how they change in time. Each cluster has
    its own solver.

    Both are chosen on the first calibration prompt's full-step trajectory: k-means of six indicators, and of the
    solvers the one with the least squared error of the next step (Eq. 4). There is no public code of the authors. The
    paper's main text leaves several points open. Our choices are: the cached feature; the indicators' formulas (see
    `indicators`); two clusters, as in its figures; and slopes between computed steps (`Multistep`), with which the
    solvers work at any distance.
    """

    budget: int
    num_inference_steps: int
    warmup: int = 3
    clusters: int = 2
    statistics: ClassVar[tuple] = (Indicators(), NextStepErrors())

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps, self.warmup)
        if self.clusters < 1:
            raise SettingError(f"clusters={self.clusters} must be at least 1")
        if self.num_inference_steps < 4:
            raise SettingError(
                f"num_inference_steps={self.num_inference_steps}: the solvers are compared on at least 4 steps"
            )

    @property
    def example(self) -> Method:
        return Method(self._schedule(), "stack", Multistep(1.0, 0.0))

    def _schedule(self) -> EvenlySpaced:
        return EvenlySpaced(self.budget, self.num_inference_steps, self.warmup)

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        cluster = k_means(calibration[Indicators()], self.clusters)
        names, errors = list(SOLVERS), calibration[NextStepErrors()]
        chosen = [names[errors[:, cluster == c].mean(1).argmin()] for c in range(cluster.max() + 1)]
        predictor = Multistep(*np.array([SOLVERS[name] for name in chosen]).T[:, cluster])
        decided = {"solvers": chosen, "channels": np.bincount(cluster).tolist()}
        return Method(self._schedule(), "stack", predictor, decided)


def indicators(features: torch.Tensor, chunk: int = 64) -> np.ndarray:
    """How each channel of (T, N, D) features moves in time, (D, 6), on a logarithmic scale and standardized.

    The six that the paper's Fig. 3 names: the mean size of the first and of the second difference, energy, jerk ratio
    (third over second difference), curvature ratio (second over first), spectral flatness (geometric over arithmetic
    mean of the power spectrum without its constant).
    """
    total = 0.0
    for part in features.split(chunk, dim=1):
        x = part.float().cpu()
        power = torch.fft.rfft(x, dim=0)[1:].abs().square().clamp_min(1e-20)
        flatness = power.log().mean(0).exp() / power.mean(0)
        rows = [*(x.diff(n=n, dim=0).abs().mean(0) for n in (1, 2, 3)), x.square().mean(0), flatness]
        total = total + torch.stack(rows).double().sum(1)
    first, second, third, energy, flatness = np.log(total.numpy() / features.shape[1] + 1e-20)
    rows = np.stack([first, second, energy, third - second, second - first, flatness], 1)
    return (rows - rows.mean(0)) / np.maximum(rows.std(0), 1e-12)


def next_step_errors(features: torch.Tensor, chunk: int = 64) -> np.ndarray:
    """Mean squared error of each solver's next step for each channel of (T, N, D) features, (solvers, D)."""
    total = 0.0
    for part in features.split(chunk, dim=1):
        x = part.float().cpu()
        latest, before, moved = x[2:-1] - x[1:-2], x[1:-2] - x[:-3], x[3:] - x[2:-1]
        errors = [(a * latest + b * before - moved).square().mean(0) for a, b in SOLVERS.values()]
        total = total + torch.stack(errors).double().sum(1)
    return total.numpy() / features.shape[1]


def k_means(rows: np.ndarray, clusters: int, iterations: int = 100) -> np.ndarray:
    """The cluster of each row, numbered without gaps. The first centers are rows far from each other, without
    randomness."""
    centers = rows[[np.square(rows - rows.mean(0)).sum(1).argmax()]]
    while len(centers) < clusters:
        distance = np.square(rows[:, None] - centers).sum(-1).min(1)
        centers = np.vstack([centers, rows[distance.argmax()]])
    for _ in range(iterations):
        cluster = np.square(rows[:, None] - centers).sum(-1).argmin(1)
        cluster = np.unique(cluster, return_inverse=True)[1]
        moved = np.stack([rows[cluster == c].mean(0) for c in range(cluster.max() + 1)])
        if moved.shape == centers.shape and np.allclose(moved, centers):
            break
        centers = moved
    return cluster
