"""ZEUS: Accelerating Diffusion Models with Only Second-Order Predictor (Wang et al., arXiv 2604.01552)."""

from dpcache.method import Method
from dpcache.predictors import Zeus
from dpcache.schedules import EvenlySpaced


def zeus(budget: int, num_inference_steps: int, warmup: int = 3) -> Method:
    """The model's prediction, extrapolated and reused in turns between evenly spaced steps.

    The authors compute the first 11 and the last 4 of 50 steps and every third between them, 27 in all. So that smaller
    budgets are possible, the warm-up here is the least that their code allows, and the last steps are spaced like the
    others.
    """
    return Method(EvenlySpaced(budget, num_inference_steps, warmup), "output", Zeus())
