"""ERTACache: Error Rectification and Timesteps Adjustment for Efficient Diffusion (Peng et al., arXiv 2508.21091)."""

import numpy as np
import torch

from dpcache.calibration import record
from dpcache.gram import gram
from dpcache.lsq import FittedWeights
from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Schedule, check_budget


class ERTACache(Method):
    """What the model adds to its input is reused by a list of steps from an offline profile, and rectified.

    A step s is skipped while |D_c - D_s|_1 / |D_s|_1 < threshold, where D = v - x and c is the last computed step: the
    mean over prompts and guidance branches, on full-step trajectories. The error v~ - v of the reused v~ = x_s + D_c is
    then predicted as a v~, with the a of least squares at every skipped step, and taken off: the paper's closed form,
    without its constant, which latents of mean zero do not need.

    The authors' code could not be had. The paper's third part, other step sizes of the solver, is left out: accounts of
    its formula disagree, and it would need the sampler's hand.

    Args:
        threshold: the paper's lambda; None: the lowest that does not exceed the budget.
        rectify: False: reuse alone.
    """

    needs_calibration = True

    def __init__(self, budget: int, num_inference_steps: int, threshold: float | None = None, rectify: bool = True):
        check_budget(budget, num_inference_steps, 1)
        super().__init__(Schedule(None, num_inference_steps), "output_residual", Reuse())
        self.budget, self.threshold, self.rectify = budget, threshold, rectify

    def prepare(self, pipe, calibration=None):
        T = self.num_inference_steps
        errors, G = profile(pipe, calibration)
        threshold = self.threshold
        if threshold is None:
            candidates = np.unique(errors)  # the counts change only there
            threshold = next(t for t in (*candidates, np.inf) if len(refreshed(errors, t)) <= self.budget)
        steps = refreshed(errors, threshold)
        self.schedule = Schedule(steps, T)
        self.settled = {"threshold": float(threshold)}
        if self.rectify:
            weights = rectification(G, steps)
            self.settled["rectification"] = {step: -of_input for step, (_, of_input) in weights.items()}
            self.predictor = FittedWeights(1, weights, sees_input=True)


def profile(pipe, calibration) -> tuple[np.ndarray, np.ndarray]:
    """Of the calibration prompts' full-step trajectories: mean |D_c - D_s|_1 / |D_s|_1, (T, T), rows c; and the Gram
    matrix of all D_s and then all inputs x_s, (2T, 2T)."""
    T, prompts = int(calibration.made_for["num_inference_steps"]), len(calibration.made_from["prompts"])
    full, errors, G = Method(EvenlySpaced(T, T), "output_residual", Reuse()), 0.0, 0.0
    for batch in calibration.batches():
        branches = record(pipe, full, *batch, **calibration.made_from["call"])[1].values()
        share = len(batch[0]) / prompts / len(branches)
        for kept in branches:
            rows = kept["output"].float().flatten(2).transpose(0, 1)
            distances = torch.cdist(rows, rows, p=1) / rows.abs().sum(-1)[:, None]
            errors = errors + share * distances.mean(0).double().cpu().numpy()
            inputs = kept["input"][:, :, : kept["output"].shape[2]]  # without an image-to-video model's condition
            G = G + share * gram([kept["output"], inputs], device=pipe._execution_device)
    return errors, G


def refreshed(errors: np.ndarray, threshold: float) -> list[int]:
    """The steps that are computed: those whose error from the last one on reaches the threshold."""
    steps = [0]
    for step in range(1, len(errors)):
        if errors[steps[-1], step] >= threshold:
            steps.append(step)
    return steps


def rectification(G: np.ndarray, steps: list[int]) -> dict[int, tuple[float, float]]:
    """Weights of D_c and x_s at every skipped step s: the residual of (1 - a) (x_s + D_c), so 1 - a and -a."""
    T, weights = len(G) // 2, {}
    for step in sorted(set(range(T)) - set(steps)):
        key, own = max(k for k in steps if k < step), T + step
        size = G[own, own] + 2 * G[own, key] + G[key, key]  # of v~
        a = (G[own, key] - G[own, step] + G[key, key] - G[key, step]) / size if size > 0 else 0.0
        weights[step] = (1 - a, -a)
    return weights
