"""Searches for what spends the budget: a setting, or a number of full steps beside others that cost something, too."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dpcache.calibration import Calibration
from dpcache.method import CalibratedRecipe, Method, Runnable
from dpcache.schedules import EvenlySpaced

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)


def closest(spent: Callable[[float], float], budget: float, first: float, tries: int = 8) -> tuple[float, float]:
    """The first value that spends the budget to within half a step, of `tries` else the closest; and what it spends.

    Args:
        spent: full steps that a value above 0 leads to, the fewer the larger the value. Each call may take minutes.
        first: the value to begin with; from there on growing by half until it is enough, then by bisection.
    """
    value, low, high, tried = first, 0.0, None, {}
    for _ in range(tries):
        tried[value] = spent(value)
        if abs(tried[value] - budget) <= 0.5:
            break
        low, high = (value, high) if tried[value] > budget else (low, value)
        value = 1.5 * low if high is None else (low + high) / 2
    return min(tried.items(), key=lambda pair: abs(pair[1] - budget))


def spent(method: Runnable, pipe: "DiffusionPipeline", calibration: Calibration, limit: int | None = None) -> float:
    """Full steps that the (first `limit`) calibration prompts take, on average."""
    _, report = calibration.rerun(pipe, method, limit)
    return float(np.mean([*report.spent.values()]))


def with_full_steps(
    make: Callable[[int], Runnable],
    budget: int,
    num_inference_steps: int,
    least: int,
    pipe: "DiffusionPipeline",
    calibration: Calibration,
) -> Runnable:
    """The method with as many full steps as spend the budget together with what is computed of the other steps.

    Found by two or three runs of one calibration prompt, because all take the same steps.

    Args:
        make: the method with so many full steps.
        least: the fewest.

    Returns:
        The method, with the number of "full" steps and what it "spent" among what was decided.
    """
    T, full, found = num_inference_steps, budget, {}
    while full not in found:
        found[full] = spent(make(full), pipe, calibration, limit=1)
        partial = (found[full] - full) / max(T - full, 1)  # cost of a step that is not full, in full ones
        full = max(round((budget - partial * T) / (1 - partial)), least)
    full = min(found, key=lambda full: abs(found[full] - budget))
    if abs(found[full] - budget) > 0.5:
        log.warning("budget=%s is out of reach: %s full steps spend %.1f", budget, full, found[full])
    return with_decided(make(full), {"full": full, "spent": found[full]})


@dataclass(frozen=True)
class FullSteps(CalibratedRecipe):
    """Base of recipes: of the full steps, evenly spaced after the warm-up, there are as many as spend the budget
    together with what the other steps cost, see `with_full_steps`."""

    budget: int
    num_inference_steps: int
    warmup: int
    statistics: ClassVar[tuple] = ()

    @abstractmethod
    def make(self, full: int) -> Method:
        """The method with so many full steps."""

    @property
    def example(self) -> Method:
        return self.make(self.budget)

    def spaced(self, full: int) -> list[int]:
        """So many steps."""
        return EvenlySpaced(full, self.num_inference_steps, self.warmup).steps

    def every(self, interval: int) -> list[int]:
        """The authors' full steps: those of the warm-up, and one after every `interval` - 1 others."""
        return sorted({*range(self.warmup), *range(self.warmup - 1, self.num_inference_steps, interval)})

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        return with_full_steps(self.make, self.budget, self.num_inference_steps, self.warmup, pipe, calibration)


@dataclass(frozen=True)
class Search(CalibratedRecipe):
    """The recipe of a method with one setting, which is found in closed loop so that the calibration prompts spend the
    budget. Where the budget is out of reach, `first` remains: nothing is gained by ruining the images.

    Args:
        make: the method with the setting at a value; a frozen dataclass with `decided`.
        budget, num_inference_steps: K and T.
        first: the value to begin with, the default.
        setting: what it is called, for the record.
        whole: whole numbers only.
        alike: whether the steps are the same for all prompts, so that one prompt will do; None: those of whole numbers.
        alone: whether nothing else in `make` depends on the budget, so that a quality is searched by this setting.
    """

    make: Callable[[float], Runnable]
    budget: int
    num_inference_steps: int
    first: float
    setting: str = "threshold"
    whole: bool = False
    alike: bool | None = None
    alone: bool = False
    statistics: ClassVar[tuple] = ()

    @property
    def example(self) -> Method | None:
        made = self.make(self.first)
        return made if isinstance(made, Method) else None

    def knob(self, calibration: Calibration) -> "Search | None":
        """Itself, for a search by quality, see `dpcache.quality.find_budget`; None where budgets are to be tried."""
        return self if self.alone else None

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Runnable:
        """The method, with the value and what it "spent" among what was decided."""

        def rounded(value: float) -> float:
            return min(max(round(value), 1), self.num_inference_steps) if self.whole else value

        @cache
        def run(value: float) -> float:
            alike = self.whole if self.alike is None else self.alike
            return spent(self.make(value), pipe, calibration, limit=1 if alike else None)

        value, total = closest(lambda value: run(rounded(value)), self.budget, self.first, tries=10)
        if total > self.budget + 0.5:  # out of reach
            value, total = self.first, run(rounded(self.first))
        method = self.make(rounded(value))
        if abs(total - self.budget) > 0.5:
            log.warning(
                "budget=%s is out of reach on this model; %s=%s spends %.1f full steps",
                *(self.budget, self.setting, rounded(value), total),
            )
        return with_decided(method, {self.setting: rounded(value), "spent": total})


def with_decided(method: Runnable, decided: Mapping[str, object]) -> Runnable:
    """The method with these among what was decided."""
    return replace(method, decided={**method.decided, **decided})
