"""Which steps to compute: shortest paths over a path-aware cost (DPCache, arXiv 2602.22654).

``cost[i, j, k]`` is the cost of going from key step j straight to key step k if the key before j was i. k = T is the
end of sampling, and infinity marks moves that are not allowed. More leading axes hold a longer history:
``cost[h, i, j, k]`` and so on. With T steps the last axis has length T + 1, the others at least T. If a path has no
earlier key yet, key 0 takes its place.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from dpcache.errors import SettingError

Cost = np.ndarray | torch.Tensor
Plans = dict[int, list[int]]


def plan(cost: Cost, budget: int, warmup: int = 3, solver: str = "exact", max_jump: int | None = None) -> list[int]:
    """The cheapest schedule that computes exactly ``budget`` of the T steps.

    Args:
        cost: array or tensor, (T, T+1, T+1) or with more key axes (see the module).
        budget: number of computed steps K, ``warmup <= K <= T``.
        warmup: steps 0..warmup-1 are always computed.
        solver: "exact" keeps every key that the cost depends on in the state, so the schedule is optimal. "paper" is
            the recurrence of DPCache, D[m, k] = min_j D[m-1, j] + C[P[m-1, j], j, k], which keeps only the best
            predecessor P per (count, step) and may miss the optimum; it takes three axes.
        max_jump: longest move from a key to the next key or the end, in steps; None for no limit.

    Returns:
        The computed steps, 0-based and increasing; ties go to the smaller step.

    Raises:
        SettingError: for a setting out of range, and when no schedule of this budget has a finite cost.
    """
    cost, solve = _checked(cost, warmup, solver, max_jump)
    steps = cost.shape[-1] - 1
    if not warmup <= budget <= steps:
        raise SettingError(f"budget={budget}: must lie in {warmup}..{steps}, from warmup to the number of steps")
    plans = solve(cost, warmup, range(budget, budget + 1))
    if not plans:
        feasible = sorted(solve(cost, warmup, range(warmup, steps + 1)))
        raise SettingError(
            f"budget={budget}: no schedule has a finite cost with warmup={warmup}, max_jump={max_jump}, "
            f"solver={solver!r}; feasible budgets: {feasible or 'none'}"
        )
    return plans[budget]


def plan_all(cost: Cost, warmup: int = 3, solver: str = "exact", max_jump: int | None = None) -> dict[int, list[int]]:
    """``plan`` for every feasible budget from ``warmup`` to T in one pass; budgets without a path are left out."""
    cost, solve = _checked(cost, warmup, solver, max_jump)
    return solve(cost, warmup, range(warmup, cost.shape[-1]))


def through(cost: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """A copy of the costs (..., T, T+1) in which no move skips one of `steps`, so that every plan computes them: for
    the steps at which a pipeline's second model takes over. The last two axes are the latest key and the next."""
    cost = np.array(cost, dtype=float)
    for step in steps:
        cost[..., :step, step + 1 :] = np.inf
    return cost


def path_cost(cost: Cost, steps: Sequence[int], warmup: int = 3) -> float:
    """Cost of a schedule: the sum of cost[s[a-1], s[a], s[a+1]] for a >= warmup-1, with T appended to ``steps``.

    Moves inside the warm-up are forced and do not count. SettingError unless ``steps`` is increasing within 0..T-1 and
    begins with 0..warmup-1.
    """
    cost, _ = _checked(cost, warmup, "exact", None)
    steps, end = [int(s) for s in steps], cost.shape[-1] - 1
    if steps[:warmup] != list(range(warmup)) or any(a >= b for a, b in pairwise([*steps, end])):
        raise SettingError(f"steps={steps}: must begin with 0..{warmup - 1} and increase within 0..{end - 1}")
    keys = [0] * (cost.ndim - 2) + steps + [end]
    return float(sum(cost[tuple(keys[a : a + cost.ndim])] for a in range(warmup - 1, len(steps))))


def _checked(cost: Cost, warmup: int, solver: str, max_jump: int | None) -> tuple[np.ndarray, Callable[..., Plans]]:
    """The cost in float64, infinite for moves that go back or beyond max_jump, and the solver."""
    cost = cost.detach().cpu().double().numpy() if isinstance(cost, torch.Tensor) else np.asarray(cost, np.float64)
    end = cost.shape[-1] - 1 if cost.ndim else 0
    if cost.ndim < 3 or end < 1 or min(cost.shape[:-1]) < end:
        raise SettingError(f"cost of shape {cost.shape}: must be (T, T+1, T+1), or have more key axes of at least T")
    if not (cost > -np.inf).all():
        raise SettingError("cost: must hold no NaN and no -inf; +inf marks moves that are not allowed")
    if not 1 <= warmup <= end:
        raise SettingError(f"warmup={warmup}: must lie in 1..{end}, the number of steps")
    if solver not in _SOLVERS:
        raise SettingError(f"solver={solver!r}: must be one of {', '.join(_SOLVERS)}")
    if solver == "paper" and cost.ndim != 3:
        raise SettingError(f"solver='paper' takes a cost with three axes, not {cost.ndim}; use solver='exact'")
    if max_jump is not None and max_jump < 1:
        raise SettingError(f"max_jump={max_jump}: must be at least 1, or None for no limit")
    cost = cost[(slice(end),) * (cost.ndim - 1)]
    jump = np.arange(end + 1) - np.arange(end)[:, None]
    return np.where((jump >= 1) & (jump <= (max_jump or end)), cost, np.inf), _SOLVERS[solver]


def _exact(cost: np.ndarray, warmup: int, budgets: Sequence[int]) -> Plans:
    """best[m, i, j]: least cost of m keys ending in i, j (in one more key per further axis of the cost)."""
    end, history = cost.shape[-1] - 1, cost.ndim - 1
    best = np.full((budgets[-1] + 2, *cost.shape[1:]), np.inf)
    best[(warmup, *([0] * history + list(range(warmup)))[-history:])] = 0
    for j in range(warmup - 1, end):
        earlier = (slice(max(j, 1)),) * (history - 1)  # keys before j, or key 0 standing in before itself
        last = min(j + 1, budgets[-1])  # j can be at most the (j + 1)-th key
        here = best[(slice(warmup, last + 1), *earlier, j)]
        best[(slice(warmup + 1, last + 2), *earlier[1:], j, slice(j + 1, None))] = np.min(
            here[..., None] + cost[(*earlier, j, slice(j + 1, None))], axis=1
        )

    plans = {}
    for budget in budgets:
        closing = best[budget + 1, ..., end]
        if np.isinf(closing.min()):
            continue
        keys = [*map(int, np.unravel_index(closing.argmin(), closing.shape)), end]
        for m in range(budget, warmup + history - 1, -1):  # the forgotten key is the one that attains the minimum
            oldest = best[(m, slice(None), *keys[: history - 1])][:end] + cost[(slice(None), *keys[:history])]
            keys.insert(0, int(oldest.argmin()))
        plans[budget] = [*range(warmup), *keys[warmup - budget - 1 : -1]]
    return plans


def _paper(cost: np.ndarray, warmup: int, budgets: Sequence[int]) -> Plans:
    """best[m, j], before[m, j]: least cost found for m keys ending in j, and the key before j on that path."""
    end = cost.shape[-1] - 1
    best = np.full((budgets[-1] + 2, end + 1), np.inf)
    before = np.zeros(best.shape, int)
    best[warmup, warmup - 1], before[warmup, warmup - 1] = 0, max(warmup - 2, 0)
    for m in range(warmup, budgets[-1] + 1):
        total = best[m, :end, None] + cost[before[m, :end], np.arange(end)]
        best[m + 1], before[m + 1] = total.min(0), total.argmin(0)

    plans = {}
    for budget in budgets:
        if np.isinf(best[budget + 1, end]):
            continue
        keys = [end]
        for m in range(budget + 1, warmup + 1, -1):
            keys.insert(0, int(before[m, keys[0]]))
        plans[budget] = [*range(warmup), *keys[:-1]]
    return plans


_SOLVERS = {"exact": _exact, "paper": _paper}
