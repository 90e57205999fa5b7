"""Recovery of a trajectory from its costs, where the trajectory is known, and on the tensors that were published."""

import numpy as np
import pytest

from dpcache import SettingError
from dpcache.gram import path_costs
from dpcache.planner import plan
from dpcache.predictors import Lagrange, Taylor
from dpcache.recover import recover
from test_planner import PUBLISHED

T = 16


@pytest.fixture(scope="module")
def points():
    """A curve in four dimensions that is smooth but for a kink, on a straight line that is long in comparison."""
    rng = np.random.default_rng(3)
    t = np.arange(T)[:, None]
    curve = np.cos(t * rng.uniform(0.1, 0.4, 4) + rng.uniform(0, 6, 4)) * [9, 5, 3, 2] + np.maximum(t - 9, 0) ** 1.5
    return curve + rng.normal(0, 0.1, (T, 4)) + t * rng.normal(0, 2, 4) + 40


@pytest.fixture(scope="module")
def cost(points):
    """The cost tensor of the points with Euclidean errors, one entry at a time."""
    order2 = Taylor(2)

    def predicted(keys, step):
        weights = order2.weights(keys, step)
        return sum(w * points[key] for w, key in zip(weights, keys[-len(weights) :]))

    end = 0.8 * predicted([T - 3, T - 2, T - 1], T) + 0.2 * points[-3:].mean(0)
    cost = np.full((T, T + 1, T + 1), np.inf)
    for i in range(1, T):
        for j in range(i + 1, min(i + 8, T)):
            total = 0.0
            for step in range(j + 1, T + 1):
                total += np.linalg.norm(predicted([i - 1, i, j], step) - (end if step == T else points[step]))
                cost[i, j, step] = total
    return cost


@pytest.fixture(scope="module")
def recovered(cost):
    return recover(cost, dimensions=6, iterations=1500)


def distances(points):
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_the_points_come_back_up_to_a_rotation_and_a_constant(points, recovered):
    assert recovered.error < 0.01 and recovered.held_out < 0.03 and recovered.held_out_end < 0.03
    assert recovered.points.shape == (T, 6) and not recovered.points[0].any()
    ratio = distances(recovered.points)[~np.eye(T, dtype=bool)] / distances(points)[~np.eye(T, dtype=bool)]
    assert ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("other", [Taylor(1), Lagrange(2)])
def test_errors_and_plans_of_a_predictor_that_was_not_measured_are_those_of_the_truth(points, recovered, other):
    truth, found = (path_costs(gram, other, 3) for gram in (points @ points.T, recovered.gram))
    moves = np.isfinite(truth) & (truth > 1e-6)
    assert np.abs(np.log(found[moves] / truth[moves])).mean() < 0.03
    assert plan(found, 6) == plan(truth, 6)


def test_costs_above_the_ceiling_change_nothing(cost):
    spoiled = np.where(cost > 60, cost * np.random.default_rng(0).uniform(1, 9, cost.shape), cost)
    a, b = (recover(tensor, ceiling=60, dimensions=3, iterations=20) for tensor in (cost, spoiled))
    assert a.fitted == b.fitted and np.array_equal(a.points, b.points)
    assert a.fitted < recover(cost, dimensions=3, iterations=1).fitted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cost": np.ones((5, 6))}, "shape"),
        ({"dimensions": 0}, "dimensions=0"),
        ({"dimensions": T + 1}, "dimensions=17"),
        ({"iterations": 0}, "iterations=0"),
        ({"held_out": 1}, "held_out=1"),
        ({"ceiling": 1e-9}, "0 usable increments"),
    ],
)
def test_a_setting_out_of_range_is_named(cost, settings, message):
    with pytest.raises(SettingError, match=message):
        recover(**{"cost": cost, "dimensions": 6} | settings)


@pytest.mark.parametrize(
    ("name", "ceiling"), [("flux_dev", 3000), pytest.param("wan21_i2v", 1e9, marks=pytest.mark.ci)]
)
def test_a_published_tensor_is_explained_to_a_few_per_cent(name, ceiling):
    if not PUBLISHED[name].exists():
        pytest.skip("the released cost tensors are not here")
    result = recover(np.load(PUBLISHED[name])["cost"], ceiling=ceiling, iterations=300)
    assert result.error < 0.02 and result.held_out < 0.04 and result.held_out_end < 0.04
