"""Searches in the simulator for the steps to compute."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from dpcache.gram import key_axes, path_costs
from dpcache.planner import plan as plan_exactly
from dpcache.predictors import Predictor
from dpcache.recorded import Plan
from dpcache.schedules import EvenlySpaced
from dpcache.simulator import Simulator


def search_plans(
    score: Callable[[list[Plan]], np.ndarray], steps: int, starts: Iterable[Sequence[int]]
) -> list[tuple[float, Plan]]:
    """Improve plans until no move helps. A move takes one key to any other step, or two neighbouring keys by up to two
    steps each; moves of several keys that help are also tried together. With 100 steps and more, the keys of the three
    best starts are first moved on a grid of about fifty steps, and then the keys of the two best plans by less than the
    grid's spacing.

    Args:
        score: simulated decibels of N plans, (N,).
        steps: T.
        starts: plans of K steps, each beginning with step 0, which stays.

    Returns:
        The plans found, with their simulated decibels: one from every start, or from the two best ones.
    """
    known: dict[Plan, float] = {}
    mesh = max(steps // 50, 1)

    def ranked(plans: Iterable[Plan]) -> list[Plan]:
        """The best one first."""
        plans = list(dict.fromkeys(plans))
        new = [plan for plan in plans if plan not in known]
        if new:
            known.update(zip(new, score(new).tolist()))
        return sorted(plans, key=known.__getitem__, reverse=True)

    def anywhere(plan: Plan) -> list[Plan]:
        places = [(step,) for step in range(mesh, steps, mesh)]
        return [moved for key in plan[1:] for moved in _moved(plan, (key,), places, steps)]

    def nearby(plan: Plan) -> list[Plan]:
        by = range(1 - mesh, mesh)
        return [moved for key in plan[1:] for moved in _moved(plan, (key,), [(key + b,) for b in by], steps)]

    def both(plan: Plan) -> list[Plan]:
        by = range(-2, 3)
        pairs = [(one, two, [(one + a, two + b) for a in by for b in by]) for one, two in pairwise(plan[1:])]
        return [moved for one, two, places in pairs for moved in _moved(plan, (one, two), places, steps)]

    def improved(plan: Plan, *kinds: Callable[[Plan], list[Plan]]) -> Plan:
        """Moves of the first kind as long as they help, then one of the next kind, and so on."""
        while True:
            for moves in kinds:
                better = [move for move in ranked([plan, *moves(plan)]) if known[move] > known[plan]]
                moved = ranked([plan, *_together(plan, better)])[0]
                if moved != plan:
                    break
            else:
                return plan
            plan = moved

    found = [tuple(start) for start in starts]
    if mesh > 1:
        found = ranked(found)[:3]
    found = [improved(plan, anywhere) for plan in found]
    if mesh > 1:
        found = ranked(found)[:2]
    found = [improved(plan, *((nearby, both) if mesh > 1 else (anywhere, both))) for plan in found]
    return [(known[plan], plan) for plan in found]


def starting_plans(steps: int, budget: int) -> list[Plan]:
    """Plans of K steps to search from: evenly spaced ones, and some that grow denser towards the end."""
    starts = [tuple(EvenlySpaced(budget, steps, warmup).steps) for warmup in (1, 3) if warmup <= budget]
    for power in (1.5, 2, 3):
        plan = [0]
        for key in range(1, budget):
            step = int(steps * (1 - (1 - key / budget) ** power))
            plan.append(min(max(step, plan[-1] + 1), steps - budget + key))
        starts.append(tuple(plan))
    return starts


def open_loop_plan(simulator: Simulator, predictor: Predictor, budget: int) -> Plan:
    """The exact plan over open-loop costs. The error of each step is weighted by how far it moves the final latents.

    Args:
        predictor: one that does not see the input.
    """
    T = simulator.recorded.steps
    G = simulator.recorded.gram.mean(0)[:T, :T]
    return tuple(plan_exactly(path_costs(G, predictor, key_axes(predictor, T), simulator.moved), budget, warmup=1))


def _together(plan: Plan, moves: Sequence[Plan]) -> list[Plan]:
    """The plan after the first move, after the first two moves, and so on. Moves of a key that was already moved, or to
    a step that is taken, are left out."""
    found, moved = [], set(plan)
    for move in moves:
        gone, new = set(plan).difference(move), set(move).difference(plan)
        if gone <= moved and not new & moved:
            moved = moved - gone | new
            found.append(tuple(sorted(moved)))
    return found


def _moved(plan: Plan, keys: Plan, places: Iterable[Plan], steps: int) -> list[Plan]:
    """The plans in which `keys` are moved to other `places`, as far as these are free."""
    rest = set(plan) - set(keys)
    moved = (rest.union(place) for place in places if min(place) > 0 and max(place) < steps)
    return [tuple(sorted(plan)) for plan in moved if len(plan) == len(rest) + len(keys)]
