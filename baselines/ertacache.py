"""ERTACache: Error Rectification and Timesteps Adjustment for Efficient Diffusion (Peng et al., arXiv 2508.21091)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from dpcache.calibration import Calibration
from dpcache.lsq import FittedWeights
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Schedule, check_budget
from dpcache.statistics import Gram, Mean, Trajectories

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class ResidualErrors(Mean):
    """|D_c - D_s|_1 / |D_s|_1, (T, T), row c, column s, for D, what the model adds to its input: mean over prompts and
    guidance branches."""

    site: ClassVar[str] = "output_residual"

    def measure(self, batch: Trajectories, branch: str) -> np.ndarray:
        rows = batch.features[branch].float().flatten(2).transpose(0, 1)
        distances = torch.cdist(rows, rows, p=1) / rows.abs().sum(-1)[:, None]
        return distances.mean(0).double().cpu().numpy()


@dataclass(frozen=True)
class ERTACache(CalibratedRecipe):
    """The recipe: what the model adds to its input is reused at skipped steps, and rectified. An offline profile gives
    the computed steps.

    A step s is skipped while |D_c - D_s|_1 / |D_s|_1 < threshold, where D = v - x and c is the last computed step; the
    left side is the mean over prompts and guidance branches on full-step trajectories. The reused prediction v~ = x_s +
    D_c has the error v~ - v. This error is estimated as a v~, with a fitted by least squares at every skipped step, and
    subtracted. This is the paper's closed form without its constant, which latents of mean zero do not need.

    The authors' code, bytedance/ERTACache, is public but could not be obtained. The paper's third part, which changes
    the solver's step sizes where a prediction is reused, is left out, because two points are open: the formula of its
    correction coefficient, on which our sources disagree, and how the following steps compensate for the change, so
    that the sampler ends at its last time. `baselines.solver.OtherScheduler` could take such steps.

    Args:
        threshold: the paper's lambda; None: the lowest that does not exceed the budget.
        rectify: False: reuse alone.
    """

    budget: int
    num_inference_steps: int
    threshold: float | None = None
    rectify: bool = True

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps)

    @property
    def statistics(self) -> tuple[Mean, ...]:
        return (ResidualErrors(), Gram(ResidualErrors.site)) if self.rectify else (ResidualErrors(),)

    @property
    def example(self) -> Method:
        return Method(EvenlySpaced(self.budget, self.num_inference_steps), ResidualErrors.site, Reuse())

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        errors, threshold, switches = calibration[ResidualErrors()], self.threshold, calibration.switches
        if threshold is None:
            check_budget(self.budget, self.num_inference_steps, least=1 + len(switches))
            candidates = np.unique(errors)  # the counts change only there
            threshold = next(t for t in (*candidates, np.inf) if len(refreshed(errors, t, switches)) <= self.budget)
        steps, predictor = refreshed(errors, threshold, switches), Reuse()
        decided = {"threshold": float(threshold)}
        if self.rectify:
            weights = rectification(calibration[Gram(ResidualErrors.site)], steps)
            decided["rectification"] = {step: -of_input for step, (_, of_input) in weights.items()}
            predictor = FittedWeights(1, weights, sees_input=True)
        return Method(Schedule(steps, self.num_inference_steps), ResidualErrors.site, predictor, decided)


def refreshed(errors: np.ndarray, threshold: float, switches: Sequence[int] = ()) -> list[int]:
    """The computed steps: each is the first step whose error against the last computed one reaches the threshold, or at
    which a pipeline's second model takes over."""
    steps = [0]
    for step in range(1, len(errors)):
        if errors[steps[-1], step] >= threshold or step in switches:
            steps.append(step)
    return steps


def rectification(G: np.ndarray, steps: list[int]) -> dict[int, tuple[float, float]]:
    """Weights of D_c and of x_s at every skipped step s: 1 - a and -a, because the rectified prediction (1 - a) (x_s +
    D_c) minus x_s is kept."""
    T, weights = len(G) // 2, {}
    for step in sorted(set(range(T)) - set(steps)):
        key, own = max(k for k in steps if k < step), T + step
        size = G[own, own] + 2 * G[own, key] + G[key, key]  # of v~
        a = (G[own, key] - G[own, step] + G[key, key] - G[key, step]) / size if size > 0 else 0.0
        weights[step] = (1 - a, -a)
    return weights
