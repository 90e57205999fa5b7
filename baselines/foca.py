"""FoCa: Forecast then Calibrate (Zheng et al., arXiv 2508.16211)."""

from dpcache.method import Method
from dpcache.predictors import FoCa
from dpcache.schedules import EvenlySpaced


def foca(budget: int, num_inference_steps: int, warmup: int = 3, lite: bool = False) -> Method:
    """TaylorSeer's schedule and sites with a BDF2 forecast that a Heun step calibrates.

    Args:
        lite: keep the last block's output alone instead of every module's.
    """
    return Method(EvenlySpaced(budget, num_inference_steps, warmup), "stack" if lite else "modules", FoCa())
