"""Times `l1_cost` against a plain loop over its entries, and the planner: ``python -m scripts.bench_pact``."""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dpcache.pact import l1_cost
from dpcache.planner import plan_all
from dpcache.predictors import Taylor


def loop_cost(features: torch.Tensor, order: int) -> np.ndarray:
    """The cost tensor by a loop: one Taylor evaluation and one mean for each entry, with the differences computed once
    for each pair of keys. Only entries with i >= order - 1."""
    steps = len(features)
    end = 0.8 * evaluate(differences(features, range(steps - order - 1, steps)), 1) + 0.2 * features[-order - 1 :].mean(
        0
    )
    cost = np.full((steps, steps + 1, steps + 1), np.inf)
    for j in range(order, steps):
        for i in range(order - 1, j):
            factors, total = differences(features, [*range(i - order + 1, i + 1), j]), 0.0
            for k in range(j + 1, steps + 1):
                true = end if k == steps else features[k]
                total += (evaluate(factors, k - j) - true).abs().mean().item()
                cost[i, j, k] = total
    return cost


def differences(features: torch.Tensor, keys: Iterable[int]) -> list[torch.Tensor]:
    """Taylor factors at the newest key, lowest order first."""
    keys, column = list(keys), [features[key] for key in keys]
    factors = [column[-1]]
    for order in range(1, len(keys)):
        gaps = [b - a for a, b in pairwise(keys[order - 1 :])]
        column = [(b - a) / gap for (a, b), gap in zip(pairwise(column), gaps, strict=True)]
        factors.append(column[-1])
    return factors


def evaluate(factors: Sequence[torch.Tensor], distance: int) -> torch.Tensor:
    return sum(factor * distance**order / math.factorial(order) for order, factor in enumerate(factors))


def seconds(function: Callable, *args, **kwargs) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps T of the trajectory")
    parser.add_argument("--elements", type=int, default=200_000, help="feature elements per step")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, for both")
    parser.add_argument("--order", type=int, default=2, help="Taylor order")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each, taken in turn; the fastest counts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    features = torch.randn(args.steps, args.elements, generator=torch.manual_seed(0)).cumsum(0)
    runs = [
        (seconds(loop_cost, features, args.order), seconds(l1_cost, features, Taylor(args.order)))
        for _ in range(args.repeats)
    ]
    loop, ours = (min(run[which][0] for run in runs) for which in (0, 1))
    expected, cost = runs[0][0][1], runs[0][1][1]
    known = np.isfinite(expected)
    difference = np.abs(cost[known] / expected[known] - 1).max()
    print(f"l1_cost, T={args.steps}, {args.elements} float32 elements, {args.threads} threads, order {args.order}")
    print(f"{'loop s':>10}{'l1_cost s':>12}{'ratio':>8}{'max rel. diff.':>17}")
    print(f"{loop:>10.2f}{ours:>12.2f}{loop / ours:>8.1f}{difference:>17.1e}\n")

    print(f"{'planner, all budgets':<24}{'exact s':>10}{'paper s':>10}")
    rng = np.random.default_rng(0)
    for steps, axes in ((50, 3), (250, 3), (50, 4)):
        cost = rng.random((*[steps] * (axes - 1), steps + 1))
        paper = f"{seconds(plan_all, cost, solver='paper')[0]:.3f}" if axes == 3 else "-"
        print(f"{f'T={steps}, {axes} axes':<24}{seconds(plan_all, cost)[0]:>10.3f}{paper:>10}")


if __name__ == "__main__":
    main()
