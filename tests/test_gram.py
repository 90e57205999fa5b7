"""Costs from the Gram matrix against errors of the features themselves, and plans against every schedule there is."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpcache.gram import gram, path_costs
from dpcache.method import Method
from dpcache.planner import path_cost, plan_all
from dpcache.predictors import AdamsBashforth, FoCa, Lagrange, LeastSquares, Reuse, Taylor, Zeus
from dpcache.schedules import Schedule

LINEAR = [Reuse(), Taylor(1), Taylor(2), Taylor(2, since=1), Taylor(3), Lagrange(1), Lagrange(2), AdamsBashforth(3)]
LINEAR += [FoCa(), Zeus()]
seeds = st.integers(0, 2**32 - 1)


def walk(seed, steps, size=40):
    """Features that drift, so that predictions from the past mean something."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(steps, size)).cumsum(0))


def predicted(features, predictor, keys, step):
    weights = predictor.weights(keys, step)
    return sum(w * features[k] for w, k in zip(weights, keys[len(keys) - len(weights) :]))


def squared_error(features, predictor, keys, step):
    return float((predicted(features, predictor, keys, step) - features[step]).square().mean())


def open_loop(features, predictor, schedule, step_weights):
    """Total error of a schedule that always predicts from true features, one step at a time."""
    total = 0.0
    for step in range(len(features)):
        if step not in schedule:
            keys = [key for key in schedule if key < step]
            total += step_weights[step] * squared_error(features, predictor, keys, step)
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gram_is_the_mean_of_products(dtype):
    features = walk(0, 7).reshape(7, 4, 5, 2).to(dtype)
    exact = torch.einsum("aijk,bijk->ab", features.double(), features.double()) / 40
    result = gram(features.transpose(1, 3))
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, exact, rtol=1e-12)
    np.testing.assert_array_equal(result, result.T)


@given(seeds, st.integers(1, 200))
@settings(max_examples=30)
def test_gram_does_not_depend_on_the_chunk(seed, chunk):
    features = walk(seed, 6, 97).float()
    np.testing.assert_allclose(gram(features, chunk), gram(features), rtol=1e-12)


def test_parts_are_joined_row_by_row():
    features = walk(1, 9)
    np.testing.assert_allclose(gram([features[:2], features[2:]], chunk=7), gram(features), rtol=1e-12)
    with pytest.raises(ValueError, match="of one shape"):
        gram([features, features[:, :3]])


@given(seeds, st.integers(2, 8), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=40)
def test_costs_with_the_input_are_those_of_a_regression_on_keys_and_input(seed, steps, keys, history):
    features, inputs = walk(seed, steps), walk(seed + 1, steps)
    matrix = gram([features, inputs])
    predictor = LeastSquares(matrix, history, ridge=0, sees_input=True)
    cost = path_costs(matrix, predictor, keys)
    for path in combinations(range(steps), keys):
        total, used = 0.0, path[-history:]
        for step in range(path[-1] + 1, steps):
            regressors = torch.cat([features[list(used)], inputs[step : step + 1]])
            weights = np.linalg.lstsq(regressors.T.numpy(), features[step].numpy())[0]
            assert predictor.weights(path, step) == pytest.approx(weights.tolist(), rel=1e-6, abs=1e-9)
            total += float((torch.from_numpy(weights) @ regressors - features[step]).square().mean())
            assert cost[(*path, step + 1)] == pytest.approx(total, rel=1e-6, abs=1e-9)


@given(seeds, st.sampled_from(["span", "zero"]))
@settings(max_examples=20)
def test_an_input_that_says_nothing_new_gets_no_weight(seed, kind):
    features = walk(seed, 6)
    inputs = features[:1].expand(6, -1) if kind == "span" else torch.zeros(6, features.shape[1])
    predictor = LeastSquares(gram([features, inputs.double()]), 3, sees_input=True)
    weights = predictor.weights((0, 1), 4)
    plain = LeastSquares(gram(features), 3)
    predicted = weights[0] * features[0] + weights[1] * features[1] + weights[2] * inputs[4]
    other = plain.weights((0, 1), 4)
    torch.testing.assert_close(predicted, other[0] * features[0] + other[1] * features[1], rtol=1e-3, atol=1e-3)
    assert np.isfinite(weights).all() and (kind == "span" or weights[2] == 0)


@given(seeds, st.integers(2, 7), st.integers(1, 3), st.sampled_from([*LINEAR, "least squares", "with input"]))
@settings(max_examples=40)
def test_coherent_costs_are_squared_lengths_of_summed_errors(seed, steps, keys, predictor):
    samples, inputs = ([walk(seed + n + shift, steps) for n in range(2)] for shift in (0, 9))
    mean = np.mean([gram(sample) for sample in samples], axis=0)
    if predictor == "with input":
        mean = np.mean([gram([sample, seen]) for sample, seen in zip(samples, inputs)], axis=0)
        predictor = LeastSquares(mean, history=1 + seed % 3, sees_input=True)
    elif predictor == "least squares":
        predictor = LeastSquares(mean, history=1 + seed % 3)
    step_weights = np.random.default_rng(seed).random(steps)
    cost = path_costs(mean, predictor, keys, step_weights, coherent=True)

    def error(sample, seen, path, step):
        weights = predictor.weights(path[-predictor.history :], step)
        rows = [*sample[list(path[-predictor.history :])]] + [seen[step]] * predictor.sees_input
        return sample[step] - sum(w * row for w, row in zip(weights, rows[-len(weights) :], strict=True))

    for *path, end in np.ndindex(cost.shape):
        if np.isinf(cost[(*path, end)]):
            continue
        real = path
        while len(real) > 1 and real[0] == real[1] == 0:
            real = real[1:]
        expected = 0.0
        for sample, seen in zip(samples, inputs):
            gap = range(real[-1] + 1, end)
            total = sum(step_weights[step] ** 0.5 * error(sample, seen, real, step) for step in gap)
            expected += 0.5 * float(torch.as_tensor(total, dtype=torch.float64).square().mean())
        assert cost[(*path, end)] == pytest.approx(expected, rel=1e-6, abs=1e-8)


@given(seeds, st.integers(1, 8), st.integers(1, 3), st.sampled_from([*LINEAR, "least squares"]), st.booleans())
@settings(max_examples=60)
def test_every_cost_is_the_mean_squared_error_over_all_samples(seed, steps, keys, predictor, weighted):
    samples = [walk(seed + n, steps) for n in range(2)]
    mean = np.mean([gram(sample) for sample in samples], axis=0)
    if predictor == "least squares":
        predictor = LeastSquares(mean, history=1 + seed % 3)
    step_weights = np.random.default_rng(seed).random(steps) if weighted else np.ones(steps)
    cost = path_costs(mean, predictor, keys, step_weights if weighted else None)
    assert cost.shape == (*[steps] * keys, steps + 1)
    for *path, end in np.ndindex(cost.shape):
        real = path
        while len(real) > 1 and real[0] == real[1] == 0:
            real = real[1:]
        complete = len(real) == keys or real[0] == 0
        if end <= path[-1] or not complete or any(a >= b for a, b in pairwise(real)):
            assert cost[(*path, end)] == np.inf
            continue
        expected = sum(
            step_weights[step] * np.mean([squared_error(sample, predictor, real, step) for sample in samples])
            for step in range(path[-1] + 1, end)
        )
        assert cost[(*path, end)] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(seeds, st.integers(1, 3), st.sampled_from(LINEAR))
@settings(max_examples=40)
def test_nothing_linear_beats_least_squares_on_its_own_features(seed, keys, other):
    matrix = gram(walk(seed, 9))
    best, cost = (path_costs(matrix, p, keys) for p in (LeastSquares(matrix, keys, ridge=1e-12), other))
    allowed = np.isfinite(cost)
    np.testing.assert_array_equal(allowed, np.isfinite(best))
    assert (best[allowed] <= cost[allowed] * (1 + 1e-6) + 1e-9).all()


def test_least_squares_weights_are_those_of_lstsq():
    features = walk(3, 12)
    predictor = LeastSquares(gram(features), history=4, ridge=0)
    for keys, step in [((0,), 5), ((0, 4), 5), ((1, 2, 3, 5), 11), ((0, 1, 2, 4, 7), 8)]:
        expected = np.linalg.lstsq(features[list(keys[-4:])].T.numpy(), features[step].numpy())[0]
        assert predictor.weights(keys, step) == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 3.0, 1e8])
def test_ridge_does_not_depend_on_the_scale_of_the_features(scale):
    features = walk(0, 8)
    weights, scaled = (LeastSquares(gram(f), ridge=1e-2).weights((0, 2, 5), 7) for f in (features, scale * features))
    assert weights == pytest.approx(scaled, rel=1e-9)
    assert weights != pytest.approx(LeastSquares(gram(features)).weights((0, 2, 5), 7), rel=1e-4)


def test_ridge_is_noise_on_the_keys():
    features, ridge, keys, rng = walk(0, 8, 10), 0.05, [1, 3, 4], np.random.default_rng(0)
    scale = (ridge * features[keys].square().mean()).sqrt()
    noisy = torch.cat([features] * 20000, 1)
    target = noisy[6].clone()
    noisy += scale * torch.from_numpy(rng.normal(size=noisy.shape))
    noisy[6] = target
    expected = LeastSquares(gram(noisy), ridge=0).weights(keys, 6)
    assert LeastSquares(gram(features), ridge=ridge).weights(keys, 6) == pytest.approx(expected, abs=0.02)


@given(seeds, st.sampled_from([0, 1, 2]), st.sampled_from(["few", "same", "zero"]), st.sampled_from([0, 1e-12, 1e-6]))
@settings(max_examples=40)
def test_singular_gram_matrices_stay_finite(seed, extra, kind, ridge):
    features = {"few": walk(seed, 8, 1 + extra), "same": walk(seed, 1).expand(8, -1), "zero": torch.zeros(8, 5)}[kind]
    matrix = gram(features)
    predictor = LeastSquares(matrix, 4, ridge)
    weights = np.array(predictor.weights((0, 1, 2, 3), 7))
    assert np.isfinite(weights).all() and np.abs(weights).max() < 1e6
    cost = path_costs(matrix, predictor)
    assert not np.isnan(cost).any() and (cost >= 0).all()
    np.testing.assert_array_equal(np.isfinite(cost), np.isfinite(path_costs(matrix, Reuse())))
    if kind == "same":
        assert weights == pytest.approx([0.25] * 4, rel=0.01)


def test_least_squares_keeps_its_own_copy_and_has_a_short_stable_name():
    matrix = gram(walk(0, 6))
    predictor, again = LeastSquares(matrix), LeastSquares(matrix.copy())
    before = predictor.weights((0, 1), 4)
    matrix[:] = 0
    assert predictor.weights((0, 1), 4) == before
    assert repr(predictor) == repr(again) != repr(LeastSquares(again.gram, history=2)) != repr(LeastSquares(matrix))
    assert len(repr(predictor)) < 70


@given(seeds, st.integers(2, 9), st.integers(1, 3), st.sampled_from([Reuse(), Taylor(2), Taylor(2, 1), "ls2", "ls3"]))
@settings(max_examples=40)
def test_exact_plan_has_the_smallest_open_loop_error_of_all_schedules(seed, steps, warmup, predictor):
    features, warmup = walk(seed, steps), min(warmup, steps)
    matrix = gram(features)
    if isinstance(predictor, str):
        predictor = LeastSquares(matrix, int(predictor[-1]))
    step_weights = np.random.default_rng(seed).random(steps)
    cost = path_costs(matrix, predictor, 3, step_weights)
    plans = plan_all(cost, warmup)
    assert sorted(plans) == list(range(warmup, steps + 1))
    for budget, schedule in plans.items():
        every = [[*range(warmup), *rest] for rest in combinations(range(warmup, steps), budget - warmup)]
        errors = [open_loop(features, predictor, steps_, step_weights) for steps_ in every]
        planned = path_cost(cost, schedule, warmup)
        assert planned == pytest.approx(errors[every.index(schedule)], rel=1e-9, abs=1e-9)
        assert planned == pytest.approx(min(errors), rel=1e-9, abs=1e-9)


def test_a_history_longer_than_the_keys_is_cut():
    matrix = gram(walk(0, 7))
    for long, short in [(Taylor(3), Taylor(1)), (LeastSquares(matrix, 4), LeastSquares(matrix, 2))]:
        np.testing.assert_array_equal(path_costs(matrix, long, keys=2), path_costs(matrix, short, keys=2))


FEATURES, EYE = walk(0, 4), np.eye(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gram(FEATURES.long()), "must be floats"),
        (lambda: gram(FEATURES[:, :0]), "must be floats"),
        (lambda: gram(FEATURES * torch.nan), "must be finite"),
        (lambda: path_costs(EYE[:3], Reuse()), r"gram of shape \(3, 4\)"),
        (lambda: path_costs(EYE * np.nan, Reuse()), "finite"),
        (lambda: path_costs(EYE, Reuse(), keys=0), "keys=0"),
        (lambda: path_costs(EYE, Reuse(), step_weights=np.ones(3)), r"step_weights of shape \(3,\)"),
        (lambda: path_costs(EYE, Reuse(), step_weights=-np.ones(4)), "none negative"),
        (lambda: path_costs(EYE, LeastSquares(np.eye(5))), "is for 5 steps, this Gram matrix has 4"),
        (lambda: LeastSquares(np.eye(5), sees_input=True), r"must be \(2T, 2T\)"),
        (lambda: Method(Schedule([0], 2), "stack", LeastSquares(EYE, sees_input=True)), "takes site=output"),
        (lambda: LeastSquares(EYE[:3]), r"gram of shape \(3, 4\)"),
        (lambda: LeastSquares(EYE, history=5), "history=5"),
        (lambda: LeastSquares(EYE, ridge=-1.0), "ridge=-1.0"),
        (lambda: LeastSquares(EYE).weights((0, 1), 4), "step=4 must lie between key 1 and the 4 steps"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
