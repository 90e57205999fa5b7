"""AB-Cache: Adams-Bashforth Cached Feature Reuse (Yu et al., arXiv 2504.10540)."""

from dpcache.method import Method
from dpcache.predictors import AdamsBashforth
from dpcache.schedules import EvenlySpaced


def ab_cache(budget: int, num_inference_steps: int, order: int = 2, warmup: int = 3) -> Method:
    """The model's prediction between evenly spaced steps, as an Adams-Bashforth step of the ODE takes it."""
    return Method(EvenlySpaced(budget, num_inference_steps, warmup), "output", AdamsBashforth(order))
