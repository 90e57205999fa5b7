"""No cache, and a scheduler grid of only K steps: the plain alternative at equal compute."""

from baselines.full import full
from dpcache.errors import SettingError
from dpcache.method import Method


def fewer_steps(budget: int, num_inference_steps: int) -> Method:
    if not 1 <= budget <= num_inference_steps:
        raise SettingError(f"budget={budget} must be between 1 and num_inference_steps={num_inference_steps}")
    return full(budget)
