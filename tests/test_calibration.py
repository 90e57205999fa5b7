"""Calibration on the embedded model: what it measures, its file, and the methods that are built on it."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import save_file
from transformers import CLIPTextConfig, CLIPTextModel

import dpcache
from baselines.full import full
from baselines.teacache import teacache
from baselines.uniform_skip import uniform_skip
from dpcache.calibration import record
from dpcache.circumstances import describe, fingerprint
from dpcache.gram import gram, path_costs
from dpcache.lsq import FittedWeights, LeastSquaresPlan, fit_closed_loop
from dpcache.pact import l1_cost
from dpcache.planned import dpcache as dpcache_method
from dpcache.planner import path_cost
from dpcache.predictors import LeastSquares, Taylor
from dpcache.sampler import generate, sample
from dpcache.schedules import Schedule
from dpcache.sites import transformer_blocks
from dpcache.statistics import Gain, Gram, InputChange, L1Cost, OutputChange, of_one_pass

CALL = {"height": 64, "width": 64, "max_sequence_length": 12}
PROMPTS, T = ["red heart", "dog", "pizza"], 8


@pytest.fixture(scope="module")
def calibration(pipe):
    return dpcache.calibrate(pipe, PROMPTS, T, (*of_one_pass(), Gain("stack")), batch_size=2, **CALL)


@pytest.fixture(scope="module")
def output_calibration(pipe):
    return dpcache.calibrate(pipe, PROMPTS, T, (*of_one_pass("output"), Gain("output")), batch_size=2, **CALL)


@pytest.fixture(scope="module")
def trajectory(pipe):
    """Features, predictions and inputs of the same three samples, taken by plain PyTorch hooks in one batch."""
    features, outputs, inputs = [], [], []
    block = transformer_blocks(pipe.transformer)[-1]
    handles = [
        block.register_forward_hook(lambda module, args, output: features.append(output[1])),
        pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0])),
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
        ),
    ]
    latents = generate(pipe, PROMPTS, [0, 1, 2], T, decode=False, **CALL).latents
    for handle in handles:
        handle.remove()
    return torch.stack(features), torch.stack(outputs), torch.stack(inputs), latents


def test_it_measures_the_full_trajectories(calibration, trajectory):
    features, _, _, latents = trajectory
    expected = l1_cost(features, Taylor(2))
    finite = np.isfinite(expected)
    assert (finite == np.isfinite(calibration.cost)).all()
    np.testing.assert_allclose(calibration.cost[finite], expected[finite], rtol=1e-3)
    np.testing.assert_allclose(calibration[Gram("stack")], gram(features), rtol=1e-3)
    np.testing.assert_allclose(calibration.latents, latents.numpy(), atol=1e-3)
    for statistic in (InputChange(), OutputChange()):
        changes = calibration[statistic]
        assert changes.shape == (2, T) and (changes[:, 1:] > 0).all()
    gain = calibration[Gain("stack")]
    assert gain.shape == (T,) and (gain > 0).all() and gain.mean() == pytest.approx(1)


def test_what_measuring_took_is_counted_in_full_trajectories(calibration, pipe):
    assert calibration.took(of_one_pass()) == len(PROMPTS) and calibration.took(()) == 0
    # Two prompts, one batch, without each of the steps 1 to 7 in turn.
    assert calibration.took([Gain("stack")]) == pytest.approx(3 + 2 * 7 * 7 / 8)
    assert calibration.took([Gain("stack"), Gram("stack"), L1Cost()]) == calibration.took([Gain("stack")])
    calls = []
    inner = transformer_blocks(pipe.transformer)[-1].attn.to_q
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    alone, before = dpcache.calibrate(pipe, PROMPTS[:1], T, (), **CALL), len(calls)
    assert before == 0 and alone.arrays == {} and alone.took(()) == 0
    alone.rerun(pipe, uniform_skip(4, T))
    handle.remove()
    assert len(calls) == 4 and alone.reran == 4 / T


def test_statistics_that_are_missing_are_measured_later_and_are_the_same(calibration, pipe, tmp_path):
    later = dpcache.calibrate(pipe, PROMPTS, T, [L1Cost()], batch_size=2, **CALL)
    with pytest.raises(ValueError, match=r"does not hold Gram.1 site=stack, but L1Cost.1 site=stack predictor=taylor2"):
        later[Gram("stack")]
    later.save(tmp_path / "c.safetensors")
    later = dpcache.Calibration.load(tmp_path / "c.safetensors")
    assert [s.name for s in later.missing([L1Cost(), Gain("stack")])] == [Gram("stack").name, Gain("stack").name]
    later.measure(pipe, [L1Cost(), Gain("stack")])
    for statistic in (L1Cost(), Gram("stack"), Gain("stack")):
        np.testing.assert_array_equal(later[statistic], calibration[statistic])


def test_at_the_output_it_measures_predictions_and_inputs(output_calibration, trajectory):
    _, outputs, inputs, _ = trajectory
    G, cost = output_calibration[Gram("output")], output_calibration[L1Cost("output")]
    np.testing.assert_allclose(G, gram([outputs, inputs]), rtol=1e-3, atol=1e-3)
    expected = l1_cost(outputs, Taylor(2))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(cost[finite], expected[finite], rtol=1e-3)


def test_the_file_holds_everything(calibration, tmp_path, pipe):
    calibration.save(tmp_path / "new" / "c.safetensors")
    loaded = dpcache.Calibration.load(tmp_path / "new" / "c.safetensors")
    for name, value in vars(calibration).items():
        np.testing.assert_equal(getattr(loaded, name), 0.0 if name == "reran" else value)
    assert loaded.check(describe(pipe, T, **CALL)) is loaded
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


def test_the_fingerprint_sees_buffers_that_are_saved():
    """As of a batch normalisation, which FLUX.2's VAE has for its latents."""
    model = torch.nn.BatchNorm1d(4)
    before = fingerprint(model)
    model.register_buffer("table", torch.zeros(3), persistent=False)  # made anew by whoever loads the model
    assert fingerprint(model) == before
    model.running_mean[2] = 1
    assert fingerprint(model) != before


def test_guidance_branches_are_pooled(pipe):
    guided = {"negative_prompt": [""], "true_cfg_scale": 2.0, **CALL}
    calibration = dpcache.calibrate(pipe, PROMPTS[:1], T, **guided)
    plain = dpcache.calibrate(pipe, PROMPTS[:1], T, **CALL)
    G, alone = calibration[Gram("stack")], plain[Gram("stack")]
    assert G.shape == (T, T) and not np.allclose(G, alone, rtol=1e-3)
    assert calibration.made_for["guidance"] != plain.made_for["guidance"]


def error(pipe, method):
    return np.linalg.norm(
        sample(pipe, method, PROMPTS, [0, 1, 2], decode=False, **CALL).latents
        - sample(pipe, full(T), PROMPTS, [0, 1, 2], decode=False, **CALL).latents
    )


def test_dpcache_plans_exactly_over_three_keys(calibration, pipe):
    method = dpcache_method(5, T, warmup=2, solver="exact", cost="gram").build(pipe, calibration)
    tensor = path_costs(calibration[Gram("stack")], Taylor(2), 3)
    costs = {steps: path_cost(tensor, steps, 2) for steps in ((0, 1, *rest) for rest in combinations(range(2, T), 3))}
    assert tuple(method.schedule.steps) == min(costs, key=costs.get)


def test_dpcache_plans_on_its_costs(calibration, pipe):
    method = dpcache_method(5, T).build(pipe, calibration)
    assert method.schedule.steps == method.decided["steps"] == dpcache.plan(calibration.cost, 5, 3, "paper")
    assert error(pipe, method) < error(pipe, dpcache_method(4, T, steps=[0, 1, 2, 3]))


@pytest.mark.parametrize("budget", [3, 5])
def test_teacache_spends_its_budget_in_closed_loop(calibration, pipe, budget):
    method = teacache(budget, T).build(pipe, calibration)
    _, report = calibration.rerun(pipe, method)
    assert abs(np.mean(report.computed_counts["cond"]) - budget) <= 1
    assert method.decided["threshold"] == method.schedule.threshold


@pytest.mark.ci
@pytest.mark.parametrize(("site", "predictor"), [("stack", "lsq2"), ("output", "lsq2x")])
def test_least_squares_takes_the_best_candidate(calibration, output_calibration, pipe, site, predictor):
    calibration = calibration if site == "stack" else output_calibration
    planners = ["gram", "coherent", "l1", "even"]
    recipe = LeastSquaresPlan(4, T, site, [predictor, "taylor2"], planners, warmups=[1, 3], alphas=[0.0, 1.0])
    assert calibration.missing(recipe.statistics) == []
    method = recipe.build(pipe, calibration)
    trials = method.decided["trials"]
    assert len(trials) == 24 and all(len(trial["steps"]) == 4 for trial in trials)
    best = min(trials, key=lambda trial: trial["error"])
    assert method.schedule.steps == best["steps"]
    refit = method.decided.get("refit")
    if refit and refit["held_out_after"] < refit["held_out_before"]:
        assert isinstance(method.predictor, FittedWeights)
        return
    latents, report = calibration.rerun(pipe, method)
    difference = (latents - calibration.latents).reshape(3, -1)
    ratios = np.linalg.norm(difference, axis=1) / np.linalg.norm(calibration.latents.reshape(3, -1), axis=1)
    assert ratios.mean() == pytest.approx(best["error"], rel=1e-5)
    assert report.computed["cond"] == best["steps"]


def test_a_candidate_whose_runs_diverge_is_not_taken(calibration, pipe, monkeypatch):
    """Of what is not a number every comparison is false, so that the first candidate would stay the best one."""
    recipe = LeastSquaresPlan(4, T, predictors=["taylor2", "lsq2"], planners=["even"], warmups=[1], refit=False)
    rerun, diverging = dpcache.Calibration.rerun, [Taylor]

    def rerun_or_diverge(self, pipe, method, *args, **kwargs):
        latents, report = rerun(self, pipe, method, *args, **kwargs)
        return (latents * np.nan if isinstance(method.predictor, tuple(diverging)) else latents), report

    monkeypatch.setattr(dpcache.Calibration, "rerun", rerun_or_diverge)
    method = recipe.build(pipe, calibration)
    assert isinstance(method.predictor, LeastSquares) and method.decided["trials"][0]["error"] == np.inf
    diverging.append(LeastSquares)
    with pytest.raises(dpcache.SettingError, match="budget=4: the runs of all candidates diverge"):
        recipe.build(pipe, calibration)


def test_the_input_is_seen_in_closed_loop_as_in_open(output_calibration, pipe):
    # With one skipped step the accelerated run is the full one up to there, so the weights can be checked by hand.
    predictor = LeastSquares(output_calibration[Gram("output")], 2, sees_input=True)
    method = dpcache.Method(Schedule([0, 1, 2, 3, 4, 6, 7], T), "output", predictor)
    _, kept = record(pipe, method, PROMPTS, [0, 1, 2], **CALL)
    rows = kept["cond"]
    predicted = sum(w * x for w, x in zip(predictor.weights([3, 4], 5), (*rows["output"][3:5], rows["input"][5])))
    step = pipe.scheduler.sigmas[6] - pipe.scheduler.sigmas[5]
    torch.testing.assert_close(rows["input"][6], rows["input"][5] + step * predicted, rtol=1e-4, atol=1e-4)
    truth = record(pipe, full(T), PROMPTS, [0, 1, 2], **CALL)[1]["cond"]["output"][5]
    assert (predicted - truth).norm() < 0.7 * (rows["output"][4] - truth).norm()


def test_an_input_of_another_shape_than_the_prediction_is_refused(output_calibration, pipe):
    predictor = LeastSquares(output_calibration[Gram("output")], 2, sees_input=True)
    method = dpcache.Method(Schedule([0, 1, 2, 5], T), "output", predictor)
    own = pipe.transformer.proj_out
    pipe.transformer.proj_out = torch.nn.Linear(own.in_features, 1)  # one channel, which would go with any number
    try:
        with pytest.raises(
            dpcache.SettingError, match=r"sees the model's input, \(1, 64, 16\), which has another shape"
        ):
            sample(pipe, method, ["dog"], [0], decode=False, **CALL)
    finally:
        pipe.transformer.proj_out = own


def test_closed_loop_fit_with_the_input_is_the_open_loop_one(output_calibration, pipe):
    method = dpcache.Method(
        Schedule([0, 1, 2, 3], T), "output", LeastSquares(output_calibration[Gram("output")], 3, sees_input=True)
    )
    _, every = fit_closed_loop(pipe, output_calibration, method, split=2)
    np.testing.assert_allclose(every.table[4], method.predictor.weights([0, 1, 2, 3], 4), rtol=1e-2, atol=1e-2)
    assert every.sees_input and all(len(weights) == 4 for weights in every.table.values())


def test_closed_loop_fit_is_the_open_loop_one_where_nothing_is_skipped_before(calibration, pipe):
    # Keys 0..3 are the full trajectory's own, so the first skipped steps have the same regression in both.
    method = dpcache.Method(Schedule([0, 1, 2, 3], T), "stack", LeastSquares(calibration[Gram("stack")], 3))
    part, every = fit_closed_loop(pipe, calibration, method, split=2)
    for step in (4, 5, 6, 7):
        expected = method.predictor.weights([0, 1, 2, 3], step)
        np.testing.assert_allclose(every.table[step], expected, rtol=1e-3, atol=1e-3)
        assert not np.allclose(part.table[step], every.table[step], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictors": ["cubic"]}, "cubic"),
        ({"predictors": ["lsq5"]}, "lsq5"),
        ({"predictors": []}, "predictors="),
        ({"predictors": ["lsq2x"]}, "site=output"),
        ({"planners": ["l2"]}, "l2"),
        ({"site": "modules"}, "site=modules"),
        ({"warmups": [9]}, "warmup=9"),
    ],
)
def test_least_squares_names_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        LeastSquaresPlan(4, T, **arguments)


@pytest.fixture(scope="module")
def unet_pipe(pipe):
    """A random Stable Diffusion: a U-Net, guided by batch concatenation, DDIM."""
    torch.manual_seed(0)
    tokenizer = copy.deepcopy(pipe.tokenizer)
    tokenizer.model_max_length = 12
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=16,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    made = StableDiffusionPipeline(
        AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), latent_channels=4),
        text,
        tokenizer,
        unet,
        DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_the_output_site_takes_any_denoiser(unet_pipe):
    call = {"height": 8, "width": 8, "guidance_scale": 3.0}
    recipe = LeastSquaresPlan(4, T, "output", ["lsq2", "lsq2x"], warmups=[1], alphas=[1])
    calibration = dpcache.calibrate(unet_pipe, PROMPTS, T, recipe.statistics, batch_size=2, **call)
    assert calibration[Gram("output")].shape == (2 * T, 2 * T)
    method = recipe.build(unet_pipe, calibration)
    reference, _ = calibration.rerun(unet_pipe, full(T))
    np.testing.assert_allclose(reference, calibration.latents, atol=1e-5)
    (latents, report), (even, _) = (calibration.rerun(unet_pipe, which) for which in (method, uniform_skip(4, T)))
    assert np.linalg.norm(latents - reference) < 0.5 * np.linalg.norm(even - reference)
    assert report.computed["default"] == method.schedule.steps
    with pytest.raises(ValueError, match="use site=output"):
        dpcache.calibrate(unet_pipe, PROMPTS, T, **call)


def test_one_string_is_no_list_of_prompts(pipe):
    with pytest.raises(dpcache.SettingError, match="prompts='dog': give a list of prompts"):
        dpcache.calibrate(pipe, "dog", T)
