"""A calibration of T steps, carried to another number of steps."""

import numpy as np
import pytest

import dpcache
from dpcache.method import Method
from dpcache.other_steps import carry, interpolation
from dpcache.predictors import Taylor
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.simulated import SimulatedRuns, simulator_of
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


def test_a_carried_calibration_foretells_runs_of_another_number_of_steps(calibration, pipe, caplog):
    carried = carry(pipe, calibration, 10, (RUNS,), prompts=2)
    assert "calibration of 20 steps is carried to 10" in caplog.text
    assert carried.num_inference_steps == 10 and carried.made_from["prompts"] == PROMPTS[:2]
    np.testing.assert_allclose(carried.latents[0], run_once(pipe, 10)[0].numpy(), atol=1e-4)
    assert carried.took((RUNS,)) == pytest.approx(2 + 1 / 20 + 1 / 10) and carried.reran == 0
    method = Method(Schedule([0, 3, 6, 8], 10), "output", Taylor(1))
    latents = sample(pipe, method, PROMPTS[:2], [0, 1], decode=False, **CALL).latents.numpy()
    real = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(latents, carried.latents)]
    foretold = simulator_of(carried, probes=4).predict_error(method)
    assert foretold == pytest.approx(np.exp(np.log(real).mean()), rel=0.2)
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
