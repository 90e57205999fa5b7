"""Weights against the recurrences and polynomials that they stand for."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpcache.predictors import AdamsBashforth, Chebyshev, FoCa, Hermite, Lagrange, Reuse, Taylor, Zeus

PREDICTORS = [Reuse(), *(Taylor(o) for o in range(4)), *(Lagrange(o) for o in range(4))]
PREDICTORS += [*(AdamsBashforth(o) for o in range(1, 5)), FoCa(), Zeus()]
keys_and_step = st.lists(st.integers(0, 60), min_size=1, max_size=7, unique=True).flatmap(
    lambda keys: st.tuples(st.just(sorted(keys)), st.integers(max(keys) + 1, 70))
)


def factors_recurrence(features, keys, step, order, since):
    """The authors' bookkeeping, one key after the other: every new factor is the difference to the previous key's."""
    factors = []
    for n, (feature, key) in enumerate(zip(features, keys)):
        new = [feature]
        if n and keys[n - 1] >= since:
            for old in factors[:order]:
                new.append((new[-1] - old) / (key - keys[n - 1]))
        factors = new
    distance = step - keys[-1]
    return sum(factor * distance**i / math.factorial(i) for i, factor in enumerate(factors))


@given(keys_and_step, st.integers(0, 3), st.integers(0, 3))
def test_taylor_is_the_incremental_recurrence(case, order, since):
    keys, step = case
    features = np.random.default_rng(0).normal(size=(len(keys), 5))
    weights = Taylor(order, since).weights(keys, step)
    expected = factors_recurrence(features, keys, step, order, since)
    predicted = np.array(weights) @ features[len(keys) - len(weights) :]
    np.testing.assert_allclose(predicted, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@given(keys_and_step, st.sampled_from(PREDICTORS))
def test_weights_sum_to_one_and_look_at_no_more_than_history(case, predictor):
    keys, step = case
    weights = predictor.weights(keys, step)
    assert 1 <= len(weights) <= min(len(keys), predictor.history)
    assert sum(weights) == pytest.approx(1, rel=1e-6, abs=1e-6 * max(map(abs, weights)))


@given(keys_and_step, st.integers(1, 3))
def test_taylor_reproduces_straight_lines_at_any_spacing(case, order):
    keys, step = case
    weights = Taylor(order).weights(keys, step)
    if len(weights) > 1:
        assert np.dot(weights, keys[-len(weights) :]) == pytest.approx(step, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("gap", [1, 3, 5])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_carries_the_leading_difference_of_its_degree(gap, order):
    # At even spacing the order-th factor of x**order is order! exactly, so the prediction's leading term is right.
    keys = [10 + gap * a for a in range(order + 1)]
    far = 10**6
    weights = Taylor(order).weights(keys, far)
    predicted = np.dot(weights, [float(key) ** order for key in keys])
    assert predicted == pytest.approx(float(far) ** order, rel=1e-3)


@given(keys_and_step, st.integers(0, 3))
def test_lagrange_reproduces_polynomials_of_its_degree(case, order):
    keys, step = case
    weights = Lagrange(order).weights(keys, step)
    used = np.array(keys[-len(weights) :], dtype=float) - keys[-1]
    for degree in range(len(weights)):
        scale = np.abs(weights) @ np.abs(used) ** degree + 1
        assert abs(np.dot(weights, used**degree) - float(step - keys[-1]) ** degree) < 1e-9 * scale


@pytest.mark.parametrize(
    ("order", "textbook"),
    [(1, [1]), (2, [-1 / 2, 3 / 2]), (3, [5 / 12, -16 / 12, 23 / 12]), (4, [-9 / 24, 37 / 24, -59 / 24, 55 / 24])],
)
def test_adams_bashforth_has_the_textbook_weights_after_a_key(order, textbook):
    assert AdamsBashforth(order).weights([3, 4, 5, 6], 6) == pytest.approx(textbook)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_integrates_polynomials_of_its_degree(order):
    keys, step = [0, 2, 4, 6], 9
    weights = AdamsBashforth(order).weights(keys, step)
    for degree in range(order):
        mean = ((step + 1) ** (degree + 1) - step ** (degree + 1)) / (degree + 1)
        assert np.dot(weights, [float(key) ** degree for key in keys[-order:]]) == pytest.approx(mean)


@pytest.mark.parametrize("bad", [lambda: Taylor(4), lambda: Taylor(-1), lambda: Lagrange(9), lambda: AdamsBashforth(0)])
def test_orders_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="order="):
        bad()


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.0])
def test_hermite_is_hicaches_formula(scale):
    """Written out by hand: H_1(y) = 2y and H_2(y) = 4y^2 - 2 on the factors of a quadratic."""
    keys, step = (2, 5, 7), 11
    h = [1.0, -2.0, 4.0]
    first = (h[2] - h[1]) / 2
    second = (first - (h[1] - h[0]) / 3) / 2
    y = scale * (step - 7)
    expected = h[2] + scale * 2 * y * first + scale**2 * (4 * y**2 - 2) / 2 * second
    weights = Hermite(2, scale=scale).weights(keys, step)
    assert sum(w * value for w, value in zip(weights, h)) == pytest.approx(expected)
    assert Hermite(0).weights(keys, step) == (1.0,) and sum(weights) == pytest.approx(1)


def test_hermite_takes_a_scale():
    with pytest.raises(ValueError, match="scale=0"):
        Hermite(scale=0.0)


@given(keys_and_step)
def test_foca_is_its_equations(case):
    """Eq. 6-8 one after the other, and exact on straight lines whatever the spacing."""
    keys, step = case
    weights = FoCa().weights(keys, step)
    if len(keys) < 3:
        assert np.dot(weights, keys[-len(weights) :]) == pytest.approx(step if len(keys) > 1 else keys[0])
        return
    F = np.random.default_rng(0).normal(size=(len(keys), 5))
    slope = (F[1:] - F[:-1]) / np.diff(keys)[:, None]
    h = step - keys[-1]
    forecast = 4 / 3 * F[-1] - 1 / 3 * F[-2] + 2 * h / 3 * slope[-1]
    ahead = (3 * forecast - 4 * F[-1] + F[-2]) / (2 * h)
    expected = F[-1] + h / 2 * (slope[-2] + ahead)
    np.testing.assert_allclose(np.array(weights) @ F[-3:], expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    assert np.dot(weights, keys[-3:]) == pytest.approx(step)


@given(keys_and_step, st.integers(0, 5), st.floats(0.01, 10), st.floats(0, 1))
def test_chebyshev_is_a_ridge_regression_and_a_line(case, degree, ridge, mix):
    """The ridge as rows that ask for zero coefficients; the polynomials as cosines."""
    keys, step = case
    F = np.random.default_rng(0).normal(size=(len(keys), 5))
    basis = np.cos(np.arange(degree + 1) * np.arccos(np.array([*keys, step]) / 35 - 1)[:, None])
    rows = np.vstack([basis[:-1], math.sqrt(ridge) * np.eye(degree + 1)])
    coefficients = np.linalg.lstsq(rows, np.vstack([F, np.zeros((degree + 1, 5))]), rcond=None)[0]
    line = F[-1]
    if len(keys) > 1:
        line = F[-1] + (F[-1] - F[-2]) * (step - keys[-1]) / (keys[-1] - keys[-2])
    expected = mix * basis[-1] @ coefficients + (1 - mix) * line
    weights = Chebyshev(70, degree, ridge, mix).weights(keys, step)
    np.testing.assert_allclose(weights @ F, expected, rtol=1e-7, atol=1e-7 * np.abs(expected).max())


def test_chebyshev_is_exact_on_its_polynomials_but_for_the_ridge():
    keys, step = [0, 1, 2, 4, 7, 11, 20, 30], 37
    value = np.polynomial.Chebyshev([3, -1, 0.5, 2, -0.25], [0, 50])
    predicted = np.dot(Chebyshev(50, ridge=1e-10, mix=1.0).weights(keys, step), value(np.array(keys)))
    assert predicted == pytest.approx(value(step), abs=1e-5)
    assert [len(Chebyshev(50, history=n).weights(keys, step)) for n in (1, 3)] == [1, 3]
    assert sum(Chebyshev(50, mix=1.0).weights(keys, 12)) == pytest.approx(1, abs=0.1)


def test_chebyshev_names_its_mistakes():
    for wrong in ({"degree": -1}, {"ridge": 0.0}, {"mix": 1.5}):
        with pytest.raises(ValueError, match=r"degree=.*ridge=.*mix="):
            Chebyshev(50, **wrong)


def test_zeus_alternates():
    weights = [Zeus().weights([3, 6], step) for step in (7, 8, 9, 10)]
    assert weights == [(-1, 2), (1,), (-1, 2), (1,)] and Zeus().weights([0], 1) == (1,)
