"""MagCache: Magnitude-Aware Cache (Ma et al., arXiv 2506.09045) as diffusers has it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from diffusers import MagCacheConfig

from baselines.library import DiffusersCache
from baselines.search import Search
from dpcache.calibration import Calibration
from dpcache.method import CalibratedRecipe
from dpcache.schedules import check_budget
from dpcache.statistics import Mean, Trajectories

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class MagnitudeRatios(Mean):
    """How the magnitude of the residual over all blocks changes from step to step, (T,): mean over tokens, prompts and
    guidance branches of |r_t| / |r_{t-1}|, 1 at the first step (the paper's Eq. 5)."""

    site: ClassVar[str] = "residual"

    def measure(self, batch: Trajectories, branch: str) -> np.ndarray:
        norms = torch.stack([step.float().norm(dim=-1).cpu() for step in batch.features[branch]])
        ratios = norms[1:] / (norms[:-1] + 1e-8)
        return np.concatenate([[1.0], ratios.flatten(1).mean(1).numpy()])


@dataclass(frozen=True, eq=False)
class MagCache(DiffusersCache):
    """The residual over all blocks is reused while the error that its magnitude's known decay adds up to is small."""

    threshold: float
    ratios: Sequence[float]
    retention: float
    max_skip: int

    def config(self, pipe: "DiffusionPipeline") -> MagCacheConfig:
        return MagCacheConfig(
            self.threshold, self.max_skip, self.retention, self.num_inference_steps, list(self.ratios)
        )


@dataclass(frozen=True)
class Measured(CalibratedRecipe):
    """The recipe: measures the ratios and searches for the threshold, unless these are given.

    Args: see `magcache`.
    """

    budget: int
    num_inference_steps: int
    threshold: float | None
    ratios: Sequence[float] | None
    retention: float
    max_skip: int
    example: ClassVar[None] = None

    @property
    def statistics(self) -> tuple[MagnitudeRatios, ...]:
        return (MagnitudeRatios(),) if self.ratios is None else ()

    def make(self, threshold: float, ratios: Sequence[float]) -> MagCache:
        settings = {"mag_ratios": list(ratios), "retention_ratio": self.retention, "max_skip_steps": self.max_skip}
        return MagCache(self.num_inference_steps, threshold, ratios, self.retention, self.max_skip, decided=settings)

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> MagCache:
        ratios = calibration[MagnitudeRatios()].tolist() if self.ratios is None else self.ratios
        if self.threshold is not None:
            return self.make(self.threshold, ratios)
        make = partial(self.make, ratios=ratios)
        return Search(make, self.budget, self.num_inference_steps, first=0.06).fit(pipe, calibration)


def magcache(
    budget: int,
    num_inference_steps: int,
    threshold: float | None = None,
    ratios: Sequence[float] | None = None,
    retention: float | None = None,
    max_skip: int | None = None,
) -> MagCache | Measured:
    """The residual over all blocks is reused while the error that its magnitude's known decay adds up to is small.

    diffusers' defaults, a fifth of all steps computed first and 3 skipped in a row at most, spend 20 steps of 50 and
    more. So that any budget can be reached, a fifth of the budget is computed first, and up to twice the mean gap may
    be skipped in a row.

    Args:
        threshold: the paper's delta; None: the one that spends the budget.
        ratios: magnitudes of the residual against the step before, one per step; None: measured in calibration.
        retention: share of all steps that is computed first; None: as above.
        max_skip: the paper's K; None: as above.
    """
    check_budget(budget, num_inference_steps)
    recipe = Measured(
        budget,
        num_inference_steps,
        threshold,
        ratios,
        0.2 * budget / num_inference_steps if retention is None else retention,
        max(3, 2 * num_inference_steps // budget) if max_skip is None else max_skip,
    )
    return recipe if threshold is None or ratios is None else recipe.make(threshold, ratios)
