"""Uniform skip: evenly spaced steps are computed, the others reuse the model's last prediction."""

from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced


def uniform_skip(budget: int, num_inference_steps: int) -> Method:
    """Reuse of the prediction at skipped steps. Raises SettingError for a budget out of range."""
    return Method(EvenlySpaced(budget, num_inference_steps), "output", Reuse())
