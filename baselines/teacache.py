"""TeaCache: Timestep Embedding Tells (Liu et al., arXiv 2411.19108)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from baselines.search import Search
from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.models.family import modulated_input
from dpcache.predictors import Reuse
from dpcache.schedules import OnlineSchedule
from dpcache.statistics import InputChange, OutputChange, Statistic, relative_change

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dpcache.session import Branch

log = logging.getLogger(__name__)


@dataclass
class SinceComputed:
    """The last step's modulated input, and the rescaled changes since the last computed step."""

    previous: torch.Tensor | None = None
    accumulated: float = 0.0


@dataclass(frozen=True)
class AccumulatedChange(OnlineSchedule):
    """A step is computed when the sum of the rescaled changes of the modulated input since the last computed step
    reaches the threshold (Eq. 5-7). The first `warmup` steps and the last are always computed.

    Args:
        polynomial: coefficients that map the input's change to the output's change, highest power first.
    """

    threshold: float
    polynomial: Sequence[float]
    warmup: int = 1

    def start(self) -> SinceComputed:
        return SinceComputed()

    def decide(self, context: "Branch", block: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
        state, step, current = context.state, context.step, modulated_input(block, args, kwargs)
        if self.warmup <= step < self.num_inference_steps - 1 and context.keys:
            state.accumulated += np.polyval(self.polynomial, relative_change(current, state.previous).item())
            compute = not state.accumulated < self.threshold  # also where it is not a number
        else:
            compute = True
        if compute:
            state.accumulated = 0.0
        state.previous = current
        return bool(compute)


def fit_polynomial(input_change: np.ndarray, output_change: np.ndarray, degree: int = 4) -> tuple[float, ...]:
    """Least-squares fit of the output's change over the input's, all steps of all trajectories (3.3)."""
    x, y = input_change[:, 1:].ravel(), output_change[:, 1:].ravel()
    return tuple(np.polyfit(x, y, degree).tolist())


def r_squared(polynomial: Sequence[float], input_change: np.ndarray, output_change: np.ndarray) -> float:
    """Share of the variance of the output's change that the polynomial explains, at most 1."""
    y = output_change[:, 1:].ravel()
    rest = y - np.polyval(polynomial, input_change[:, 1:].ravel())
    return float(1 - rest.var() / y.var())


def count_computed(input_change: np.ndarray, polynomial: Sequence[float], threshold: float, warmup: int = 1) -> float:
    """The number of computed steps with a threshold, mean over the trajectories (n, T)."""
    rescaled, total = np.polyval(polynomial, input_change), 0
    for row in rescaled:
        accumulated, computed = 0.0, warmup + 1
        for change in row[warmup:-1]:
            accumulated += change
            if accumulated >= threshold:
                accumulated, computed = 0.0, computed + 1
        total += computed
    return total / len(rescaled)


def find_threshold(input_change: np.ndarray, polynomial: Sequence[float], budget: int, warmup: int = 1) -> float:
    """The middle of the thresholds that spend the budget in the mean over recorded trajectories, found by bisection."""

    def lowest(limit: float) -> float:
        low, high = 0.0, float(np.abs(np.polyval(polynomial, input_change)).sum(1).max()) + 1e-9
        for _ in range(50):
            middle = (low + high) / 2
            spent = count_computed(input_change, polynomial, middle, warmup)
            low, high = (middle, high) if spent > limit else (low, middle)
        return high

    return (lowest(budget) + lowest(budget - 0.5)) / 2


@dataclass(frozen=True)
class TeaCache(CalibratedRecipe):
    """The recipe: fits the polynomial and searches for the threshold, unless they are given. The search begins with the
    threshold for the recorded full-step trajectories; accelerated runs need a slightly different one."""

    budget: int
    num_inference_steps: int
    threshold: float | None = None
    polynomial: Sequence[float] | None = None
    warmup: int = 1

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (InputChange(),) if self.polynomial is not None else (InputChange(), OutputChange())

    @property
    def example(self) -> Method:
        return self.make(0.0, (0.0,))

    def make(self, threshold: float, polynomial: Sequence[float], fitted: Mapping[str, float] | None = None) -> Method:
        """`fitted`: how well the polynomial fits, for `result.json`."""
        schedule = AccumulatedChange(self.num_inference_steps, threshold, polynomial, self.warmup)
        decided = {"threshold": threshold, "polynomial": list(polynomial), **(fitted or {})}
        return Method(schedule, "residual", Reuse(), decided)

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        if self.threshold is not None:
            return self.make(self.threshold, *self._fitted(calibration))
        return self.knob(calibration).fit(pipe, calibration)

    def knob(self, calibration: Calibration) -> Search:
        """The search for the threshold. Raises SettingError if it is given."""
        if self.threshold is not None:
            raise SettingError(f"threshold={self.threshold} is given, which leaves nothing to search for")
        polynomial, fitted = self._fitted(calibration)
        first = find_threshold(calibration[InputChange()], polynomial, self.budget, self.warmup)
        make = partial(self.make, polynomial=polynomial, fitted=fitted)
        return Search(make, self.budget, self.num_inference_steps, first)

    def _fitted(self, calibration: Calibration) -> tuple[Sequence[float], dict[str, float]]:
        """The polynomial, and how well it fits if it was not given."""
        changes, polynomial, fitted = calibration[InputChange()], self.polynomial, {}
        if not len(changes):
            raise SettingError("teacache: the calibration holds no modulated inputs: this model's are not known")
        if polynomial is None:
            output_change = calibration[OutputChange()]
            # From the one model to the other of a pipeline with two, only the output is seen to change.
            both = [np.delete(part, calibration.switches, 1) for part in (changes, output_change)]
            polynomial = fit_polynomial(*both)
            fitted["r_squared"] = share = r_squared(polynomial, *both)
            if share < 0.5:
                log.warning(
                    "teacache: the polynomial explains %.0f %% of the output's changes on the calibration prompts; "
                    "better a method that does not guess them from the input's",
                    100 * max(share, 0),
                )
        return polynomial, fitted


def teacache(
    budget: int,
    num_inference_steps: int,
    threshold: float | None = None,
    polynomial: Sequence[float] | None = None,
    warmup: int = 1,
) -> Method | TeaCache:
    """The image stream's residual over all blocks is reused while the modulated input has changed little.

    Args:
        threshold: the paper's own parameter; the budget is then not enforced.
        polynomial: coefficients, highest power first; None: fitted.
        warmup: steps computed first: 1 in the paper.
    """
    if warmup < 1:
        raise SettingError(f"warmup={warmup} must be at least 1")
    if not warmup + 1 <= budget <= num_inference_steps:
        raise SettingError(
            f"budget={budget} must be between {warmup + 1} (warmup={warmup} and the last step) and "
            f"num_inference_steps={num_inference_steps}"
        )
    if isinstance(polynomial, str):
        raise SettingError(f"polynomial={polynomial} must be a list of coefficients, null or, in a command, published")
    recipe = TeaCache(budget, num_inference_steps, threshold, polynomial, warmup)
    return recipe if threshold is None or polynomial is None else recipe.make(threshold, polynomial)
