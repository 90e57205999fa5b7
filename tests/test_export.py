"""Schedules for other programs, run there; and what `stage=calibrate` leaves."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import dpcache
from baselines.solver import solver
from baselines.taylorseer import taylorseer
from baselines.teacache import fit_polynomial, r_squared
from baselines.uniform_skip import uniform_skip
from dpcache import export
from dpcache.models.pretrained import load
from dpcache.planned import dpcache as planned
from dpcache.predictors import Taylor
from dpcache.sampler import generate
from dpcache.schedules import Schedule
from helpers.commands import run

T, K = 12, 5
CALL = {"height": 64, "width": 64, "max_sequence_length": 12}


@pytest.fixture(scope="module")
def calibration(pipe):
    return dpcache.calibrate(pipe, ["red apple"], T, **CALL)


def execute(code, pipe):
    """Runs an exported snippet; the sampling is ours: the snippet's own would decode and take no noise."""
    latents = []

    class Pipe:
        def __getattr__(self, name):
            return getattr(pipe, name)

        def __call__(self, prompt, num_inference_steps):
            latents.append(generate(pipe, [prompt], [0], num_inference_steps, decode=False, **CALL).latents)

    return latents, {"pipe": pipe, "prompt": "dog", "call": Pipe()}, code.replace("pipe(prompt", "call(prompt")


def test_diffusers_snippet_is_the_method(pipe, calibration):
    method = planned(K, T).build(pipe, calibration)
    with dpcache.cached(pipe, method):
        expected = generate(pipe, ["dog"], [0], T, decode=False, **CALL).latents
    latents, names, code = execute(export.export(calibration, K, "diffusers"), pipe)
    exec(code, names)
    assert torch.equal(latents[0], expected)


def test_cache_dit_computes_the_exported_steps_and_what_it_leaves_is_refused(calibration):
    cache_dit = pytest.importorskip("cache_dit")
    pipe = load("tiny_flux", "float32", "cpu")
    inner, calls = pipe.transformer.single_transformer_blocks[-1].attn, []
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    full = generate(pipe, ["dog"], [0], T, decode=False, **CALL).latents
    assert len(calls) == T
    calls.clear()
    latents, names, code = execute(export.export(calibration, K, "cache_dit"), pipe)
    try:
        exec(code, names)
    finally:
        handle.remove()
        cache_dit.disable_cache(pipe)
    assert len(calls) == K and 0 < (latents[0] - full).norm() < 0.2 * full.norm()
    assert torch.equal(generate(pipe, ["dog"], [0], T, decode=False, **CALL).latents, full)
    with pytest.raises(dpcache.SettingError, match=r"FluxTransformer2DModel runs cache_dit.* instead of its own"):
        dpcache.enable(pipe, planned(K, T).build(pipe, calibration))


def test_the_command(calibration, tmp_path, capsys, monkeypatch):
    calibration.save(tmp_path / "c.safetensors")
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "c.safetensors"), "--budget", str(K)])
    export.main()
    plan = json.loads(capsys.readouterr().out)
    assert sum(plan["mask"]) == K == len(plan["computed_steps"]) and len(plan["mask"]) == T
    assert [step for step, computed in enumerate(plan["mask"]) if computed] == plan["computed_steps"]
    for arguments, line in (
        (["--budget", "99"], "budget=99"),
        (["--budget", "5", "--order", "1"], "predictor=taylor1"),
    ):
        monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "c.safetensors"), *arguments])
        with pytest.raises(SystemExit):
            export.main()
        assert line in capsys.readouterr().err


@pytest.mark.ci
def test_stage_calibrate_leaves_what_other_engines_take(tmp_path):
    tiny = ["num_inference_steps=12", "budget=5", "calibration.num_prompts=2", "batch_size=2"]
    code, out, err = run("stage=calibrate", "method=teacache", *tiny, folder=tmp_path)
    assert code == 0, err
    (file,) = (tmp_path / "calibrations").glob("tiny_flux-teacache-K5-T12-*.json")
    decided = json.loads(file.read_text())
    assert len(decided["polynomial"]) == 5 and decided["threshold"] > 0 and 0 < decided["r_squared"] <= 1
    assert f"polynomial: {json.dumps(decided['polynomial'])}" in out
    cost = decided["calibration_trajectories"]
    assert cost["statistics"] == 2 and cost["method"] >= 2 * 5 / 12  # of two prompts; a try or more of about 5 of 12


def test_a_poor_fit_has_a_low_r_squared():
    noise = np.random.default_rng(0)
    x, line = noise.random((4, 50)), np.linspace(0, 1, 50)[None].repeat(4, 0)
    y = noise.random((4, 50))
    assert r_squared(fit_polynomial(x, y), x, y) < 0.2
    assert r_squared(fit_polynomial(line, 3 * line**2), line, 3 * line**2) > 0.999


class ModelPatcher:
    """What a node of ComfyUI is given for a model, as far as the node uses it."""

    def __init__(self):
        self.wrapper = None

    def clone(self):
        return ModelPatcher()

    def set_model_unet_function_wrapper(self, wrapper):
        self.wrapper = wrapper


def comfy_prediction(x, sigma, scale):
    return scale * torch.tanh(x) + sigma


def comfy_samples(patcher, sigmas, batch=2):
    """Euler's steps as ComfyUI calls a wrapped model, which returns what is left without noise; the latents of all
    steps and the number of real calls of the model."""
    calls = []

    def apply_model(x, timestep, scale):
        calls.append(timestep)
        return x - timestep[:, None] * comfy_prediction(x, timestep[:, None], scale)

    x = torch.linspace(-1, 1, 4 * batch).reshape(batch, 4)
    for sigma, following in pairwise(sigmas):
        options = {"input": x, "timestep": torch.full((batch,), sigma), "c": {"scale": 0.5}, "cond_or_uncond": [1, 0]}
        denoised = (
            patcher.wrapper(apply_model, options) if patcher.wrapper else apply_model(x, options["timestep"], 0.5)
        )
        x = x + (following - sigma) * (x - denoised) / sigma
    return x, len(calls)


def test_the_comfyui_node_computes_the_methods_steps(tmp_path):
    path, sigmas = tmp_path / "m.safetensors", torch.linspace(1, 0, T + 1).tolist()
    dpcache.Method(Schedule([0, 1, 2, 5, 8], T), "output", Taylor(1)).save(path)
    names = {}
    exec(export.export_method(str(path), "comfyui"), names)
    node = names["NODE_CLASS_MAPPINGS"]["DPCacheModel"]
    inputs = node.INPUT_TYPES()["required"]
    assert inputs["budget"][1]["default"] == 5 and inputs["method"][1]["default"] == str(path)
    (patched,) = getattr(node(), node.FUNCTION)(ModelPatcher(), inputs["method"][1]["default"], 5)
    (first, calls), (second, again) = (comfy_samples(patched, sigmas) for _ in range(2))
    exact, every = comfy_samples(ModelPatcher(), sigmas)
    assert calls == again == 5 and every == T and torch.equal(first, second)
    assert 0 < (first - exact).norm() < 0.05 * exact.norm()
    # By hand: the prediction is what a line leads on from, not what ComfyUI's models return.
    x, kept = torch.linspace(-1, 1, 8).reshape(2, 4), {}
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        if step in (0, 1, 2, 5, 8):
            v = kept[step] = comfy_prediction(x, sigma, 0.5)
        else:
            before, latest = sorted(kept)[-2:]
            v = kept[latest] + (step - latest) / (latest - before) * (kept[latest] - kept[before])
        x = x + (following - sigma) * v
    torch.testing.assert_close(first, x)
    with pytest.raises(dpcache.SettingError, match="steps"):
        comfy_samples(patched, torch.linspace(1, 0, T + 3).tolist())


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (replace(uniform_skip(5, T), made_for={"model": "FluxTransformer2DModel 0"}), "was calibrated for a model"),
        (solver(5, T, "UniPCMultistepScheduler"), "brings a scheduler"),
    ],
)
def test_what_comfyui_could_not_run_is_not_exported(tmp_path, method, why):
    method.save(tmp_path / "m.safetensors")
    with pytest.raises(dpcache.SettingError, match=f"{why} of diffusers, and ComfyUI has its own"):
        export.export_method(str(tmp_path / "m.safetensors"), "comfyui")


def test_a_method_file_becomes_a_script(pipe, tmp_path, capsys, monkeypatch):
    path = tmp_path / "m.safetensors"
    method = taylorseer(K, T, lite=True)
    method.save(path)
    monkeypatch.setattr("sys.argv", ["export", str(path), "--to", "pipeline"])
    export.main()
    latents, names, code = execute(capsys.readouterr().out, pipe)
    exec(code, names)
    with dpcache.cached(pipe, method):
        assert torch.equal(latents[0], generate(pipe, ["dog"], [0], T, decode=False, **CALL).latents)
    for arguments, line in (
        (["--to", "comfyui"], "site=stack: ComfyUI's models are not those of diffusers"),
        (["--to", "pipeline", "--budget", "9"], f"holds methods for budget={K}, not 9"),
        (["--to", "json"], "give it a --budget"),
    ):
        monkeypatch.setattr("sys.argv", ["export", str(path), *arguments])
        with pytest.raises(SystemExit):
            export.main()
        assert line in capsys.readouterr().err
