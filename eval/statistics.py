"""Means with bootstrap intervals, for one method and for the paired difference of two, and the Pareto front of many."""

from collections.abc import Sequence

import numpy as np

from dpcache.errors import SettingError

RESAMPLES = 10_000
LEVEL = 0.01  # gains that differ by a smaller share count as equal, because no machine measures them more closely


def summarise(values: Sequence[float], seed: int = 0) -> dict:
    """`{"mean", "ci95": [lo, hi], "n"}`: the mean and its 95 % percentile bootstrap interval over N samples.

    One sample says nothing about spread: for N = 1 the interval is [None, None] (null in JSON), not a width of zero.
    The interval depends on `values` and `seed` only.

    Raises SettingError for no values, for more than one dimension and for values that are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise SettingError(f"expected a list of finite numbers, got {values!r}")
    n = len(values)
    interval = [None, None]
    if n > 1:
        draws = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n), dtype=np.int32)
        interval = np.percentile(values[draws].mean(axis=1), [2.5, 97.5]).tolist()
    return {"mean": float(values.mean()), "ci95": interval, "n": n}


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> dict:
    """`summarise` of a - b, where a[n] and b[n] come from the same prompt and noise.

    Pairing removes the spread between prompts, so two methods whose own intervals overlap can still differ clearly.

    Raises SettingError when the lengths differ, and as `summarise` does.
    """
    if len(a) != len(b):
        raise SettingError(f"paired values need equal lengths, got {len(a)} and {len(b)}")
    return summarise(np.subtract(a, b, dtype=np.float64), seed)


def doubt(timed: dict) -> str | None:
    """Why the `timing` of a result is not reliable, or None."""
    return timed.get("unreliable", "measured by an earlier version, which kept no spread")


def front(gains: np.ndarray, values: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """Which of N points (gain, value) lie on the Pareto front, as booleans (N,). More gain is better.

    A point is beaten by one with a better value that is no slower, to within `LEVEL`, and by one with the same value
    that is faster.
    """
    gains, values = np.asarray(gains, dtype=float), np.asarray(values, dtype=float) * (1 if higher_is_better else -1)
    better, same = values[:, None] > values, values[:, None] == values  # [i, j]: i than j
    beats = (better & (gains[:, None] >= gains * (1 - LEVEL))) | (same & (gains[:, None] > gains))
    return ~beats.any(axis=0)
