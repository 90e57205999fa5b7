"""The smallest budget that reaches a quality."""

import logging
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

import dpcache
from baselines.full import full
from baselines.taylorseer import taylorseer
from dpcache.quality import PSNR, Measure, _by_setting, find_budget, psnr
from dpcache.sampler import generate, sample
from helpers.embedded import CALL

T, PROMPTS = 8, ["red apple", "dog"]
FULL = full(T)


@cache
def images(pipe, method):
    return torch.from_numpy(sample(pipe, method, PROMPTS, [0, 1], **CALL).images).double()


def decibels(pipe, method):
    """On the prompts of these tests, by torchmetrics."""
    made, reference = images(pipe, method), images(pipe, FULL)
    options = {"data_range": 255.0, "reduction": "none", "dim": (1, 2, 3)}
    return peak_signal_noise_ratio(made, reference, **options).mean().item()


def test_the_smallest_budget_that_reaches_it_is_found(pipe, caplog):
    calibration = dpcache.calibrate(pipe, PROMPTS, T, (), batch_size=2, **CALL)
    with caplog.at_level(logging.INFO):
        found = find_budget(pipe, lambda budget: taylorseer(budget, T, lite=True), calibration, 30.0)
    method = taylorseer(found.budget, T, lite=True)
    assert found.method.schedule.steps == method.schedule.steps and 3 < found.budget < T
    assert decibels(pipe, method) == pytest.approx(found.tried[found.budget], abs=0.01)
    assert found.tried[found.budget] >= 30 > decibels(pipe, taylorseer(found.budget - 1, T, lite=True))
    runs = [T, *found.tried]  # the full-step images, and every budget that was tried
    assert calibration.reran == pytest.approx(len(PROMPTS) * sum(runs) / T) and len(found.tried) <= 4
    assert f"{found.budget} computed steps reach" in caplog.text
    assert f"budget={found.budget}: {found.tried[found.budget]:.2f} dB" in found.lines() and not found.predicted


def test_a_distance_is_searched_as_its_decibels_are(pipe):
    """What is searched for is any measure's: here the root mean square difference, of which PSNR is the decibels."""

    def difference(images, reference):
        return 10 ** (-psnr(images, reference) / 20)

    calibration = dpcache.calibrate(pipe, PROMPTS[:1], T, (), **CALL)
    make, distance = partial(taylorseer, num_inference_steps=T, lite=True), Measure("RMS", difference, best=0.0)
    near, far = (find_budget(pipe, make, calibration, *wanted) for wanted in ((30.0,), (10**-1.5, distance)))
    assert near.budget == far.budget and near.tried.keys() == far.tried.keys()
    for budget, reached in far.tried.items():
        assert -20 * np.log10(reached) == pytest.approx(near.tried[budget])
        assert f"budget={budget}: RMS {reached:.4g}" in far.lines()
    for wanted in (0.0, 1.0):
        with pytest.raises(dpcache.SettingError, match=f"quality={wanted} must be above 0 and below 1: it is of RMS"):
            find_budget(pipe, make, calibration, wanted, distance)


class Promising:
    """A recipe with a simulator whose decibels are those of the images, but `off`."""

    def __init__(self, budget, off, known):
        self.method, self.budget, self.off, self.known = taylorseer(budget, T, lite=True), budget, off, known

    statistics = ()

    def build(self, pipe, calibration):
        self.known["built"].append(self.budget)
        return self.method

    def promised(self, calibration):
        return self.known[self.budget] + self.off


def test_a_simulator_leaves_little_to_run(pipe):
    calibration = dpcache.calibrate(pipe, PROMPTS, T, (), batch_size=2, **CALL)
    known = {budget: decibels(pipe, taylorseer(budget, T, lite=True)) for budget in range(3, T + 1)} | {"built": []}
    found = find_budget(pipe, lambda budget: Promising(budget, 0.0, known), calibration, 30.0)
    smallest = min(budget for budget in range(3, T + 1) if known[budget] >= 30)
    assert found.budget == smallest and known["built"] == [smallest, smallest - 1]
    known["built"].clear()
    shifted = find_budget(pipe, lambda budget: Promising(budget, -15.0, known), calibration, 30.0)
    assert shifted.budget == smallest and smallest < known["built"][0]  # too careful at first, then told better
    for budget, predicted in shifted.predicted.items():
        assert predicted == pytest.approx(known[budget], abs=0.1) or budget == T
    assert set(shifted.tried) <= set(shifted.predicted)


def test_an_online_method_is_searched_by_its_threshold(pipe):
    recipe = partial(dpcache.recipe, "teacache", num_inference_steps=T)
    calibration = dpcache.calibrate(pipe, PROMPTS, T, recipe(T).statistics, batch_size=2, **CALL)
    found = find_budget(pipe, recipe, calibration, 45.0)
    threshold, spent = found.method.decided["threshold"], found.method.decided["spent"]
    assert found.tried[round(spent, 2)] >= 45 and found.budget == round(spent) and not found.predicted
    assert decibels(pipe, found.method) == pytest.approx(found.tried[round(spent, 2)], abs=0.01)
    fewer = [reached for steps, reached in found.tried.items() if steps < spent]
    assert fewer and max(fewer) < 45 and found.method.schedule.threshold == threshold
    for given, message in ((recipe, "threshold=0.1"), (partial(dpcache.recipe, "dicache"), "threshold is given")):
        with pytest.raises(dpcache.SettingError, match=message):
            given = partial(given, num_inference_steps=T, threshold=0.1)
            find_budget(pipe, given, calibration, 30.0)


def test_of_settings_that_spend_the_same_the_best_one_is_shown():
    """The second value that is tried, 2, spends what the first did, and falls short."""
    knob = SimpleNamespace(
        make=lambda value: replace(FULL, decided={"value": value}), first=1.0, setting="t", whole=False
    )
    found = _by_setting(lambda method: (51 - method.decided["value"], 4.0), knob, 49.5, PSNR)
    assert found.method.decided["t"] == 1 and found.tried == {4.0: 50.0}


def test_qualities_that_cannot_be_are_named(pipe):
    calibration = dpcache.calibrate(pipe, PROMPTS[:1], T, (), **CALL)
    for quality in (0, -3.0, 101):
        with pytest.raises(dpcache.SettingError, match=f"quality={quality} must be above 0 and at most 100 dB"):
            find_budget(pipe, lambda budget: taylorseer(budget, T), calibration, quality)
    with pytest.raises(dpcache.SettingError, match="budget=None and quality=None: give one of the two"):
        dpcache.accelerate(pipe, "fora", prompts=PROMPTS)
    with pytest.raises(dpcache.SettingError, match=r"method=fora is tried for quality=30: give it some prompts"):
        dpcache.accelerate(pipe, "fora", quality=30)


def test_accelerate_takes_a_quality(pipe):
    method = dpcache.accelerate(pipe, "taylorseer_lite", None, PROMPTS, T, batch_size=2, quality=30, **CALL)
    try:
        generate(pipe, PROMPTS, [0, 1], T, decode=False, **CALL)
        assert dpcache.report(pipe).computed == {"cond": method.schedule.steps}
    finally:
        dpcache.disable(pipe)
    assert decibels(pipe, method) >= 30


def test_psnr_of_videos_is_the_mean_over_frames():
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 256, (2, 3, 4, 5, 6, 3), dtype=np.uint8)
    two[0, 0] = one[0, 0]
    expected = [np.mean([psnr(a[None], b[None])[0] for a, b in zip(*videos)]) for videos in zip(one, two)]
    np.testing.assert_allclose(psnr(one, two), expected)
    assert psnr(one[:, 0], two[:, 0])[0] == 100
