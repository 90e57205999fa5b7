"""FORA: Fast-Forward Caching in Diffusion Transformer Acceleration (Selvaraju et al., arXiv 2407.01425)."""

from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Interval


def fora(budget: int, num_inference_steps: int, interval: int | None = None) -> Method:
    """Attention and feed-forward outputs are reused between evenly spaced steps.

    Args:
        interval: the authors' own rule, every N-th step counted from the last; it has to agree with the budget.
    """
    if interval is None:
        schedule = EvenlySpaced(budget, num_inference_steps)
    else:
        schedule = Interval(interval, budget, num_inference_steps, from_end=True)
    return Method(schedule, "modules", Reuse())
