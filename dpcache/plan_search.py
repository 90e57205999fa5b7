"""The steps to compute, searched in the simulator."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from dpcache.gram import key_axes, path_costs
from dpcache.planner import plan as plan_exactly
from dpcache.predictors import Predictor
from dpcache.schedules import EvenlySpaced
from dpcache.simulator import Plan, Simulator, Trajectories, Weights, decibels


def search_plans(
    simulator: Simulator, weights: Weights, starts: Iterable[Sequence[int]], keep: int = 1
) -> list[tuple[float, Plan]]:
    """Improve plans until no move helps: each key to any free step, and each two neighbours by up to two steps each.

    Args:
        weights: of the predictor.
        starts: plans of K steps, each beginning with step 0, which stays.
        keep: how many of the plans found to return.

    Returns:
        The best different plans and their simulated decibels, best first.
    """
    known: dict[Plan, float] = {}

    def best(plans: Iterable[Plan]) -> Plan:
        plans = list(dict.fromkeys(plans))
        new = [plan for plan in plans if plan not in known]
        if new:
            known.update(zip(new, decibels(simulator.errors(weights.fill(new))).tolist()))
        return max(plans, key=known.__getitem__)

    for start in starts:
        plan = tuple(start)
        while (moved := best([plan, *_moves_of_one(plan, weights.steps)])) != plan or (
            moved := best([plan, *_moves_of_two(plan, weights.steps)])
        ) != plan:
            plan = moved
    return sorted(((score, plan) for plan, score in known.items()), reverse=True)[:keep]


def starting_plans(trajectories: Trajectories, predictor: Predictor, budget: int) -> list[Plan]:
    """Plans of K steps to search from: evenly spaced ones, some that grow denser towards the end, and the exact plan
    over open-loop costs, in which a step's error counts by how far it moves the final latents."""
    T = trajectories.steps
    starts = [tuple(EvenlySpaced(budget, T, warmup).steps) for warmup in (1, 3) if warmup <= budget]
    for power in (1.5, 2, 3):
        plan = [0]
        for key in range(1, budget):
            step = int(T * (1 - (1 - key / budget) ** power))
            plan.append(min(max(step, plan[-1] + 1), T - budget + key))
        starts.append(tuple(plan))
    if not predictor.sees_input:
        G, moved = trajectories.gram.mean(0)[:T, :T], trajectories.sampler.response[-1] ** 2
        starts.append(tuple(plan_exactly(path_costs(G, predictor, key_axes(predictor, T), moved), budget, warmup=1)))
    return starts


def _moves_of_one(plan: Plan, steps: int) -> list[Plan]:
    free = [step for step in range(1, steps) if step not in plan]
    return [tuple(sorted({*plan} - {key} | {step})) for key in plan[1:] for step in free]


def _moves_of_two(plan: Plan, steps: int, reach: int = 2) -> list[Plan]:
    found = []
    for one, two in pairwise(plan[1:]):
        rest = {*plan} - {one, two}
        for a in range(one - reach, one + reach + 1):
            for b in range(two - reach, two + reach + 1):
                moved = rest | {a, b}
                if len(moved) == len(plan) and min(a, b) > 0 and max(a, b) < steps:
                    found.append(tuple(sorted(moved)))
    return found
