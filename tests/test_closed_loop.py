"""Weights that are learnt while prompts run, against the runs that have them and against others."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest

import dpcache
from dpcache.closed_loop import ClosedLoopFit
from dpcache.method import Method
from dpcache.recorded import kept_elements
from dpcache.sampler import generate, sample
from dpcache.schedules import Schedule
from dpcache.simulated import SimulatedRuns, make_method, simulator_of
from helpers.cases import case
from helpers.tracing import watched

T, CALL, PLAN = 10, {"height": 64, "width": 64, "max_sequence_length": 12}, [0, 3, 6, 8]
PROMPTS, SEEDS = ["dog", "car", "tree"], [0, 1, 2]


@pytest.fixture(scope="module")
def calibration(pipe):
    statistics = (SimulatedRuns(4), SimulatedRuns(4, 4))
    return dpcache.calibrate(pipe, PROMPTS, T, statistics, seeds=SEEDS, batch_size=3, **CALL)


def fit_of(calibration, plan, history=2, sees_input=False, finer=1):
    """Before its first run; what the runs teach counts alone."""
    simulator = simulator_of(calibration, 4, finer)
    simulated = make_method(simulator, f"closed{history}{'x' * sees_input}", plan).predictor
    return ClosedLoopFit(simulator.recorded, plan, simulated, trust=0)


def learnt(pipe, calibration, history=2, sees_input=False, finer=1):
    """The fit after all prompts, what it has counted, and the errors in its runs."""
    fit = fit_of(calibration, PLAN, history, sees_input, finer)
    before = calibration.reran
    errors = fit.run(pipe, calibration, 0, len(PROMPTS))
    return fit, calibration.reran - before, errors


@pytest.mark.parametrize(("history", "sees_input"), [(1, False), (3, False), (2, True)])
def test_the_learnt_weights_do_what_they_did_when_they_were_learnt(pipe, calibration, history, sees_input):
    fit, spent, errors = learnt(pipe, calibration, history, sees_input)
    method = Method(Schedule(PLAN, T), "output", fit.predictor)
    np.testing.assert_allclose(calibration.errors(pipe, method), errors, rtol=1e-4)
    assert spent == pytest.approx(len(PROMPTS) * len(PLAN) / T)
    assert not watched(pipe.scheduler)


def test_no_other_weights_end_a_skipped_step_closer_to_the_full_run(pipe, calibration):
    fit, _, _ = learnt(pipe, calibration)
    states, random = fit.recorded.states, np.random.default_rng(0)
    step = 4

    def off(table):
        """How far the latents after that step are from the full run's, in units of the final ones."""
        seen = []
        method = Method(Schedule(PLAN, T), "output", replace(fit.predictor, table=table))

        def observe(branch, at, name, tensor):
            if name == "input" and at == step + 1:
                seen.append(kept_elements(tensor))

        sample(pipe, method, PROMPTS, SEEDS, decode=False, observe=observe, **CALL)
        return np.linalg.norm((seen[0] - states[:, step + 1]) / fit.recorded.sizes[:, None])

    table = fit.predictor.table
    best = off(table)
    for _ in range(4):
        moved = tuple(weight + 0.05 * random.standard_normal() for weight in table[step])
        assert off(table | {step: moved}) > best


def test_prompts_that_come_later_are_learnt_from_too(pipe, calibration):
    fit = fit_of(calibration, PLAN)
    calibration.made_from["batch_size"] = 2
    try:
        errors = fit.run(pipe, calibration, 0, 3)
    finally:
        calibration.made_from["batch_size"] = 3
    alone = fit_of(calibration, PLAN)
    alone.run(pipe, calibration, 0, 2)
    assert len(errors) == 3 and fit.predictor.table != alone.predictor.table
    method = Method(Schedule(PLAN, T), "output", fit.predictor)
    assert calibration.errors(pipe, method).mean() <= 1.1 * learnt(pipe, calibration)[2].mean()


def test_weights_that_are_learnt_in_the_run_beat_simulated_ones(pipe, calibration):
    simulated = make_method(simulator_of(calibration, 4), "closed2", PLAN)
    _, _, errors = learnt(pipe, calibration)
    assert errors.mean() < calibration.errors(pipe, simulated).mean()


def test_simulated_weights_count_for_some_prompts(pipe, calibration):
    fit = fit_of(calibration, PLAN)
    assert fit.predictor.table == fit.simulated.table
    fit.run(pipe, calibration, 0, 3)
    half = replace_trust(fit, 3.0)
    for step, simulated in fit.simulated.table.items():
        mean = (np.array(simulated) + fit.predictor.table[step]) / 2
        np.testing.assert_allclose(half.predictor.table[step], mean)


def replace_trust(fit, trust):
    other = copy(fit)
    other.trust = trust
    return other


def test_a_finer_run_is_ended_on_more_closely_than_by_all_steps(pipe, calibration):
    """Nine of ten steps, and the skipped one takes back what ten steps miss of forty."""
    fit = fit_of(calibration, [*range(8), 9], 3, True, finer=4)
    fit.run(pipe, calibration, 0, 3)
    finer = generate(pipe, PROMPTS, SEEDS, 40, decode=False, **CALL).latents
    assert fit.recorded.errors(finer.numpy()).max() <= 1e-5

    def off(latents):
        return (latents - finer).flatten(1).norm(dim=1).mean().item()

    method = Method(Schedule([*range(8), 9], T), "output", fit.predictor)
    nine = sample(pipe, method, PROMPTS, SEEDS, decode=False, **CALL).latents
    all_ten = generate(pipe, PROMPTS, SEEDS, T, decode=False, **CALL).latents
    assert off(nine) < off(all_ten)


def test_a_coarser_target_is_refused():
    with pytest.raises(dpcache.SettingError, match="finer=0 must be at least 1"):
        dpcache.recipe("dpcache_sim", 9, 50, finer=0)


def test_a_finer_target_of_a_scheduler_that_adds_noise_is_refused(calibration):
    pipe = case("dit_ddpm").pipe
    with pytest.raises(dpcache.SettingError, match="finer=2: DDPMScheduler adds noise"):
        dpcache.calibrate(pipe, ["7"], 4, (SimulatedRuns(1, 2),))
