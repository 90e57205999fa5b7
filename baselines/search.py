"""The one search for a knob that spends the budget, of methods that decide online."""

from collections.abc import Callable


def closest(spent: Callable[[float], float], budget: float, first: float, tries: int = 8) -> tuple[float, float]:
    """The first knob that spends the budget to within half a step, of `tries` else the closest; and what it spends.

    Args:
        spent: full steps that a knob above 0 leads to, the fewer the larger the knob. Each call may take minutes.
        first: the knob to begin with; from there on growing by half until it is enough, then by bisection.
    """
    knob, low, high, tried = first, 0.0, None, {}
    for _ in range(tries):
        tried[knob] = spent(knob)
        if abs(tried[knob] - budget) <= 0.5:
            break
        low, high = (knob, high) if tried[knob] > budget else (low, knob)
        knob = 1.5 * low if high is None else (low + high) / 2
    return min(tried.items(), key=lambda pair: abs(pair[1] - budget))
