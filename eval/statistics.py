"""Means with bootstrap intervals, for one method and for the paired difference of two, the worst prompt, and the Pareto
front of many."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dpcache.errors import SettingError

RESAMPLES = 10_000
WORST = 5  # the percentile of the prompts that stands for the worst one, because one sample of the tail is an accident
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
    return _summaries(values[None], seed)[0]


def _summaries(rows: np.ndarray, seed: int) -> list[dict]:
    """`summarise` of every row of (rows, N)."""
    n, ends = rows.shape[1], [[None, None]] * len(rows)
    if n > 1:
        ends = np.percentile(rows @ _counts(n, seed) / n, [2.5, 97.5], axis=1).T.tolist()
    return [{"mean": float(row.mean()), "ci95": end, "n": n} for row, end in zip(rows, ends)]


@lru_cache(maxsize=1)  # a board asks for the same ones thousands of times
def _counts(n: int, seed: int) -> np.ndarray:
    """How often each of n values is in each of `RESAMPLES` resamples with replacement, (n, RESAMPLES)."""
    draws = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n), dtype=np.int32)
    places = draws + np.arange(RESAMPLES)[:, None] * n
    return np.bincount(places.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).T.astype(np.float32)


def worst(values: Sequence[float], higher_is_better: bool) -> float:
    """The `WORST` percentile of values, counted from the bad end: a mean hides the prompts on which a method fails."""
    return float(np.percentile(values, WORST if higher_is_better else 100 - WORST))


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> dict:
    """`summarise` of a - b, where a[n] and b[n] come from the same prompt and noise.

    Pairing removes the spread between prompts, so two methods whose own intervals overlap can still differ clearly.

    Raises SettingError when the lengths differ, and as `summarise` does.
    """
    if len(a) != len(b):
        raise SettingError(f"paired values need equal lengths, got {len(a)} and {len(b)}")
    return summarise(np.subtract(a, b, dtype=np.float64), seed)


def paired_differences(many: Sequence[Sequence[float]], b: Sequence[float], seed: int = 0) -> list[dict]:
    """`paired_difference` of each of many arrays to b, computed together."""
    return _summaries(np.subtract(many, b, dtype=np.float64), seed) if len(many) else []


def doubt(timed: dict) -> str | None:
    """Why the `timing` of a result is not reliable, or None."""
    return timed.get("unreliable", "measured by an earlier version, which kept no spread")


def front(gains: np.ndarray, values: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """Which of N points (gain, value) lie on the Pareto front, as booleans (N,). More gain is better.

    A point is not on the front if another point has a better value and is no slower, to within `LEVEL`, or has the same
    value and is faster.
    """
    gains, values = np.asarray(gains, dtype=float), np.asarray(values, dtype=float) * (1 if higher_is_better else -1)
    better, same = values[:, None] > values, values[:, None] == values  # [i, j]: i than j
    beats = (better & (gains[:, None] >= gains * (1 - LEVEL))) | (same & (gains[:, None] > gains))
    return ~beats.any(axis=0)
