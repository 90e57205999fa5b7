"""MeanCache: From Instantaneous to Average Velocity for Accelerating Flow Matching Inference (Gao et al., arXiv
2601.19961)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from baselines.gits import cheapest
from baselines.lemica import longest_edge
from baselines.trajectory import Times, follow
from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Predictor
from dpcache.schedules import EvenlySpaced, Schedule, check_budget, given
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class MeanErrors(Rerun):
    """`edge_weights`, mean over prompts, (spans, T, T)."""

    spans: tuple[int, ...]

    def measure(self, pipe: "DiffusionPipeline", calibration: Calibration) -> np.ndarray:
        weights = []
        for batch in calibration.batches():
            run = follow(pipe, *batch, calibration.num_inference_steps, **calibration.made_from["call"])
            weights.append(edge_weights(run.states, run.slopes, run.times.tolist(), self.spans))
            calibration.reran += len(batch[0])
        return np.concatenate(weights, -1).mean(-1)


@dataclass(frozen=True)
class MeanCache(CalibratedRecipe):
    """The recipe: between computed steps the prediction is extrapolated, with a slope from its mean over the last few
    steps. The computed steps are planned, and for each the number of steps (span) in this mean.

    The prediction is as in the authors' code, see `Averages`. Their planner is not public, only its lists for two
    models and its outline: each pair of steps has a choice of spans, from 1 to 6, and the path from the first step to
    the last, which is always computed, suppresses peaks. Our choices are: the weight of an edge is the mean absolute
    difference between the true mean prediction over the edge and that of the predicted steps, where all steps before
    the edge are true; the path minimises the sum of the squared weights; and its edges reach no farther than those of
    the authors' lists.

    For samplers other than flow matching, planning uses the coordinates of `Trajectory`. Calibration takes one full
    trajectory per prompt, and one more in total.

    Args:
        spans: to choose from.
        power: exponent of the weights in the sum. The larger it is, the more the largest weight counts.
        max_jump: how far an edge may reach; None: see `longest_edge`.
        steps: a list to use in place of the planned one, such as the authors'. Its spans are still chosen; that of the
            last step, for the rest up to step T - 1.
    """

    budget: int
    num_inference_steps: int
    spans: Sequence[int] = (1, 2, 3, 4, 5, 6)
    power: float = 2.0
    max_jump: int | None = None
    steps: Sequence[int] | None = None

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps)
        longest_edge(self.budget, self.num_inference_steps, self.max_jump)
        if not self.spans or min(self.spans) < 1:
            raise SettingError(f"spans={list(self.spans)} must be at least 1")
        if self.steps is not None:
            given(self.steps, self.budget, self.num_inference_steps)

    @property
    def statistics(self) -> tuple[MeanErrors, Times]:
        return (MeanErrors(tuple(self.spans)), Times())

    @property
    def example(self) -> Method:
        T = self.num_inference_steps
        return Method(EvenlySpaced(self.budget, T), "output", Averages(tuple(range(T + 1)), {}, self.budget))

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        """The method with its steps and spans. `pipe` is not run and may be None."""
        errors, times = (calibration[statistic] for statistic in self.statistics)
        steps = self._plan(errors.min(0)) if self.steps is None else list(self.steps)
        last = self.num_inference_steps - 1
        spans = {i: self.spans[int(errors[:, i, j].argmin())] for i, j in pairwise(sorted({*steps, last}))}
        predictor = Averages(tuple(times.tolist()), spans, self.budget)
        decided = {"steps": steps, "spans": [*spans.values()]}
        return Method(Schedule(steps, self.num_inference_steps), "output", predictor, decided)

    def _plan(self, errors: np.ndarray) -> list[int]:
        T = self.num_inference_steps
        if T == 1:
            return [0]
        far = np.subtract.outer(np.arange(T), np.arange(T)) < -longest_edge(self.budget, T, self.max_jump)
        return [*cheapest(np.where(far, np.inf, errors**self.power), self.budget - 1), T - 1]


def edge_weights(
    states: torch.Tensor, slopes: torch.Tensor, times: Sequence[float], spans: Sequence[int]
) -> np.ndarray:
    """The mean absolute error of the mean predicted v over each edge, from row to column, (spans, T, T, B), float64.

    Args:
        states, slopes, times: of the T-step run, see `Trajectory`.
    """
    states, slopes = states.flatten(2).double(), slopes.flatten(2).double()
    T, B = slopes.shape[:2]
    weights = np.zeros((len(spans), T, T, B))
    for choice, span in enumerate(spans):
        for i in range(T - 1):
            known = list(slopes[: i + 1])
            reached = states[i + 1]  # by the prediction of step i itself
            for j in range(i + 2, T):
                known.append(_going_on(known, times, span))
                reached = reached + (times[j] - times[j - 1]) * known[-1]
                weights[choice, i, j] = ((reached - states[j]) / (times[j] - times[i])).abs().mean(-1)
    return weights


def _going_on(known: Sequence, times: Sequence[float], span: int):
    """The prediction of the step s after the `known` ones: v_{s-1} - (t_{s+1} - t_s) (v_r - mean of v) / (t_s - t_r),
    with the mean over the last `span` steps r..s-1, weighted by their lengths."""
    step, first = len(known), max(len(known) - span, 0)
    length = times[step] - times[first]
    mean = sum((times[s + 1] - times[s]) * known[s] for s in range(first, step)) / length
    return known[-1] - (times[step + 1] - times[step]) / length * (known[first] - mean)


@dataclass(frozen=True, eq=False)
class Averages(Predictor):
    """MeanCache's prediction, step by step. It may build on predicted steps, so every prediction is a weighted sum of
    the computed steps.

    Args:
        times: of the sampler's T + 1 states, see `Trajectory`.
        spans: the number of steps in the mean, by the last computed step; missing ones are 1, which is reuse.
        history: number of computed steps that are kept, which is all of them.
    """

    times: tuple[float, ...]
    spans: dict[int, int]
    history: int

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        made_of: list[np.ndarray] = []  # of every step from the first key on, its weights of the keys
        place, key, times = dict(zip(keys, np.eye(len(keys)))), keys[0], self.times[keys[0] :]
        for s in range(keys[0], step + 1):
            key = s if s in place else key
            made_of.append(place[s] if s in place else _going_on(made_of, times, self.spans.get(key, 1)))
        return tuple(made_of[-1].tolist())
