"""A calibration of T steps, carried to another number of steps."""

import numpy as np
import pytest

import dpcache
from dpcache.circumstances import describe
from dpcache.method import Method
from dpcache.other_steps import carried_response, carry
from dpcache.predictors import Taylor
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced
from dpcache.simulated import SimulatedRuns, simulator_of
from dpcache.statistics import Gram
from helpers.embedded import CALL, run_once

PROMPTS, RUNS = ["dog", "car", "red apple"], SimulatedRuns(4)


@pytest.fixture(scope="module")
def calibration(pipe):
    return dpcache.calibrate(pipe, PROMPTS, 20, (RUNS,), batch_size=3, **CALL)


def test_a_carried_calibration_is_one_of_the_other_number_of_steps(calibration, pipe, caplog):
    carried = carry(pipe, calibration, 10, (RUNS,), prompts=2)
    assert "calibration of 20 steps is carried to 10" in caplog.text
    assert carried.num_inference_steps == 10 and carried.made_from["prompts"] == PROMPTS[:2]
    carried.check(describe(pipe, 10, **CALL))
    np.testing.assert_allclose(carried.latents[0], run_once(pipe, 10)[0].numpy(), atol=1e-4)
    assert carried.took((RUNS,)) == pytest.approx(2) and carried.reran == 0
    assert calibration.num_inference_steps == 20 and len(calibration.latents) == 3


def test_the_response_is_carried_along_the_distance_to_the_end(calibration, pipe):
    """The latents of 10 steps are about as far from their end as every second of 20."""
    every, other = (simulator_of(which, 4) for which in (calibration, carry(pipe, calibration, 10, (RUNS,))))
    np.testing.assert_allclose(other.response, every.response[::2], rtol=0.15)
    np.testing.assert_allclose(carried_response(every, every.recorded), every.response)


def test_a_method_is_planned_on_a_carried_calibration(calibration, pipe):
    recipe = dpcache.recipe("dpcache_sim", 4, 10, predictors=["closed2", "ab2"], probes=4, finalists=2)
    method = recipe.build(pipe, carry(pipe, calibration, 10, recipe.statistics))
    even, full = Method(EvenlySpaced(4, 10), "output", Taylor(1)), run_once(pipe, 10)
    off = [(sample(pipe, m, ["dog"], [0], decode=False, **CALL).latents - full).norm() for m in (method, even)]
    assert off[0] < off[1] / 2


def test_what_cannot_be_carried_is_refused(calibration, pipe):
    with pytest.raises(dpcache.SettingError, match=r"made for 20, and Gram\.1 site=output cannot be carried"):
        carry(pipe, calibration, 10, (Gram("output"),))
    with pytest.raises(dpcache.SettingError, match="stack=True cannot be carried"):
        carry(pipe, calibration, 10, (SimulatedRuns(4, stack=True),))
    other = dpcache.calibrate(pipe, PROMPTS[:1], 20, (), **CALL)
    with pytest.raises(dpcache.SettingError, match="does not hold SimulatedRuns"):
        carry(pipe, other, 10, (RUNS,))
