"""The planner against every schedule there is, and against the tensors that the DPCache authors released."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpcache.planner import path_cost, plan, plan_all

DATA = Path(__file__).parents[2] / "shared/data"
PUBLISHED = {name: DATA / f"pact_{name}_t50.npz" for name in ("flux_dev", "wan21_i2v")}


@pytest.fixture(params=PUBLISHED)
def published(request):
    if not PUBLISHED[request.param].exists():
        pytest.skip("the released cost tensors are not here")
    return np.load(PUBLISHED[request.param])["cost"]


@st.composite
def problems(draw, axes=(3, 4, 5)):
    """A random cost with holes and ties, a warm-up and a largest jump."""
    steps, ndim = draw(st.integers(1, 10)), draw(st.sampled_from(axes))
    steps = min(steps, 13 - ndim)  # all schedules are tried, and the axes multiply
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cost = rng.random((*[steps + draw(st.integers(0, 1))] * (ndim - 1), steps + 1))
    if draw(st.booleans()):
        cost = np.floor(4 * cost)
    cost[rng.random(cost.shape) < draw(st.sampled_from([0, 0.2, 0.6]))] = np.inf
    return cost, draw(st.integers(1, steps)), draw(st.sampled_from([None, 1, 2, 4]))


def cost_by_hand(cost, steps, warmup, max_jump=None):
    nodes = [*steps, cost.shape[-1] - 1]
    total = 0.0
    for a in range(warmup - 1, len(steps)):
        total += cost[tuple(nodes[max(b, 0)] for b in range(a + 2 - cost.ndim, a + 2))]
        if max_jump and nodes[a + 1] - nodes[a] > max_jump:
            total = np.inf
    return total


def optimum(cost, budget, warmup, max_jump):
    rest = combinations(range(warmup, cost.shape[-1] - 1), budget - warmup)
    return min(cost_by_hand(cost, [*range(warmup), *steps], warmup, max_jump) for steps in rest)


def paper_by_hand(cost, warmup, max_jump):
    """The recurrence of DPCache, one number at a time."""
    end = cost.shape[-1] - 1
    best, paths = {(warmup, warmup - 1): 0.0}, {(warmup, warmup - 1): list(range(warmup))}
    for m in range(warmup, end + 1):
        for k in range(warmup, end + 1):
            for j in range(max(warmup - 1, k - (max_jump or end)), k):
                if (m, j) in best:
                    path = paths[m, j]
                    total = best[m, j] + cost[path[-2] if len(path) > 1 else 0, j, k]
                    if total < best.get((m + 1, k), np.inf):
                        best[m + 1, k], paths[m + 1, k] = total, [*path, k]
    return {m: paths[m + 1, end][:-1] for m in range(warmup, end + 1) if (m + 1, end) in best}


@given(problems())
@settings(max_examples=80)
def test_exact_is_the_best_of_all_schedules(problem):
    cost, warmup, max_jump = problem
    steps = cost.shape[-1] - 1
    plans = plan_all(cost, warmup, max_jump=max_jump)
    for budget in range(warmup, steps + 1):
        best = optimum(cost, budget, warmup, max_jump)
        assert (budget in plans) == np.isfinite(best)
        if budget in plans:
            chosen = plans[budget]
            assert len(chosen) == budget and chosen[:warmup] == list(range(warmup))
            assert path_cost(cost, chosen, warmup) == pytest.approx(best)
            assert cost_by_hand(cost, chosen, warmup, max_jump) == pytest.approx(best)


@given(problems(axes=(3,)))
@settings(max_examples=80)
def test_paper_follows_its_recurrence(problem):
    cost, warmup, max_jump = problem
    assert plan_all(cost, warmup, "paper", max_jump) == paper_by_hand(cost, warmup, max_jump)


@given(problems(), st.sampled_from(["exact", "paper"]))
@settings(max_examples=40)
def test_plan_is_plan_all_at_one_budget(problem, solver):
    cost, warmup, max_jump = problem
    cost = cost[(0,) * (cost.ndim - 3)] if solver == "paper" else cost
    plans = plan_all(cost, warmup, solver, max_jump)
    for budget in range(warmup, cost.shape[-1]):
        if budget in plans:
            assert plan(torch.from_numpy(cost), budget, warmup, solver, max_jump) == plans[budget]
        else:
            with pytest.raises(ValueError, match=f"budget={budget}: no schedule"):
                plan(cost, budget, warmup, solver, max_jump)


def test_solvers_agree_when_the_cost_has_no_memory():
    cost = np.broadcast_to(np.random.default_rng(0).random((1, 20, 21)), (20, 20, 21))
    assert plan_all(cost) == plan_all(cost, solver="paper")


def test_longer_history_that_is_not_used_changes_nothing():
    cost = np.random.default_rng(0).random((15, 16, 16))
    assert plan_all(np.broadcast_to(cost, (15, *cost.shape)), warmup=2) == plan_all(cost, warmup=2)


def test_exact_is_never_worse_on_the_published_costs(published):
    for max_jump in (15, None):
        exact, paper = plan_all(published, max_jump=max_jump), plan_all(published, solver="paper", max_jump=max_jump)
        assert paper and exact.keys() >= paper.keys()
        for budget, steps in paper.items():
            assert path_cost(published, exact[budget]) <= path_cost(published, steps) * (1 + 1e-12)


def test_plans_on_the_published_cost_are_the_published_schedules():
    if not PUBLISHED["flux_dev"].exists():
        pytest.skip("the released cost tensors are not here")
    cost = np.load(PUBLISHED["flux_dev"])["cost"]
    assert plan(cost, 13, 3, "paper", 15) == [0, 1, 2, 4, 7, 10, 14, 19, 23, 28, 34, 40, 45]
    steps = plan(cost, 9, 3, "paper", 15)
    assert steps == [0, 1, 2, 5, 9, 14, 21, 28, 38]
    assert path_cost(cost, steps) == pytest.approx(1564.1250, abs=5e-5)
    assert path_cost(cost, plan(cost, 9, max_jump=15)) == pytest.approx(1555.9797, abs=5e-5)


ONES = np.ones((6, 7, 7))


@pytest.mark.parametrize(
    ("cost", "settings", "message"),
    [
        (ONES, dict(budget=2), "budget=2: must lie in 3..6"),
        (ONES, dict(budget=7), "budget=7: must lie in 3..6"),
        (ONES, dict(budget=4, warmup=0), "warmup=0: must lie in 1..6"),
        (ONES, dict(budget=4, warmup=7), "warmup=7: must lie in 1..6"),
        (ONES, dict(budget=4, solver="greedy"), "solver='greedy': must be one of exact, paper"),
        (ONES, dict(budget=4, max_jump=0), "max_jump=0: must be at least 1"),
        (ONES, dict(budget=3, max_jump=2), r"budget=3: no schedule .* feasible budgets: \[4, 5, 6\]"),
        (ONES * np.inf, dict(budget=3), "feasible budgets: none"),
        (ONES[0], dict(budget=4), r"cost of shape \(7, 7\)"),
        (ONES[:5], dict(budget=4), r"cost of shape \(5, 7, 7\)"),
        (ONES * np.nan, dict(budget=4), "NaN"),
        (np.ones((6, 6, 6, 7)), dict(budget=4, solver="paper"), "three axes, not 4"),
    ],
)
def test_mistakes_are_named(cost, settings, message):
    with pytest.raises(ValueError, match=message):
        plan(cost, **settings)


@pytest.mark.parametrize("steps", [[], [0, 1, 3], [0, 1, 2, 2], [0, 1, 2, 6], [1, 2, 3]])
def test_path_cost_refuses_what_is_not_a_schedule(steps):
    with pytest.raises(ValueError, match="steps="):
        path_cost(ONES, steps)
