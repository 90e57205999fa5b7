"""Searches for the setting, or for the number of full steps, that spends the budget."""

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
    """The first value that spends the budget to within half a step, or else the closest of `tries` values; and what it
    spends.

    Args:
        spent: the number of full steps for a value above 0; the larger the value, the fewer. Each call may take
            minutes.
        first: the value to begin with. Values grow by half until one is large enough; then they are bisected.
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
    """The method with as many full steps as spend the budget, together with the partly computed steps.

    The number is found in two or three runs of one calibration prompt, because all prompts take the same steps.

    Args:
        make: the method with so many full steps.
        least: the fewest.

    Returns:
        The method; its `decided` has the number of "full" steps and what it "spent".
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
    """Base of recipes with evenly spaced full steps after the warm-up. Their number is chosen so that they spend the
    budget together with the other, partly computed steps, see `with_full_steps`."""

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
        """That many full steps, evenly spaced after the warm-up."""
        return EvenlySpaced(full, self.num_inference_steps, self.warmup).steps

    def every(self, interval: int) -> list[int]:
        """The authors' full steps: those of the warm-up, and then every `interval`-th step."""
        return sorted({*range(self.warmup), *range(self.warmup - 1, self.num_inference_steps, interval)})

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        return with_full_steps(self.make, self.budget, self.num_inference_steps, self.warmup, pipe, calibration)


@dataclass(frozen=True)
class Search(CalibratedRecipe):
    """The recipe of a method with one setting. The setting is searched for in runs of the calibration prompts, so that
    they spend the budget. If the budget is out of reach, the setting stays at `first`, because a value that ruins the
    images would be of no use.

    Args:
        make: the method for a value of the setting; a frozen dataclass with `decided`.
        budget, num_inference_steps: K and T.
        first: the value to begin with, the default.
        setting: its name in `decided`.
        whole: whole numbers only.
        alike: whether all prompts compute the same steps, so that one prompt is enough; None: true if `whole` is.
        alone: whether nothing else in `make` depends on the budget. Then a quality is searched for by this setting,
            too.
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
        """Itself, for a search by quality, see `dpcache.quality.find_budget`; None: budgets have to be tried
        instead."""
        return self if self.alone else None

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Runnable:
        """The method; its `decided` has the value and what it "spent"."""

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
    """A copy of the method with these entries added to its `decided`."""
    return replace(method, decided={**method.decided, **decided})
