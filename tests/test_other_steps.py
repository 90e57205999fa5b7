"""A calibration of T steps, carried to another number of steps."""

from itertools import pairwise

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

import dpcache
from dpcache.circumstances import describe
from dpcache.linear_sampler import read_sampler
from dpcache.method import Method
from dpcache.other_steps import carry, interpolation, resample
from dpcache.predictors import AdamsBashforth, Taylor
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.simulated import SimulatedRuns, simulator_of
from dpcache.simulator import Recorded, Simulator
from dpcache.statistics import Gram
from helpers.embedded import CALL, run_once

PROMPTS, RUNS = ["dog", "car", "red apple"], SimulatedRuns(4)


@pytest.fixture(scope="module")
def calibration(pipe):
    return dpcache.calibrate(pipe, PROMPTS, 20, (RUNS,), batch_size=3, **CALL)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_cubic_is_interpolated_exactly_and_a_line_goes_on_beyond_the_ends(sign):
    known = sign * np.array([0.0, 1.0, 2.5, 3.0, 4.5, 6.0])
    wanted = sign * np.array([0.2, 1.7, 3.0, 5.9])
    cubic = np.polynomial.Polynomial([1.0, -2.0, 0.5, 0.3])
    np.testing.assert_allclose(interpolation(known, wanted) @ cubic(known), cubic(wanted))
    outside = sign * np.array([-1.0, 7.0])
    np.testing.assert_allclose(interpolation(known, outside) @ (3 - 2 * known), 3 - 2 * outside)
    np.testing.assert_array_equal(interpolation(known, known), np.eye(6))


def test_times_that_turn_back_are_refused():
    with pytest.raises(dpcache.SettingError, match="times do not fall throughout"):
        interpolation([3.0, 1.0, 2.0], [1.5])


class Toy:
    """A flow whose model is v = rate(t) x + own(t), with Euler steps: it answers every error of x with rate(t) times
    the error."""

    rate = staticmethod(lambda t: 0.3 + 0.8 * t)

    def __init__(self, size=40):
        self.start, *self.parts = np.random.default_rng(0).normal(size=(4, size))

    def own(self, t):
        return self.parts[0] + self.parts[1] * np.sin(3 * t) + self.parts[2] * t**2

    def grid(self, steps):
        """Times of the steps, and the scheduler's arithmetic."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        calls = [{"timestep": time} for time in scheduler.timesteps]
        return scheduler.sigmas.double().numpy(), read_sampler(scheduler, calls)

    def run(self, sigmas, method=None):
        """Predictions (T, size) and latents (T+1, size)."""
        x, used, keys, latents = self.start, [], [], [self.start]
        for s, (now, after) in enumerate(pairwise(sigmas)):
            if method is None or s in method.schedule.steps:
                keys.append(s)
                used.append(self.rate(now) * x + self.own(now))
            else:
                weights = method.predictor.weights(keys, s)
                used.append(sum(w * used[k] for w, k in zip(weights, keys[-len(weights) :])))
            x = x + (after - now) * used[-1]
            latents.append(x)
        return np.array(used), np.array(latents)

    def simulator(self, steps):
        sigmas, sampler = self.grid(steps)
        v, x = self.run(sigmas)
        rows, size = np.concatenate([v, x[:1]]), x[-1] @ x[-1]
        remaining = np.linalg.norm(x[:-1] - x[-1], axis=1) / np.sqrt(size)
        recorded = Recorded((rows @ rows.T)[None] / size, remaining[None], x[-1:], sampler)
        return Simulator(recorded, self.rate(sigmas[:-1]))


@pytest.mark.parametrize("steps", [28, 100])
def test_what_the_carried_simulator_foretells_of_a_linear_model_comes_true(steps):
    toy, recorded, (sigmas, sampler) = Toy(), Toy().grid(50)[0][:-1], Toy().grid(steps)
    carried = resample(toy.simulator(50), recorded, sigmas[:-1], sampler)
    for keys in ([0, 3, 9, 15, 22], [0, 8, 14, 18, 21, 25]):
        for predictor in (Taylor(1), AdamsBashforth(2)):
            method = Method(Schedule([key * steps // 28 for key in keys], steps), "output", predictor)
            truth, moved = toy.run(sigmas)[1][-1], toy.run(sigmas, method)[1][-1]
            real = np.linalg.norm(moved - truth) / np.linalg.norm(truth)
            assert carried.predict_error(method) == pytest.approx(real, rel=0.1) and real > 1e-3


def test_a_simulator_carried_to_its_own_steps_stays_as_it_was():
    simulator, (sigmas, sampler) = Toy().simulator(20), Toy().grid(20)
    same = resample(simulator, sigmas[:-1], sigmas[:-1], sampler)
    method = Method(EvenlySpaced(5, 20), "output", Taylor(1))
    assert same.predict_error(method) == pytest.approx(simulator.predict_error(method))
    np.testing.assert_allclose(same.response, simulator.response)


def test_a_carried_calibration_is_one_of_the_other_number_of_steps(calibration, pipe, caplog):
    carried = carry(pipe, calibration, 10, (RUNS,), prompts=2)
    assert "calibration of 20 steps is carried to 10" in caplog.text
    assert carried.num_inference_steps == 10 and carried.made_from["prompts"] == PROMPTS[:2]
    carried.check(describe(pipe, 10, **CALL))
    np.testing.assert_allclose(carried.latents[0], run_once(pipe, 10)[0].numpy(), atol=1e-4)
    assert carried.took((RUNS,)) == pytest.approx(2 + 1 / 20 + 1 / 10) and carried.reran == 0
    # The scheduler's times at 10 steps are every second of those at 20.
    every, other = (simulator_of(which, probes=4).recorded for which in (calibration, carried))
    np.testing.assert_allclose(other.gram[:, :10, :10], every.gram[:, :20:2, :20:2], rtol=1e-3)
    np.testing.assert_allclose(other.gram[:, 10, :10], every.gram[:, 20, :20:2], rtol=1e-3)
    assert calibration.num_inference_steps == 20 and len(calibration.latents) == 3


def test_a_method_is_planned_on_a_carried_calibration(calibration, pipe):
    recipe = dpcache.recipe("dpcache_sim", 4, 10, predictors=["closed2", "ab2"], probes=4, finalists=2)
    method = recipe.build(pipe, carry(pipe, calibration, 10, recipe.statistics))
    even = Method(EvenlySpaced(4, 10), "output", Taylor(1))
    errors = []
    for which in (method, even):
        made, full = (run.numpy() for run in (run_once_with(pipe, which), run_once(pipe, 10)))
        errors.append(np.linalg.norm(made - full))
    assert errors[0] < errors[1] / 2


def run_once_with(pipe, method):
    return sample(pipe, method, ["dog"], [0], decode=False, **CALL).latents


def test_what_cannot_be_carried_is_refused(calibration, pipe):
    with pytest.raises(dpcache.SettingError, match=r"made for 20, and Gram\.1 site=output cannot be carried"):
        carry(pipe, calibration, 10, (Gram("output"),))
    other = dpcache.calibrate(pipe, PROMPTS[:1], 20, (), **CALL)
    with pytest.raises(dpcache.SettingError, match="does not hold SimulatedRuns"):
        carry(pipe, other, 10, (RUNS,))
