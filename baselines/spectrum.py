"""Spectrum: Adaptive Spectral Feature Forecasting (Han et al., arXiv 2603.01623)."""

import math

from dpcache.method import Method
from dpcache.predictors import Chebyshev
from dpcache.schedules import Schedule, check_budget


def spectrum(
    budget: int,
    num_inference_steps: int,
    degree: int = 4,
    ridge: float = 0.1,
    mix: float = 0.5,
    warmup: int = 5,
    window: int = 2,
) -> Method:
    """The last block's output is fitted by Chebyshev polynomials of time. The gaps between computed steps grow
    linearly.

    Args:
        degree, ridge, mix: see `dpcache.predictors.Chebyshev`.
        warmup, window: see `growing_gaps`.
    """
    steps = growing_gaps(budget, num_inference_steps, warmup, window)
    predictor = Chebyshev(num_inference_steps, degree, ridge, mix, history=min(budget, 100))
    return Method(Schedule(steps, num_inference_steps), "stack", predictor)


def growing_gaps(budget: int, num_inference_steps: int, warmup: int = 5, window: int = 2) -> list[int]:
    """K steps: the warm-up, then gaps of floor(N), floor(N + alpha), floor(N + 2 alpha), ... for the initial window N.

    The paper sets alpha. Here alpha is the middle of the values that spend the budget, which gives the authors' 0.75
    and 3 at their 14 and 10 of 50 steps. If no alpha spends the budget, the warm-up grows until one does. This happens
    if even alpha = 0 computes too few steps, or if a small change of alpha moves several gaps at once.
    """
    check_budget(budget, num_inference_steps, warmup)

    def steps(first: int, alpha: float) -> list[int]:
        steps, size = list(range(first)), float(window)
        while (step := steps[-1] + math.floor(size)) < num_inference_steps:
            steps.append(step)
            size = round(size + alpha, 9)
        return steps

    def last_alpha(first: int, least: int) -> float:
        """The largest alpha that computes at least `least` steps; 0 if there is none."""
        low, high = 0.0, float(num_inference_steps)
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if len(steps(first, middle)) >= least else (low, middle)
        return low

    for first in range(warmup, budget):
        found = steps(first, (last_alpha(first, budget + 1) + last_alpha(first, budget)) / 2)
        if len(found) == budget:
            return found
    return list(range(budget))
