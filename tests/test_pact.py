"""L1 cost tensors against a loop that evaluates one entry at a time."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpcache.pact import l1_cost
from dpcache.planner import path_cost, plan


def taylor(keys, features, step):
    """Taylor prediction with differences of differences, each over the distance to the key before."""
    factors, total, distance = list(features), features[-1], step - keys[-1]
    for order in range(1, len(keys)):
        gaps = [b - a for a, b in pairwise(keys[order - 1 :])]
        factors = [(b - a) / gap for (a, b), gap in zip(pairwise(factors), gaps, strict=True)]
        total = total + distance**order / math.factorial(order) * factors[-1]
    return total


class Taylor:
    def __init__(self, order):
        self.history = order + 1

    def weights(self, keys, step):
        keys = keys[-self.history :]
        return taylor(keys, np.eye(len(keys)), step).tolist()


class OldestLeftOut(Taylor):
    """Returns fewer weights than there are keys."""

    def weights(self, keys, step):
        return super().weights(keys[-2:], step)


def trajectory(steps, shape=(7, 5), seed=0):
    """A smooth random feature trajectory, (T, *shape)."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 3, steps)[:, None]
    a, b, c = rng.standard_normal((3, 1, math.prod(shape)))
    return torch.from_numpy((a * np.sin(time + b) + c * time).reshape(steps, *shape)).float()


def cost_by_hand(features, order, max_lookback=None, path_aware=True):
    x = features.double().numpy().reshape(len(features), -1)
    steps, last = len(x), list(range(max(0, len(x) - order - 1), len(x)))
    x = np.vstack([x, 0.8 * taylor(last, x[last], steps) + 0.2 * x[last].mean(0)])
    cost = np.full((steps, steps + 1, steps + 1), np.inf)
    for j in range(steps):
        for i in range(max(0, j - (max_lookback or steps)), max(j, 1)):
            before = i if path_aware else j - 1
            keys = sorted({key for key in [*range(before - order + 1, before + 1), j] if key >= 0})[-order - 1 :]
            total = 0.0
            for k in range(j + 1, steps + 1):
                total += np.abs(taylor(keys, x[keys], k) - x[k]).mean()
                cost[i, j, k] = total
    return cost


@given(st.integers(2, 12), st.integers(0, 3), st.sampled_from([None, 1, 3]), st.booleans(), st.integers(1, 40))
@settings(max_examples=40)
def test_every_entry_is_that_of_a_loop_by_hand(steps, order, max_lookback, path_aware, chunk):
    features = trajectory(steps)
    cost = l1_cost(features, Taylor(order), max_lookback, chunk, path_aware=path_aware)
    assert cost.shape == (steps, steps + 1, steps + 1) and cost.dtype == np.float64
    np.testing.assert_allclose(cost, cost_by_hand(features, order, max_lookback, path_aware), rtol=1e-5, atol=1e-5)


def test_more_entries_than_are_computed_at_a_time_are_those_of_a_loop_by_hand():
    features = trajectory(34)
    np.testing.assert_allclose(l1_cost(features, Taylor(2)), cost_by_hand(features, 2), rtol=1e-5, atol=1e-5)


def test_chunks_only_change_rounding():
    features, whole = trajectory(12), l1_cost(trajectory(12), Taylor(2), chunk=10**6)
    for chunk in (1, 2, 34, 35, 36):
        np.testing.assert_allclose(l1_cost(features, Taylor(2), chunk=chunk), whole, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_computed_in_float32(dtype):
    features = (1e4 * trajectory(10)).to(dtype)  # the predictions overflow float16
    np.testing.assert_allclose(l1_cost(features, Taylor(2)), l1_cost(features.float(), Taylor(2)), rtol=1e-5)


def test_features_need_not_be_contiguous():
    features = trajectory(8)
    np.testing.assert_array_equal(
        l1_cost(features.transpose(1, 2), Taylor(1), chunk=35),
        l1_cost(features.transpose(1, 2).contiguous(), Taylor(1), chunk=35),
    )


def test_end_point_cost_is_the_last_term_of_the_sum():
    total, end = (l1_cost(trajectory(9), Taylor(2), cumulative=c) for c in (True, False))
    allowed = np.isfinite(end)
    assert (allowed == np.isfinite(total)).all()
    np.testing.assert_allclose(np.where(allowed, end, 0).cumsum(2)[allowed], total[allowed])


def test_a_line_costs_nothing_once_two_keys_are_known():
    features = torch.arange(10.0)[:, None] * torch.randn(1, 20, generator=torch.manual_seed(0))
    cost = l1_cost(features, Taylor(2))[:, 1:, :-1]
    assert cost[np.isfinite(cost)].max() < 1e-4


@pytest.mark.parametrize("order", [1, 2, 3])
def test_authors_entries(order):
    """Where the authors' tensor is finite: the forced moves, and i >= order - 1 with j >= order."""
    cost = l1_cost(trajectory(14), Taylor(order), max_lookback=4, warmup=order + 1)
    full = cost_by_hand(trajectory(14), order, max_lookback=4)
    np.testing.assert_allclose(cost[order - 1 :, order:], full[order - 1 :, order:], rtol=1e-5)
    for j in range(order):
        assert (cost[: j + 1, j, j + 1] == 0).all() and np.isinf(cost[:, j]).sum() == 14 * 15 - j - 1


@pytest.mark.parametrize("warmup", [1, 2, 3])
@pytest.mark.parametrize("path_aware", [True, False])
def test_costs_can_be_planned_from_any_warmup(warmup, path_aware):
    cost = l1_cost(trajectory(12), Taylor(2), path_aware=path_aware)
    for budget in range(warmup, 13):
        assert np.isfinite(path_cost(cost, plan(cost, budget, warmup), warmup))


def test_predictor_may_leave_out_old_keys():
    cost, linear = l1_cost(trajectory(8), OldestLeftOut(2)), l1_cost(trajectory(8), Taylor(1))
    np.testing.assert_allclose(cost[..., :-1], linear[..., :-1], rtol=1e-5)


@pytest.mark.parametrize(
    ("features", "settings", "message"),
    [
        (trajectory(1), {}, "T >= 2"),
        (trajectory(5).long(), {}, "must be floats"),
        (trajectory(5) / 0, {}, "features: must be finite"),
        (trajectory(5), dict(max_lookback=0), "max_lookback=0: must be at least 1"),
        (trajectory(5), dict(chunk=0), "chunk=0: must be at least 1"),
        (trajectory(5), dict(warmup=6), "warmup=6: must be at least 1 and at most 5"),
    ],
)
def test_mistakes_are_named(features, settings, message):
    with pytest.raises(ValueError, match=message):
        l1_cost(features, Taylor(2), **settings)
