"""No cache, and a scheduler grid of only K steps: the plain alternative at equal compute."""

from baselines.full import full
from dpcache.method import Method
from dpcache.schedules import check_budget


def fewer_steps(budget: int, num_inference_steps: int) -> Method:
    """Every step of a grid of K steps is computed. Raises SettingError for a budget out of range."""
    check_budget(budget, num_inference_steps)
    return full(budget)
