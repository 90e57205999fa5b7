"""TaylorSeer: From Reusing to Forecasting (Liu et al., arXiv 2503.06923)."""

from dpcache.method import Method
from dpcache.predictors import Taylor
from dpcache.schedules import EvenlySpaced, Interval


def taylorseer(
    budget: int,
    num_inference_steps: int,
    order: int = 2,
    warmup: int = 3,
    interval: int | None = None,
    lite: bool = False,
) -> Method:
    """Attention and feed-forward outputs are extrapolated between evenly spaced steps.

    Args:
        interval: the paper's own rule, every N-th step after the warm-up; it has to agree with the budget.
        lite: keep the last block's output alone (the authors' lite version) instead of every module's.
    """
    if interval is None:
        schedule = EvenlySpaced(budget, num_inference_steps, warmup)
    else:
        schedule = Interval(interval, budget, num_inference_steps, warmup)
    return Method(schedule, "stack" if lite else "modules", Taylor(order, since=max(warmup - 2, 0)))
