"""No cache: every step is computed. The reference of every comparison."""

from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced


def full(num_inference_steps: int) -> Method:
    """All T steps are computed."""
    return Method(EvenlySpaced(num_inference_steps, num_inference_steps), "output", Reuse())
