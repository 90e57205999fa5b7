"""Calibration on the embedded model: what it measures, its file, and the methods that are settled by it."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import dpcache
from baselines.full import full
from baselines.teacache import teacache
from dpcache.calibration import describe, fingerprint
from dpcache.gram import gram
from dpcache.lsq import FittedWeights, LeastSquaresPlan, fit_closed_loop
from dpcache.method import dpcache as dpcache_method
from dpcache.pact import l1_cost
from dpcache.predictors import LeastSquares, Taylor
from dpcache.sampler import generate, sample
from dpcache.schedules import Schedule
from dpcache.sites import transformer_blocks

CALL = {"height": 64, "width": 64, "max_sequence_length": 12}
PROMPTS, T = ["red heart", "dog", "pizza"], 8


@pytest.fixture(scope="module")
def calibration(pipe):
    return dpcache.calibrate(pipe, PROMPTS, T, measure_gains=True, batch_size=2, **CALL)


@pytest.fixture(scope="module")
def trajectory(pipe):
    """Features and predictions of the same three samples, taken by plain PyTorch hooks in one batch."""
    features, outputs = [], []
    block = transformer_blocks(pipe.transformer)[-1]
    handles = [
        block.register_forward_hook(lambda module, args, output: features.append(output[1])),
        pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0])),
    ]
    latents = generate(pipe, PROMPTS, [0, 1, 2], T, decode=False, **CALL).latents
    for handle in handles:
        handle.remove()
    return torch.stack(features), torch.stack(outputs), latents


def test_it_measures_the_full_trajectories(calibration, trajectory):
    features, outputs, latents = trajectory
    expected = l1_cost(features, Taylor(2))
    finite = np.isfinite(expected)
    assert (finite == np.isfinite(calibration.cost)).all()
    np.testing.assert_allclose(calibration.cost[finite], expected[finite], rtol=1e-3)
    np.testing.assert_allclose(calibration.gram, gram(features), rtol=1e-3)
    np.testing.assert_allclose(calibration.output_gram, gram(outputs), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(calibration.latents, latents.numpy(), atol=1e-3)
    assert calibration.input_change.shape == calibration.output_change.shape == (2, T)
    assert (calibration.input_change[:, 1:] > 0).all() and (calibration.output_change[:, 1:] > 0).all()
    assert calibration.gain.shape == (T,) and (calibration.gain > 0).all()
    assert calibration.gain.mean() == pytest.approx(1)


def test_the_file_holds_everything(calibration, tmp_path, pipe):
    calibration.save(tmp_path / "new" / "c.safetensors")
    loaded = dpcache.Calibration.load(tmp_path / "new" / "c.safetensors")
    for name, value in vars(calibration).items():
        np.testing.assert_equal(getattr(loaded, name), value)
    assert loaded.check(describe(pipe, T, **CALL) | {"predictor": "Taylor(order=2, since=0)"}) is loaded
    assert not list((tmp_path / "new").glob(".*.part"))


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("num_inference_steps", {"num_inference_steps": "9"}),
        ("resolution", {"resolution": "32 x 32"}),
        ("dtype", {"dtype": "bfloat16"}),
        ("guidance", {"guidance": "{'guidance_scale': 2.0}"}),
        ("model", {"model": "FluxTransformer2DModel 0"}),
    ],
)
def test_check_names_the_field_that_differs(calibration, pipe, field, changed):
    expected = describe(pipe, T, **CALL)
    assert field in expected
    with pytest.raises(ValueError, match=f"{field}: made for"):
        calibration.check(expected | changed)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        dpcache.Calibration.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no")
    save_file({"cost": np.zeros(3)}, tmp_path / "foreign.safetensors")
    for name in ("text", "foreign.safetensors"):
        with pytest.raises(ValueError, match="is not a calibration file"):
            dpcache.Calibration.load(tmp_path / name)
    with pytest.raises(ValueError, match="at least one prompt"):
        dpcache.calibrate(None, [])


def test_the_fingerprint_sees_the_weights(pipe):
    before = fingerprint(pipe.transformer)
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] += 1
        changed = fingerprint(pipe.transformer)
        pipe.transformer.proj_out.bias[0] -= 1
    assert before != changed and fingerprint(pipe.transformer) == before


def test_guidance_branches_are_pooled(pipe):
    guided = {"negative_prompt": [""], "true_cfg_scale": 2.0, **CALL}
    calibration = dpcache.calibrate(pipe, PROMPTS[:1], T, **guided)
    plain = dpcache.calibrate(pipe, PROMPTS[:1], T, **CALL)
    assert calibration.gram.shape == (T, T) and not np.allclose(calibration.gram, plain.gram, rtol=1e-3)
    assert calibration.made_for["guidance"] != plain.made_for["guidance"]


def error(pipe, method):
    return np.linalg.norm(
        sample(pipe, method, PROMPTS, [0, 1, 2], decode=False, **CALL).latents
        - sample(pipe, full(T), PROMPTS, [0, 1, 2], decode=False, **CALL).latents
    )


def test_dpcache_plans_on_its_costs(calibration, pipe):
    method = dpcache_method(5, T)
    method.prepare(pipe, calibration)
    assert method.schedule.steps == dpcache.plan(calibration.cost, 5, 3, "paper") and method.needs_calibration
    assert error(pipe, method) < error(pipe, dpcache_method(4, T, steps=[0, 1, 2, 3]))


@pytest.mark.parametrize("budget", [3, 5])
def test_teacache_spends_its_budget_in_closed_loop(calibration, pipe, budget):
    method = teacache(budget, T)
    method.prepare(pipe, calibration)
    calibration.rerun(pipe, method)
    assert abs(np.mean(method.report().computed_counts["cond"]) - budget) <= 1
    assert method.settled["threshold"] == method.schedule.threshold


@pytest.mark.parametrize("site", ["stack", "output"])
def test_least_squares_takes_the_best_candidate(calibration, pipe, site):
    method = LeastSquaresPlan(4, T, site, ["lsq2", "taylor2"], warmups=[1, 3], alphas=[0.0, 1.0])
    method.prepare(pipe, calibration)
    trials = method.settled["trials"]
    assert len(trials) == 8 and all(len(trial["steps"]) == 4 for trial in trials)
    best = min(trials, key=lambda trial: trial["error"])
    assert method.schedule.steps == best["steps"]
    refit = method.settled.get("refit")
    if refit and refit["held_out_after"] < refit["held_out_before"]:
        assert isinstance(method.predictor, FittedWeights)
        return
    difference = (calibration.rerun(pipe, method) - calibration.latents).reshape(3, -1)
    ratios = np.linalg.norm(difference, axis=1) / np.linalg.norm(calibration.latents.reshape(3, -1), axis=1)
    assert ratios.mean() == pytest.approx(best["error"], rel=1e-5)
    assert method.report().computed["cond"] == best["steps"]


def test_closed_loop_fit_is_the_open_loop_one_where_nothing_is_skipped_before(calibration, pipe):
    # Keys 0..3 are the full trajectory's own, so the first skipped steps have the same regression in both.
    method = dpcache.Method(Schedule([0, 1, 2, 3], T), "stack", LeastSquares(calibration.gram, 3))
    part, every = fit_closed_loop(pipe, calibration, method, split=2)
    for step in (4, 5, 6, 7):
        expected = method.predictor.weights([0, 1, 2, 3], step)
        np.testing.assert_allclose(every.table[step], expected, rtol=1e-3, atol=1e-3)
        assert not np.allclose(part.table[step], every.table[step], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"predictors": ["cubic"]}, "cubic"), ({"site": "modules"}, "site=modules"), ({"warmups": [9]}, "warmup=9")],
)
def test_least_squares_names_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        LeastSquaresPlan(4, T, **arguments)
