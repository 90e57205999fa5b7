"""HiCache: Hermite Polynomial-based Feature Caching (Feng et al., arXiv 2508.16984)."""

from dpcache.method import Method
from dpcache.predictors import Hermite
from dpcache.schedules import EvenlySpaced


def hicache(
    budget: int, num_inference_steps: int, order: int = 2, warmup: int = 3, scale: float = 0.5, lite: bool = False
) -> Method:
    """TaylorSeer's schedule and sites with scaled Hermite polynomials in place of powers.

    Args:
        scale: sigma, the contraction of the polynomials.
        lite: keep the last block's output alone instead of every module's.
    """
    schedule = EvenlySpaced(budget, num_inference_steps, warmup)
    return Method(schedule, "stack" if lite else "modules", Hermite(order, max(warmup - 2, 0), scale))
