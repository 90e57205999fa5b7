"""Schedules for other programs, run there; and what `stage=calibrate` leaves."""

import json

import numpy as np
import pytest
import torch

import dpcache
from baselines.teacache import fit_polynomial, r_squared
from dpcache import export
from dpcache.planned import dpcache as planned
from dpcache.sampler import generate
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


def test_cache_dit_computes_the_exported_steps(pipe, calibration):
    cache_dit = pytest.importorskip("cache_dit")
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


def test_stage_calibrate_leaves_what_other_engines_take(tmp_path):
    tiny = ["num_inference_steps=12", "budget=5", "calibration.num_prompts=2", "batch_size=2"]
    code, out, err = run("stage=calibrate", "method=teacache", *tiny, folder=tmp_path)
    assert code == 0, err
    decided = json.loads((tmp_path / "calibrations" / "tiny_flux-teacache-K5-T12.json").read_text())
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
