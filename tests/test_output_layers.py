"""What output layers make of other steps' features: against accelerated runs at site=stack, and by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dpcache
from dpcache._diffusers import watching
from dpcache.method import Method
from dpcache.models.pretrained import load
from dpcache.output_layers import OutputLayers, measure_output_layers, normed
from dpcache.predictors import AdamsBashforth, Lagrange, Reuse, Taylor
from dpcache.recorded import _Recorder as Given
from dpcache.recorded import random_probes, record
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.simulated import SimulatedRuns, simulator_of
from dpcache.simulator import Simulator, Weights, decibels
from helpers.toy_runs import ToyRun, rates

T = 10
CALLS = {
    "tiny_flux": (["dog", "car"], {"height": 64, "width": 64, "max_sequence_length": 12}),
    "tiny_dit": (["3", "5"], {"guidance_scale": 2.0}),
}


def measured(pipe, model):
    prompts, call = CALLS[model]
    batches = [(prompts, [0, 1])]
    recorded, *_ = record(pipe, batches, T, (), **call)
    return recorded, measure_output_layers(pipe, recorded, batches, **call)


@pytest.mark.parametrize("model", CALLS)
def test_what_is_measured_is_what_a_run_at_the_stack_does_where_it_skips_first(model):
    pipe, (prompts, call) = load(model, "float32", "cpu"), CALLS[model]
    recorded, layers = measured(pipe, model)
    for step, ago, predictor in [(4, 1, Reuse()), (7, 3, Reuse()), (6, 1, Lagrange(2))]:
        plan = [s for s in range(T) if s <= step - ago or s > step]
        given = Given(2)
        with watching(pipe.scheduler, given):
            sample(pipe, Method(Schedule(plan, T), "stack", predictor), prompts, [0, 1], decode=False, **call)
        if ago > 1:  # the latents have moved, and the output layers do not look at them
            first = step - ago + 1
            assert np.abs(given.latents[step] - recorded.states[:, step]).max() > 0
            assert np.abs(given.latents[first] - recorded.states[:, first]).max() == 0
        real = given.predictions[step] - recorded.predictions[:, step]
        keys = np.array([[s for s in plan if s < step][-predictor.history :]])
        weights = np.array([predictor.weights(keys[0].tolist(), step)])
        made = normed(layers.lengths, weights, keys)[0] @ layers.at(step)[keys[0]] + layers.empty[step]
        miss = made - layers.decoded[0, step]
        simulated = np.sqrt(np.einsum("r,prk,k->p", miss, layers.metrics, miss)) * recorded.sizes
        # One sum of directions stands for both prompts, and an average length for every token's own.
        np.testing.assert_allclose(simulated, np.linalg.norm(real, axis=1), rtol=0.25)


def test_a_calibration_foretells_errors_at_the_stack_and_counts_what_that_took():
    model = "tiny_flux"
    pipe, (prompts, call) = load(model, "float32", "cpu"), CALLS[model]
    runs = SimulatedRuns(stack=True)
    calibration = dpcache.calibrate(pipe, prompts, T, (runs,), batch_size=2, **call)
    simulator, probed = simulator_of(calibration, stack=True), sum(len(plan) for plan, _ in random_probes(12, T))
    again = 1 + (len(simulator.layers.delays) - 1 + 3) / T  # all steps, and runs that compute step 0 alone
    assert calibration.took((runs,)) == pytest.approx(2 + 2 * probed / T + 2 * again)
    method = Method(Schedule([0, 3, 6, 8], T), "stack", Taylor(1))
    moved = sample(pipe, method, prompts, [0, 1], decode=False, **call).latents.numpy()
    real = 10 ** (-decibels(simulator.recorded.errors(moved)) / 20)
    assert dpcache.predict_error(calibration, method) == pytest.approx(real, rel=0.15)
    plain, at_output = replace(simulator, layers=None), replace(method, site="output")
    assert simulator.predict_error(at_output) == pytest.approx(plain.predict_error(at_output), rel=1e-6)


def test_methods_at_the_stack_take_a_simulator_that_knows_the_output_layers():
    toy = ToyRun("DDIM", rates(8))
    with pytest.raises(dpcache.SettingError, match="site=stack: this simulator takes site=output"):
        Simulator(toy.recorded(), toy.rates).predict_error(Method(EvenlySpaced(4, 8), "stack", Reuse()))
    with pytest.raises(dpcache.SettingError, match="finer=2: site=stack"):
        SimulatedRuns(finer=2, stack=True)


@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_output_layers_that_change_nothing_simulate_as_the_output_does(seed):
    toy, random = ToyRun("UniPC, flow", rates(12), seed), np.random.default_rng(seed)
    simulator = Simulator(toy.recorded(), toy.rates, growth=random.uniform(0, 2, 12))
    own, _, _, metrics = simulator._space
    shifted = np.stack([own[np.maximum(np.arange(12) - delay, 0)] for delay in range(12)])
    layers = OutputLayers(np.arange(12), shifted, np.zeros_like(own), None, metrics)
    known = Simulator.unpack(replace(simulator, layers=layers).pack())
    plans = [[0, *sorted(random.choice(11, 4, replace=False) + 1)] for _ in range(5)]
    for predictor in (Taylor(2), Lagrange(3), AdamsBashforth(2)):
        fill = Weights(predictor, 12).fill(plans)
        np.testing.assert_allclose(known.errors(fill, at_stack=True), simulator.errors(fill), rtol=1e-4)


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_weights_behind_a_norm_are_those_of_what_it_returns(seed, keys):
    random = np.random.default_rng(seed)
    features, weights = random.normal(size=(6, 9)), random.normal(size=(1, keys))
    which = random.choice(6, keys, replace=False)[None]
    shares = normed(features @ features.T, weights, which)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    together = weights[0] @ features[which[0]]
    np.testing.assert_allclose(shares[0] @ unit[which[0]], together / np.linalg.norm(together), rtol=1e-6)
    assert normed(None, weights, which) is weights


def test_between_two_delays_features_are_on_the_line():
    decoded = np.arange(3.0)[:, None, None] ** 2 + np.zeros((3, 6, 1))
    layers = OutputLayers(np.array([0, 1, 5]), decoded, np.full((6, 1), 0.5), None, np.eye(1)[None])
    np.testing.assert_allclose(layers.at(5)[:, 0], [3.5, 2.75, 2.0, 1.25, 0.5])  # of steps 0 to 4, 5 to 1 ago


class Waves(torch.nn.Module):
    def forward(self, x):
        return (8 * x).sin()


def test_output_layers_that_are_not_linear_are_refused(monkeypatch):
    pipe = load("tiny_flux", "float32", "cpu")
    monkeypatch.setattr(pipe.transformer, "proj_out", torch.nn.Sequential(pipe.transformer.proj_out, Waves()))
    with pytest.raises(dpcache.SettingError, match="output layers of FluxTransformer2DModel"):
        measured(pipe, "tiny_flux")
