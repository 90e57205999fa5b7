"""MagCache: Magnitude-Aware Cache (Ma et al., arXiv 2506.09045) as diffusers has it."""

import torch
from diffusers import MagCacheConfig

from baselines.library import DiffusersCache
from dpcache.calibration import record
from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced


class MagCache(DiffusersCache):
    """The residual over all blocks is reused while the error that its magnitude's known decay adds up to is small.

    diffusers' defaults, a fifth of all steps computed first and 3 skipped in a row at most, spend 20 steps of 50 and
    more. So that any budget can be had, the fifth is of the budget, and twice the mean gap may be skipped in a row.

    Args:
        threshold: the paper's delta; None: the one that spends the budget.
        ratios: magnitudes of the residual against the step before, one per step; None: measured in calibration.
        retention: share of all steps that is computed first; None: as above.
        max_skip: the paper's K; None: as above.
    """

    def __init__(
        self,
        budget: int,
        num_inference_steps: int,
        threshold: float | None = None,
        ratios: list[float] | None = None,
        retention: float | None = None,
        max_skip: int | None = None,
    ):
        super().__init__(budget, num_inference_steps)
        self.threshold, self.ratios = threshold, None if ratios is None else list(ratios)
        self.retention = 0.2 * budget / num_inference_steps if retention is None else retention
        self.max_skip = max(3, 2 * num_inference_steps // budget) if max_skip is None else max_skip
        self.needs_calibration = threshold is None or ratios is None

    def prepare(self, pipe, calibration=None):
        if self.ratios is None:
            self.ratios = measure_ratios(pipe, calibration)
        self.settled = {"mag_ratios": self.ratios, "retention_ratio": self.retention, "max_skip_steps": self.max_skip}
        if self.threshold is None:
            self.spend(pipe, calibration, "threshold", first=0.06)

    def config(self, pipe):
        return MagCacheConfig(self.threshold, self.max_skip, self.retention, self.num_inference_steps, self.ratios)


def measure_ratios(pipe, calibration) -> list[float]:
    """How the residual's magnitude changes from step to step on the calibration prompts' full-step trajectories: mean
    over tokens, samples and guidance branches of |r_t| / |r_{t-1}|, 1 at the first step (the paper's Eq. 5)."""
    T = int(calibration.made_for["num_inference_steps"])
    method, total, prompts = Method(EvenlySpaced(T, T), "residual", Reuse()), torch.zeros(T - 1), 0
    for batch in calibration.batches():
        branches = record(pipe, method, *batch, **calibration.made_from["call"])[1].values()
        for kept in branches:
            norms = torch.stack([step.float().norm(dim=-1).cpu() for step in kept["stack"]])
            ratios = norms[1:] / (norms[:-1] + 1e-8)
            total += len(batch[0]) / len(branches) * ratios.flatten(1).mean(1)
        prompts += len(batch[0])
    return [1.0, *(total / prompts).tolist()]
