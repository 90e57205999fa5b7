"""No cache, and a scheduler grid of only K steps: the plain alternative at equal compute."""

from baselines.full import full
from dpcache.method import Method


def fewer_steps(budget: int) -> Method:
    if budget < 1:
        raise ValueError(f"budget={budget} must be at least 1")
    return full(budget)
