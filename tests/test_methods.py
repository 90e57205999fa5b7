"""Budgets and rules of the schedules, and the method constructors."""

import shutil
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.ab_cache import ab_cache
from baselines.fewer_steps import fewer_steps
from baselines.foca import foca
from baselines.fora import fora
from baselines.full import full
from baselines.hicache import hicache
from baselines.solver import solver
from baselines.spectrum import growing_gaps, spectrum
from baselines.taylorseer import taylorseer
from baselines.teacache import count_computed, find_threshold, fit_polynomial, teacache
from baselines.uniform_skip import uniform_skip
from baselines.zeus import zeus
from dpcache.planned import dpcache
from dpcache.schedules import EvenlySpaced, Interval, Schedule
from eval import methods

budgets = st.integers(2, 80).flatmap(
    lambda T: st.tuples(st.integers(1, T).flatmap(lambda K: st.tuples(st.integers(1, K), st.just(K))), st.just(T))
)


@given(budgets)
def test_evenly_spaced_spends_the_budget_exactly_and_evenly(case):
    (warmup, budget), T = case
    steps = EvenlySpaced(budget, T, warmup).steps
    assert len(steps) == budget and steps[:warmup] == list(range(warmup)) and steps[-1] < T
    gaps = [b - a for a, b in zip(steps[warmup - 1 :], [*steps[warmup:], T])]
    assert max(gaps) - min(gaps) <= 1


@given(budgets)
def test_growing_gaps_spend_the_budget_exactly_and_grow(case):
    (warmup, budget), T = case
    steps = growing_gaps(budget, T, warmup)
    gaps = [b - a for a, b in pairwise(steps)]
    assert len(steps) == budget and steps[:warmup] == list(range(warmup)) and steps[-1] < T and gaps == sorted(gaps)


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        (uniform_skip(10, 50), list(range(0, 50, 5))),
        (fora(10, 50), list(range(0, 50, 5))),
        (fora(11, 50, interval=5), [0, *range(4, 50, 5)]),  # the authors count back from the last step
        (taylorseer(10, 50, interval=6), [0, 1, *range(2, 50, 6)]),
        (taylorseer(5, 50), [0, 1, 2, 18, 34]),
        (hicache(5, 50), [0, 1, 2, 18, 34]),
        (foca(5, 50), [0, 1, 2, 18, 34]),
        (ab_cache(5, 50), [0, 1, 2, 18, 34]),
        (zeus(5, 50), [0, 1, 2, 18, 34]),
        (spectrum(14, 50), [*range(5), 6, 8, 11, 15, 20, 25, 31, 38, 46]),  # the authors' N = 2 with alpha = 0.75
        (spectrum(10, 50), [*range(5), 6, 11, 19, 30, 44]),  # and 3
        (solver(4, 50, "UniPCMultistepScheduler"), [0, 1, 2, 3]),
        (full(4), [0, 1, 2, 3]),
        (fewer_steps(3, 50), [0, 1, 2]),
        (dpcache(5, 50, steps=[0, 1, 2, 10, 20]), [0, 1, 2, 10, 20]),
    ],
)
def test_computed_steps(method, steps):
    assert method.schedule.steps == steps


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uniform_skip(51, 50), "budget=51 must be between warmup=1"),
        (lambda: taylorseer(2, 50), "budget=2 must be between warmup=3"),
        (lambda: dpcache(2, 50), "budget=2 must be between warmup=3"),
        (lambda: spectrum(4, 50), "budget=4 must be between warmup=5"),
        (lambda: dpcache(9, 50, steps=[0, 1]), "steps has 2 entries: set budget=2"),
        (lambda: dpcache(4, 50, steps=[0, 2, 5, 9]), "does not begin with the warmup=3 steps"),
        (lambda: dpcache(5, 50, steps=[0, 1, 2, 5, 5]), "must increase strictly from 0"),
        (lambda: dpcache(4, 50, steps=[0, 1, 2, 50]), "end below num_inference_steps=50"),
        (lambda: Schedule([1, 2], 50), "must increase strictly from 0"),
        (lambda: fora(10, 50, interval=7), "interval=7 computes 8 steps: set budget=8"),
        (lambda: fora(10, 50, interval=0), "interval=0 must be at least 1"),
        (lambda: hicache(10, 50, scale=2.0), "scale=2.0 must be"),
        (lambda: solver(4, 50, "EulerScheduler"), "scheduler=EulerScheduler is not one of"),
        (lambda: fewer_steps(0, 50), "budget=0"),
        (lambda: teacache(1, 50), "budget=1 must be between 2"),
        (lambda: teacache(5, 50, warmup=5), "budget=5 must be between 6 .warmup=5 and the last step"),
        (lambda: teacache(5, 50, warmup=0), "warmup=0 must be at least 1"),
        (lambda: teacache(9, 50, polynomial="flux"), "polynomial=flux must be a list"),
        (lambda: taylorseer(9, 50, order=5), "order=5 is not one of 0..3"),
        (lambda: Schedule([], 50), "must increase strictly"),
        (lambda: Interval(5, 9, 50), "set budget=10"),
    ],
)
def test_mistakes_name_the_setting(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_teacache_spends_its_budget_on_recorded_trajectories():
    import numpy as np

    rng = np.random.default_rng(0)
    change = 0.05 + 0.1 * rng.random((6, 50))
    polynomial = fit_polynomial(change, 2 * change + 0.3 * change**2)
    assert np.polyval(polynomial, 0.1) == pytest.approx(0.203, rel=1e-3)
    for budget, warmup in ((5, 1), (7, 1), (10, 1), (10, 5), (17, 1), (30, 1), (30, 12)):
        threshold = find_threshold(change, polynomial, budget, warmup)
        assert count_computed(change, polynomial, threshold, warmup) == pytest.approx(budget, abs=0.5)
    assert count_computed(change, polynomial, 1e9, 5) == 6 and count_computed(change, polynomial, 0.0, 5) == 50


@pytest.fixture
def with_a_new_method(tmp_path, monkeypatch):
    """The folder of methods with one more file."""
    shutil.copytree(methods.FOLDER, tmp_path / "method")
    (tmp_path / "method" / "aardvark.yaml").write_text(
        "about: {title: Aardvark, year: 2020, group: forecast}\nmethod: {}\n"
    )
    monkeypatch.setattr(methods, "FOLDER", tmp_path / "method")
    methods.records.cache_clear()
    yield
    methods.records.cache_clear()


def test_the_board_orders_by_group_year_and_name():
    rows = ["mine", "dpcache order=1", "zeus", "full", "dpcache", "taylorseer", "fewer_steps", "foca", "fora"]
    expected = ["full", "fewer_steps", "fora", "foca", "taylorseer", "zeus", "dpcache", "dpcache order=1", "mine"]
    assert sorted(rows, key=methods.order) == expected
    assert sorted(["dpcache warmup=10", "dpcache warmup=9"], key=methods.order)[0] == "dpcache warmup=9"
    assert sorted(["10 b", "9 a"], key=methods.order) == ["9 a", "10 b"]


def test_a_new_method_takes_its_place_and_recolours_none(request):
    rows = ["fora", "taylorseer", "zeus", "toca"]
    before = methods.styles(rows)
    request.getfixturevalue("with_a_new_method")
    after = methods.styles([*rows, "aardvark"])
    assert list(after) == ["fora", "aardvark", "taylorseer", "zeus", "toca"]
    assert all((after[row].light, after[row].dark) == (before[row].light, before[row].dark) for row in rows)
    assert after["aardvark"].light == after["zeus"].light != after["fora"].light


def test_rows_of_one_group_are_told_apart():
    rows = [f"dpcache warmup={warmup}" for warmup in range(1, 8)]
    assert len({style.light for style in methods.styles(rows).values()}) == 7
    mixed = methods.styles([*rows, "fora"])
    assert len({style.light for style in mixed.values()}) == 2 and len({mixed[row].shape for row in rows}) == 7
