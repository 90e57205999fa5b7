"""The one search for a knob that spends the budget, of methods that decide online."""

import logging
from collections.abc import Callable
from functools import cache

import numpy as np

from dpcache.method import Method

log = logging.getLogger(__name__)


def closest(spent: Callable[[float], float], budget: float, first: float, tries: int = 8) -> tuple[float, float]:
    """The first knob that spends the budget to within half a step, of `tries` else the closest; and what it spends.

    Args:
        spent: full steps that a knob above 0 leads to, the fewer the larger the knob. Each call may take minutes.
        first: the knob to begin with; from there on growing by half until it is enough, then by bisection.
    """
    knob, low, high, tried = first, 0.0, None, {}
    for _ in range(tries):
        tried[knob] = spent(knob)
        if abs(tried[knob] - budget) <= 0.5:
            break
        low, high = (knob, high) if tried[knob] > budget else (low, knob)
        knob = 1.5 * low if high is None else (low + high) / 2
    return min(tried.items(), key=lambda pair: abs(pair[1] - budget))


def rerun(method, pipe, calibration, limit: int | None = None) -> float:
    """Full steps that the (first `limit`) calibration prompts take, on average."""
    _, report = calibration.rerun(pipe, method, limit)
    return float(np.mean([*report.spent.values()]))


def spend(method, pipe, calibration, owner, knob: str, budget: int, first: float, whole: bool = False) -> dict:
    """Set the attribute `knob` of `owner`, the method or its schedule, so that the budget is spent on the calibration
    prompts. Returns knob and "spent" for the record.

    Args:
        first: where to begin, and what remains where the method cannot get down to the budget: the default.
        whole: whole numbers only; these are caches whose steps are the same for all prompts, so one will do.
    """

    @cache
    def run(value: float) -> float:
        setattr(owner, knob, value)
        return rerun(method, pipe, calibration, limit=1 if whole else None)

    def rounded(value: float) -> float:
        return min(max(round(value), 1), method.num_inference_steps) if whole else value

    value, spent = closest(lambda value: run(rounded(value)), budget, first, tries=10)
    if spent > budget + 0.5:  # out of reach: nothing is gained by ruining the images
        value, spent = first, run(rounded(first))
    setattr(owner, knob, rounded(value))
    if abs(spent - budget) > 0.5:
        log.warning(
            "%s: budget=%s is out of reach on this model; %s=%s spends %.1f full steps",
            *(type(owner).__name__, budget, knob, rounded(value), spent),
        )
    return {knob: rounded(value), "spent": spent}


class Searched(Method):
    """A method whose online schedule has a `threshold`: where that is None, the one that spends its `budget`, found in
    closed loop from the schedule's `first` on."""

    def prepare(self, pipe, calibration=None):
        schedule = self.schedule
        search = schedule.threshold is None
        super().prepare(pipe, calibration)
        if search:
            self.settled |= spend(self, pipe, calibration, schedule, "threshold", schedule.budget, schedule.first)
