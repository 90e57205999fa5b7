"""The simulator against real runs of models that answer errors linearly, and schedulers against their own steps."""

from dataclasses import replace
from itertools import combinations

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpcache
from dpcache.linear_sampler import read_sampler, unroll
from dpcache.method import Method
from dpcache.plan_search import search_plans
from dpcache.predictors import AdamsBashforth, Chebyshev, FoCa, Hermite, Lagrange, Reuse, Taylor, Zeus
from dpcache.recorded import Answers, Probe, at_times, random_probes, record
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.simulated import SimulatedPlan, SimulatedRuns, make_method, simulator_of, successive_halving
from dpcache.simulator import Simulator, Weights, decibels, fit_growth, fit_mixing, fit_response
from helpers.cases import case
from helpers.toy_runs import LINEAR, ToyRun, rates, ready
from helpers.tracing import watched

NOT_LINEAR = [
    (diffusers.DDIMScheduler, {"clip_sample": True}),
    (diffusers.DDPMScheduler, {"thresholding": True, "clip_sample": False}),
]
PREDICTORS = [Reuse(), Taylor(1), Taylor(2), Taylor(2, since=2), Hermite(2), Lagrange(2), Lagrange(3)]
PREDICTORS += [AdamsBashforth(2), AdamsBashforth(3), FoCa(), Zeus()]


def sampled(scheduler, calls, start, predictions):
    """The latents before every step and at the end, of the scheduler itself; its noise is always the same."""
    latents, noise = [start], [torch.Generator().manual_seed(5) for _ in start]
    for prediction, call in zip(predictions, calls):
        call = call | ({"generator": noise} if "generator" in call else {})
        latents.append(scheduler.step(prediction, sample=latents[-1], return_dict=False, **call)[0])
    return torch.stack(latents)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("steps", [16, 25])  # with fewer, solvers lower their order
def test_the_recurrence_gives_the_schedulers_own_trajectory(name, steps):
    kind, config, memory = LINEAR[name]
    scheduler, calls = ready(kind, config, steps)
    sampler = read_sampler(scheduler, calls)
    assert sampler.drive.shape == (steps, memory)
    random = torch.Generator().manual_seed(1)
    start = torch.randn(3, 2, 4, 4, generator=random, dtype=torch.float64)
    one, two = (torch.randn(steps, 3, 2, 4, 4, generator=random, dtype=torch.float64) for _ in range(2))
    first = sampled(scheduler, calls, start, one)
    second = sampled(*ready(kind, config, steps), start, two)
    moved, expected = (two - one).numpy(), (second - first).numpy()
    tolerance = dict(rtol=0, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(np.tensordot(sampler.response, moved, 1), expected, **tolerance)
    dx = np.zeros_like(expected)
    for s in range(steps):
        for back in range(min(memory, s + 1)):
            dx[s + 1] += sampler.carry[s, back] * dx[s - back] + sampler.drive[s, back] * moved[s - back]
    np.testing.assert_allclose(dx, expected, **tolerance)
    np.testing.assert_allclose(unroll(sampler.carry, sampler.drive), sampler.response, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in LINEAR if "DDPM" not in name and "SDE" not in name])
def test_start_and_response_give_the_latents_themselves_where_no_noise_is_added(name):
    kind, config, _ = LINEAR[name]
    scheduler, calls = ready(kind, config, 8)
    sampler = read_sampler(scheduler, calls)
    start, predictions = torch.randn(2, 1, 4, 4).double(), torch.randn(8, 2, 1, 4, 4).double()
    latents = sampled(scheduler, calls, start, predictions).numpy()
    expected = np.multiply.outer(sampler.start, start.numpy()) + np.tensordot(sampler.response, predictions.numpy(), 1)
    assert not sampler.noisy
    np.testing.assert_allclose(latents, expected, atol=2e-5 * np.abs(latents).max())


@pytest.mark.parametrize("name", ["DDPM", "SDE-DPM-Solver++"])
def test_schedulers_that_add_noise_are_marked(name):
    kind, config, _ = LINEAR[name]
    assert read_sampler(*ready(kind, config, 6)).noisy


@pytest.mark.parametrize("kind, config", NOT_LINEAR)
def test_a_scheduler_that_is_not_linear_is_refused_by_name(kind, config):
    with pytest.raises(dpcache.SettingError, match=f"^{kind.__name__}: .* linear") as error:
        read_sampler(*ready(kind, config, 8))
    assert "\n" not in str(error.value)


def test_reading_a_scheduler_leaves_it_as_it_was():
    scheduler, calls = ready(*LINEAR["UniPC 2"][:2], 6)
    read_sampler(scheduler, calls)
    assert scheduler.step_index is None and scheduler.last_sample is None
    assert not watched(scheduler)


@pytest.mark.parametrize("name", ["Euler, flow", "DDIM", "DPM-Solver++, flow", "UniPC, flow"])
@given(seed=st.integers(0, 10**6), steps=st.integers(6, 14))
@settings(max_examples=8)
def test_simulated_and_real_errors_of_a_linear_model_agree(name, seed, steps):
    toy, random = ToyRun(name, rates(steps), seed), np.random.default_rng(seed)
    recorded = toy.recorded()
    simulator = Simulator(recorded, toy.rates)
    predictors = [*PREDICTORS, Chebyshev(steps)]
    predictors += [recorded.least_squares(3, ridge=1e-4), recorded.least_squares(2, True, ridge=1e-4)]
    for predictor in random.choice(np.array(predictors, dtype=object), 4, replace=False):
        plan = [0, *sorted(1 + random.choice(steps - 1, random.integers(2, steps - 2), replace=False))]
        real = toy.error(plan, predictor)
        simulated = simulator.errors(Weights(predictor, steps).fill([plan]))[0, 0]
        assert simulated == pytest.approx(real, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["Euler, flow", "DDIM", "UniPC, flow"])
@pytest.mark.parametrize("predictor", ["closed1", "closed3", "closed2x"])
def test_weights_found_in_the_simulated_run_do_in_a_real_one_what_was_promised(name, predictor):
    toy = ToyRun(name, rates(12))
    simulator, plans = Simulator(toy.recorded(), toy.rates), [[0, 3, 4, 8], [0, 2, 5, 10]]
    promised, _ = simulator.closed_loop(plans, int(predictor[6]), predictor.endswith("x"))
    for plan, error in zip(plans, promised[:, 0]):
        method = make_method(simulator, predictor, plan)
        assert toy.error(plan, method.predictor) == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert simulator.predict_error(method) == pytest.approx(error, rel=1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_no_other_weights_end_a_skipped_step_closer_to_the_full_run(seed):
    random, steps = np.random.default_rng(seed), 9
    toy, plan = ToyRun("Euler, flow", rates(steps), seed), [0, 2, 5]
    truth = toy()[1]
    predictor = make_method(Simulator(toy.recorded(), toy.rates), "closed2", plan).predictor
    step = int(random.choice([s for s in range(steps) if s not in plan]))

    def off(table):
        """How far the latents after that step are from the full run's."""
        return np.linalg.norm(toy(plan, replace(predictor, table=table))[1][step + 1] - truth[step + 1])

    best = off(predictor.table)
    for _ in range(8):
        moved = [weight + 0.02 * random.standard_normal() for weight in predictor.table[step]]
        assert off(predictor.table | {step: tuple(moved)}) >= best * (1 - 1e-4)


def test_weights_of_the_input_take_an_input_that_is_known():
    toy = ToyRun("DDIM", rates(8))
    simulator = Simulator(replace(toy.recorded(), input_fits=False), toy.rates)
    with pytest.raises(dpcache.SettingError, match="it has another shape than the prediction"):
        simulator.closed_loop([[0, 3]], 1, sees_input=True)
    noisy = Simulator(ToyRun("DDPM", rates(8)).recorded(), toy.rates)
    with pytest.raises(dpcache.SettingError, match="it holds the scheduler's noise"):
        noisy.recorded.least_squares(1, sees_input=True)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 12), st.integers(0, 10**6))
def test_halving_finds_the_best_of_consistent_candidates_within_its_budget(candidates, runs, prompts, seed):
    random, spent = np.random.default_rng(seed), []
    size, loud = random.permutation(candidates) + 1.0, random.uniform(0.5, 2, prompts)

    def errors(number, start, limit):
        assert 0 <= start < limit <= prompts
        spent.append(limit - start)
        return size[number] * loud[start:limit] / 100

    best, found = successive_halving(candidates, errors, runs, prompts)
    assert best == size.argmin() and sum(map(len, found)) == sum(spent)
    one_each = 2 * candidates + candidates.bit_length()  # one prompt in every round
    assert sum(spent) <= max(runs, one_each) and len(found[best]) == max(map(len, found)) <= prompts


def test_a_plan_that_computes_every_step_has_no_error():
    toy = ToyRun("DDIM", rates(8))
    errors = Simulator(toy.recorded(), toy.rates).errors(Weights(Taylor(2), 8).fill([range(8)]))
    assert errors.max() <= 1e-9


@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_a_batch_of_plans_gives_what_they_give_one_by_one(seed):
    toy, random = ToyRun("UniPC, flow", rates(12)), np.random.default_rng(seed)
    simulator = Simulator(toy.recorded(), toy.rates)
    plans = [[0, *sorted(1 + random.permutation(11)[: random.integers(1, 8)])] for _ in range(5)]  # some shorter
    for predictor in (Taylor(2), AdamsBashforth(4), toy.recorded().least_squares(2, True)):
        together = simulator.errors(Weights(predictor, 12).fill(plans))
        alone = [simulator.errors(Weights(predictor, 12).fill([plan])) for plan in plans]
        np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-6)
    together, fill = simulator.closed_loop(plans, 3, True)
    for number, plan in enumerate(plans):
        alone, own = simulator.closed_loop([plan], 3, True)
        np.testing.assert_allclose(together[number], alone[0], rtol=1e-3, atol=1e-6)
        assert fill.table(number).keys() == own.table(0).keys() == set(range(12)) - set(plan)


def test_weights_are_those_of_the_predictor():
    for predictor in PREDICTORS:
        fill = Weights(predictor, 9).fill([[0, 2, 3, 6]])
        for step in (1, 4, 5, 7, 8):
            keys = [key for key in (0, 2, 3, 6) if key < step]
            expected = np.zeros(9)
            weights = predictor.weights(keys, step)
            expected[keys[len(keys) - len(weights) :]] = weights
            found = np.zeros(9)
            found[fill.keys(0, step)] = fill.table(0)[step]
            np.testing.assert_allclose(found, expected, atol=1e-12)


@given(st.integers(1, 14), st.integers(3, 60), st.integers(0, 99))
def test_probes_are_plans_and_the_long_parts_of_the_second_half_cover_the_run(number, steps, seed):
    probes = random_probes(number, steps, seed)
    assert len(probes) == number
    for plan, _ in probes:
        assert plan[0] == 0 and list(plan) == sorted(set(plan)) and plan[-1] < steps
    windows = [plan for plan, _ in probes[number - number // 2 :]]
    for turn, plan in enumerate(windows):
        low, high = np.linspace(1, steps, len(windows) + 1).round().astype(int)[turn : turn + 2].tolist()
        assert sum(low <= step < high for step in plan) == (low < high)
        assert all({step, step + 1, step + 2} & set(plan) for step in [*range(low - 2), *range(high, steps - 2)])


def test_the_response_of_a_linear_model_is_found_from_its_answers():
    toy = ToyRun("DDIM", rates(20))
    recorded = toy.recorded()
    (v, x), parts = toy(), []
    for plan, predictor in random_probes(12, 20):
        q, y = toy(plan, predictor)
        keys, size = list(plan), np.linalg.norm(x[-1])
        parts.append(Answers(np.array(keys), np.zeros(len(keys), int), (y - x)[keys] / size, (q - v)[keys] / size))
    response = fit_response(Answers.join(parts), recorded, knots=10, smooth=1e-6)
    units = recorded.remaining[0]
    np.testing.assert_allclose(response[2:-1] * units[2:-1], (toy.rates * units)[2:-1], atol=0.03)


def test_answers_that_point_elsewhere_than_their_errors_are_learnt():
    recorded, random = ToyRun("DDIM", rates(12)).recorded(), np.random.default_rng(0)
    r, n, remaining = recorded.leading, 600, recorded.remaining[0]
    rows = np.concatenate([recorded.predictions[0], recorded.states[0]]) / recorded.sizes[0]
    axes = recorded.directions[:, -r:].T @ rows
    turned, step, errors = random.normal(size=(r, r)), random.integers(0, 12, n), random.normal(size=(n, r))
    answers = rates(12)[step, None] * errors + errors @ turned / remaining[step, None]
    heard = Answers(step, np.zeros(n, int), errors @ axes, answers @ axes)
    mixing = fit_mixing(heard, recorded, rates(12), knots=3, ridge=1e-9)
    np.testing.assert_allclose(mixing * remaining[:, None, None], np.broadcast_to(turned, mixing.shape), atol=1e-3)


def test_a_mixing_that_only_stretches_is_a_response():
    toy = ToyRun("Euler, flow", rates(12))
    recorded, more = toy.recorded(), np.linspace(0.3, -0.2, 12)
    mixing = more[:, None, None] * np.eye(recorded.directions.shape[1])
    fill = Weights(Taylor(1), 12).fill([[0, 3, 4, 8], [0, 2, 5, 10]])
    stretched = Simulator(recorded, toy.rates, mixing)
    expected = Simulator(recorded, toy.rates + more)
    np.testing.assert_allclose(stretched.errors(fill), expected.errors(fill), rtol=1e-9)
    again = Simulator.unpack(stretched.pack())
    np.testing.assert_allclose(again.errors(fill), stretched.errors(fill), rtol=1e-6)  # kept in float32


def test_growth_counts_by_what_a_skipped_step_was_predicted_wrong():
    toy = ToyRun("Euler, flow", rates(8))
    recorded, fill = toy.recorded(), Weights(Reuse(), 8).fill([[0, 1, 2, 4, 5, 6, 7]])
    plain, grown = (Simulator(recorded, toy.rates, growth=g).errors(fill) for g in (None, np.full(8, 3.0)))
    wrong = (recorded.predictions[0, 2] - recorded.predictions[0, 3]) / recorded.sizes[0]
    more = 3 * (recorded.sampler.response[-1, 3] * np.linalg.norm(wrong)) ** 2
    np.testing.assert_allclose(grown**2 - plain**2, more, rtol=1e-4)


def test_growth_is_found_from_how_runs_ended():
    toy = ToyRun("DDIM", rates(20))
    plain, growth, probes = Simulator(toy.recorded(), toy.rates), np.linspace(9, 1, 20), []
    grown = replace(plain, growth=growth)
    for plan, predictor in random_probes(12, 20):
        errors = grown.errors(Weights(predictor, 20).fill([plan]))[0]
        probes.append(Probe(plan, predictor, np.arange(len(errors)), errors))
    np.testing.assert_allclose(fit_growth(probes, plain, knots=2, smooth=1e-3), growth, rtol=0.15)
    fill = Weights(Taylor(1), 20).fill([[0, 3, 4, 8]])
    again = Simulator.unpack(grown.pack())
    np.testing.assert_allclose(again.errors(fill), grown.errors(fill), rtol=1e-6)  # kept in float32


def test_predictions_between_latents_are_those_of_the_run():
    for name in ("Euler, flow", "DDIM", "DPM-Solver++, flow", "UniPC, flow"):
        toy = ToyRun(name, rates(12))
        v, x = toy()
        np.testing.assert_allclose(toy.sampler.predictions_between(x, v), v, rtol=1e-3, atol=1e-3 * np.abs(v).max())


def test_a_finer_run_is_taken_at_the_times_that_are_wanted():
    fine, coarse = np.linspace(1000, 2, 40), np.linspace(1000, 50, 8)
    path = np.stack([fine, fine**2], 1)  # two elements, one of them curved
    states = np.concatenate([path, [[0.0, 0.0]]])[None]
    predictions, states = at_times(path[None], states, fine, coarse)
    assert predictions.shape == (1, 8, 2) and states.shape == (1, 9, 2)
    np.testing.assert_allclose(predictions[0, :, 0], coarse, rtol=1e-6)
    np.testing.assert_allclose(predictions[0, :, 1], coarse**2, rtol=1e-2, atol=200)
    np.testing.assert_array_equal(states[0, 1:-1], predictions[0, 1:])
    np.testing.assert_array_equal(states[0, [0, -1]], [[1000, 1000**2], [0, 0]])


def test_the_best_of_all_plans_is_found():
    toy = ToyRun("Euler, flow", rates(12), seed=3)
    simulator, weights = Simulator(toy.recorded(), toy.rates), Weights(Taylor(1), 12)
    every = [(0, *rest) for rest in combinations(range(1, 12), 4)]
    best = decibels(simulator.errors(weights.fill(every))).max()
    score = lambda plans: decibels(simulator.errors(weights.fill(plans)))  # noqa: E731
    ((found, plan),) = search_plans(score, 12, [EvenlySpaced(5, 12).steps])
    assert found == pytest.approx(best) and found == pytest.approx(score([plan])[0])


def test_plans_of_every_kind_are_worth_a_run_unless_the_simulator_sees_no_hope(monkeypatch):
    monkeypatch.setattr("dpcache.simulated.HOPELESS", 3.0)
    toy = ToyRun("Euler, flow", rates(12), seed=3)
    recipe = SimulatedPlan(5, 12, predictors=("lsq2", "closed2", "closed2x"))
    trials = recipe.search(Simulator(toy.recorded(), toy.rates))
    plans = [(trial["predictor"], *trial["steps"]) for trial in trials]
    assert len(set(plans)) == len(plans) and all(len(trial["steps"]) == 5 for trial in trials)
    assert trials[0]["kind"] == "searched" and {trial["kind"] for trial in trials} >= {"searched", "exact"}
    hopeless = [trial["promised"] < trials[0]["promised"] - 3.0 for trial in trials]
    assert hopeless == sorted(hopeless) and 0 < sum(hopeless) < len(trials)
    assert trials[0]["promised"] == max(trial["promised"] for trial in trials)


CALL = {"height": 64, "width": 64, "max_sequence_length": 12}


def real_errors(pipe, method, recorded):
    return recorded.errors(sample(pipe, method, ["dog", "car"], [0, 1], decode=False, **CALL).latents.numpy())


def test_recorded_runs_of_a_pipeline_foretell_an_accelerated_run(pipe):
    recorded, answers, _, latents = record(pipe, [(["dog", "car"], [0, 1])], 10, random_probes(4, 10), **CALL)
    simulator = Simulator(recorded, fit_response(answers, recorded, knots=5))
    assert (recorded.steps, len(latents)) == (10, 2)
    assert recorded.errors(latents).max() <= 1e-6
    assert not watched(pipe.scheduler)
    method = Method(Schedule([0, 3, 6, 8], 10), "output", Taylor(1))
    real = np.exp(np.log(real_errors(pipe, method, recorded)).mean())
    assert simulator.predict_error(method) == pytest.approx(real, rel=0.15)


# Of models that return several tensors, one for each sample in a list, and of a scheduler that is handed back what it
# has returned beside the latents.
@pytest.mark.parametrize("family", ["ltx2", "z_image", "cogvideox"])
def test_unusual_pipelines_are_foretold(family):
    calibration = case(family).calibration((SimulatedRuns(),))
    simulator = simulator_of(calibration)
    for plan, predictor in [([0, 1, 2, 4, 6, 7], Reuse()), ([0, 2, 4, 5, 6], Taylor(1))]:
        method = Method(Schedule(plan, 8), "output", predictor)
        real = decibels(simulator.recorded.errors(calibration.rerun(case(family).pipe, method)[0]))
        assert simulator.predict_error(method) == pytest.approx(10 ** (-real / 20), rel=0.15)


def test_a_calibration_foretells_errors_once_it_holds_a_simulator(pipe):
    calibration = dpcache.calibrate(pipe, ["dog", "car"], 10, (SimulatedRuns(),), batch_size=2, **CALL)
    method = Method(Schedule([0, 3, 6, 8], 10), "output", Taylor(1))
    recorded = simulator_of(calibration).recorded
    real = np.exp(np.log(real_errors(pipe, method, recorded)).mean())
    assert dpcache.predict_error(calibration, method) == pytest.approx(real, rel=0.15)
    with pytest.raises(dpcache.SettingError, match="SimulatedRuns"):
        dpcache.predict_error(dpcache.calibrate(pipe, ["dog"], 10, (), **CALL), method)


def test_a_simulator_comes_back_from_its_array():
    toy = ToyRun("UniPC, flow", rates(10))
    simulator = Simulator(toy.recorded(), toy.rates)
    again = Simulator.unpack(simulator.pack())
    fill = Weights(Taylor(2), 10).fill([[0, 3, 5, 8], [0, 1, 6, 7]])
    np.testing.assert_allclose(again.errors(fill), simulator.errors(fill), rtol=1e-6)  # kept in float32


def test_the_recipe_takes_the_finalist_that_real_runs_confirm_and_counts_what_it_took(pipe):
    settings = {"predictors": ["lagrange2", "lsq2x", "ab2"], "probes": 4, "finalists": 3, "trajectories": 4}
    recipe = dpcache.recipe("dpcache_sim", 4, 10, **settings)
    calibration = dpcache.calibrate(pipe, ["dog", "car"], 10, recipe.statistics, batch_size=2, **CALL)
    probed = sum(2 * len(plan) for plan, _ in random_probes(4, 10)) / 10
    assert calibration.took(recipe.statistics) == pytest.approx(2 + probed)
    method = recipe.build(pipe, calibration)
    confirmed = [trial for trial in method.decided["trials"] if "confirmed" in trial]
    assert {"searched", "exact"} <= {trial["kind"] for trial in confirmed}
    best = max(confirmed, key=lambda trial: (trial["prompts"], trial["confirmed"]))  # the rest were dropped before
    assert len(confirmed) == 3 and method.decided["steps"] == best["steps"] and len(best["steps"]) == 4
    simulator = simulator_of(calibration, probes=4)
    real = decibels(real_errors(pipe, method, simulator.recorded))
    assert best["confirmed"] == pytest.approx(real, abs=0.05)
    assert 4 * sum(trial["prompts"] for trial in confirmed) / 10 <= settings["trajectories"]


@pytest.mark.parametrize(
    "method, message",
    [
        (Method(EvenlySpaced(4, 8), "modules", Reuse()), "site=modules"),
        (Method(EvenlySpaced(4, 8), "stack", Reuse()), "site=stack"),
        (Method(EvenlySpaced(4, 9), "output", Reuse()), "num_inference_steps=9"),
        (dpcache.recipe("dicache", 4, 8, threshold=0.1), "decides online"),
    ],
)
def test_methods_that_cannot_be_simulated_are_refused(method, message):
    toy = ToyRun("DDIM", rates(8))
    with pytest.raises(dpcache.SettingError, match=message):
        Simulator(toy.recorded(), toy.rates).predict_error(method)
