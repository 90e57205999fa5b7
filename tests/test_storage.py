"""A method as a file, by its short name, and on a pipeline that it was not made for."""

import json
import logging
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import dpcache
from baselines.clusca import clusca
from baselines.delta_dit import delta_dit
from baselines.dicache import dicache
from baselines.easycache import easycache
from baselines.ertacache import ERTACache
from baselines.first_block_cache import first_block_cache
from baselines.hyca import HyCa
from baselines.smoothcache import smoothcache
from baselines.solver import solver
from baselines.speca import speca
from baselines.taylorseer import taylorseer
from baselines.toca import toca
from dpcache import storage
from dpcache.predictors import Predictor, Taylor
from dpcache.sampler import generate, sample
from dpcache.schedules import Schedule
from dpcache.steps import Loop
from helpers.commands import run
from helpers.embedded import CALL
from helpers.families import FAMILIES

T = 8


@dataclass(frozen=True)
class Half(Predictor):
    """A predictor of somebody else's."""

    history = 1

    def weights(self, keys, step):
        return (0.5,)


@pytest.fixture(scope="module")
def calibration(pipe):
    return dpcache.calibrate(pipe, ["red apple", "dog"], T, (), **CALL)


MADE = {
    "fixed": lambda: taylorseer(4, T),
    "online": lambda: easycache(5, T, threshold=0.05),
    "probed": lambda: dicache(5, T, threshold=0.2),
    "verified": lambda: speca(4, T, threshold=0.5),
    "tokens": lambda: toca(4, T, interval=3),
    "clusters": lambda: clusca(4, T, interval=3),
    "staggered": lambda: smoothcache(4, T, steps={"attn": [0, 3, 6], "ff": [0, 2, 4]}),
    "ends": lambda: delta_dit(4, T, interval=3, share=0.5),
    "solver": lambda: solver(4, T, "UniPCMultistepScheduler"),
    "library": lambda: first_block_cache(5, T, threshold=0.1),
    "channels": lambda: HyCa(4, T),
    "weights": lambda: ERTACache(4, T),
    "another's": lambda: dpcache.Method(Schedule([0, 1, 4], T), "output", Half()),
}


@pytest.mark.parametrize("name", MADE)
def test_a_method_from_its_file_makes_the_same(pipe, calibration, tmp_path, name):
    recipe = MADE[name]()
    calibration.measure(pipe, recipe.statistics or ())
    method = recipe.build(pipe, calibration)
    if recipe.statistics is not None:
        method = calibration.sign(method)
    storage.save({4: method}, tmp_path / "m.safetensors")
    loaded = dpcache.Method.load(tmp_path / "m.safetensors")
    assert type(loaded) is type(method) and loaded.decided == method.decided and loaded.made_for == method.made_for
    made = [sample(pipe, which, ["cat"], [3], decode=False, **CALL).latents for which in (method, loaded)]
    assert torch.equal(*made)
    assert not list(tmp_path.glob(".*.part"))


def test_a_file_may_hold_a_method_for_each_budget(tmp_path):
    path = tmp_path / "m.safetensors"
    taylorseer(4, T).save(path)
    assert dpcache.Method.load(path, budget=4).schedule.steps == taylorseer(4, T).schedule.steps
    storage.save({budget: taylorseer(budget, T) for budget in (4, 6)}, path)
    assert len(dpcache.Method.load(path, 6).schedule.steps) == 6
    for wrong in (None, 5):
        with pytest.raises(dpcache.SettingError, match=f"holds methods for budget=4, 6, not {wrong}"):
            dpcache.Method.load(path, wrong)


def test_files_that_are_none_or_name_what_is_not_known_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        dpcache.Method.load(tmp_path / "none")
    save_file({"a": np.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(dpcache.SettingError, match="is not a method file"):
        dpcache.Method.load(tmp_path / "foreign")
    for name in ("os:system", "subprocess:Popen", "dpcache.storage:save", "nowhere:Part", "dpcache.nowhere:Part"):
        text = json.dumps({"4": {"class": name, "settings": {"command": "touch /tmp/no"}}})
        save_file({"none": np.zeros(0)}, tmp_path / "odd", {"format": "dpcache method 1", "methods": text})
        with pytest.raises(dpcache.SettingError, match="is not a method file"):
            dpcache.Method.load(tmp_path / "odd")
    method = dpcache.Method(Schedule([0], T), "stack", Taylor(1), {"pipe": object()})
    with pytest.raises(dpcache.SettingError, match="a object cannot be stored"):
        method.save(tmp_path / "m")


def test_accelerate_calibrates_builds_and_enables(pipe):
    try:
        method = dpcache.accelerate(pipe, "dpcache", 4, ["red apple", "dog"], T, settings={"warmup": 2}, **CALL)
        assert dpcache.report(pipe).computed == {}
        generate(pipe, ["cat"], [3], T, decode=False, **CALL)
        assert dpcache.report(pipe).computed == {"cond": method.schedule.steps} and len(method.schedule.steps) == 4
        assert method.schedule.steps[:2] == [0, 1] and method.made_for["branches"] == "['cond']"
    finally:
        dpcache.disable(pipe)
    with pytest.raises(dpcache.SettingError, match=r"method=dpcache is calibrated: give it some prompts=\[...\]"):
        dpcache.accelerate(pipe, "dpcache", 4, num_inference_steps=T)
    with pytest.raises(dpcache.SettingError, match="method=dpcashe is not one of ab_cache, "):
        dpcache.accelerate(pipe, "dpcashe", 4)
    with pytest.raises(dpcache.SettingError, match="method=fora has no setting speed, but"):
        dpcache.recipe("fora", 4, T, speed=1)
    assert dpcache.recipe("taylorseer_lite", 4, T).site.name == "stack"  # from a file on top of another


def test_another_use_than_it_was_made_for_is_named(pipe, calibration, caplog):
    calibration.rerun(pipe, taylorseer(4, T))
    method = calibration.sign(taylorseer(4, T))
    with caplog.at_level(logging.WARNING):
        sample(pipe, method, ["cat"], [3], decode=False, **CALL)
        assert not caplog.records
        sample(pipe, method, ["cat"], [3], decode=False, **CALL | {"height": 32, "width": 32})
        assert "was made for the model's input [64, " in caplog.text
        caplog.clear()
        sample(pipe, method, ["cat"], [3], decode=False, negative_prompt="", true_cfg_scale=2.0, **CALL)
        assert "branches ['cond'], this run has ['cond', 'uncond']" in caplog.text
        caplog.clear()
        guided = replace(method, made_for=method.made_for | {"guidance": "{'guidance_scale': 2.0}"})
        sample(pipe, guided, ["cat"], [3], decode=False, guidance_scale=2, **CALL)
        assert not caplog.records
        sample(pipe, guided, ["cat"], [3], decode=False, guidance_scale=5.0, **CALL)
        assert "guidance {'guidance_scale': 2.0}, this run has {'guidance_scale': 5.0}" in caplog.text
        caplog.clear()
        with torch.no_grad():
            pipe.transformer.proj_out.bias[0] += 1
            sample(pipe, method, ["cat"], [3], decode=False, **CALL)
            pipe.transformer.proj_out.bias[0] -= 1
        assert "was made for other weights" in caplog.text
    own = pipe.scheduler
    pipe.scheduler = type(own).from_config(own.config, shift=7.0)
    with pytest.raises(dpcache.SettingError, match=r"made for a scheduler of shift=.*, this pipeline has 7\.0"):
        dpcache.enable(pipe, method)
    pipe.scheduler = own
    dpcache.enable(pipe, method)
    dpcache.disable(pipe)


@pytest.mark.ci
def test_stage_calibrate_leaves_a_method_file_with_all_its_budgets(pipe, tmp_path):
    tiny = ["num_inference_steps=8", "calibration.num_prompts=2", "batch_size=2"]
    for budget in (3, 5):
        code, out, err = run("stage=calibrate", "method=dpcache", f"budget={budget}", *tiny, folder=tmp_path)
        assert code == 0, err
    (path,) = (tmp_path / "calibrations").glob("tiny_flux-dpcache-T8-*.method.safetensors")
    assert f"method: {json.dumps(str(path))}" in out
    for budget in (3, 5):
        method = dpcache.Method.load(path, budget)
        report = sample(pipe, method, ["cat"], [3], decode=False, **CALL).report
        assert report.computed == {"cond": method.schedule.steps} and len(method.schedule.steps) == budget
    content = path.read_bytes()
    for other in ("method.order=1", "model.call.height=32", "calibration.seed=5"):
        code, _, err = run("stage=calibrate", "method=dpcache", "budget=5", *tiny, other, folder=tmp_path)
        assert code == 0, err
    assert len(list(path.parent.glob("tiny_flux-dpcache-T8-*.method.safetensors"))) == 4
    assert len(list(path.parent.glob("tiny_flux-dpcache-K5-T8-*.json"))) == 4 and path.read_bytes() == content


class Damped(Taylor):
    def weights(self, keys, step):
        return tuple(0.9 * weight for weight in super().weights(keys, step))


def test_a_class_that_would_come_back_as_another_is_not_stored(tmp_path):
    with pytest.raises(dpcache.SettingError, match="would lose its weights"):
        dpcache.Method(Schedule([0, 2, 4], 6), "stack", Damped(2)).save(tmp_path / "method.safetensors")


@pytest.fixture
def planned_for_six(pipe):
    """A recipe of six steps, and a calibration for it."""
    made = dpcache.recipe("dpcache", budget=3, num_inference_steps=6, warmup=2)
    return made, dpcache.calibrate(pipe, ["dog"], 6, made.statistics, **CALL)


def test_a_calibration_for_other_steps_or_another_model_is_refused(pipe, planned_for_six):
    made, calibration = planned_for_six
    other = dpcache.recipe("dpcache", budget=3, num_inference_steps=8, warmup=2)
    with pytest.raises(dpcache.SettingError, match="num_inference_steps=8: this calibration was made for 6"):
        other.build(pipe, calibration)
    with pytest.raises(dpcache.SettingError, match="this calibration was made for the model FluxTransformer2DModel"):
        made.build(FAMILIES["dit_ddim"].make(), calibration)


def test_a_method_remembers_what_it_was_made_for_however_it_was_built(pipe, planned_for_six, monkeypatch, caplog):
    made, calibration = planned_for_six
    method = made.build(pipe, calibration)
    assert method.made_for["num_inference_steps"] == "6" and "guidance_scale" in method.made_for["guidance"]
    call = {"prompt": ["dog"], "num_inference_steps": 6, "output_type": "latent", **CALL}
    with dpcache.cached(pipe, method):
        pipe(**call)
        assert not caplog.messages
        pipe(**call, guidance_scale=7.0)
        assert "guidance" in caplog.messages[-1]
        pipe(**call, sigmas=[1.0, 0.9, 0.5, 0.3, 0.2, 0.1])
        assert "this method was made for the timesteps" in caplog.messages[-1]
        pipe(**call, sigmas=[1.0, 0.9, 0.5, 0.3, 0.2, 0.1])
        assert len(caplog.messages) == 2  # once each
        shifted = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=9.0)
        monkeypatch.setattr(pipe, "scheduler", shifted)
        with pytest.raises(dpcache.SettingError, match="this method was made for a scheduler of shift"):
            pipe(**call)


def test_a_model_alone_is_compared_with_what_a_method_was_made_for(pipe, planned_for_six):
    made, calibration = planned_for_six
    method = made.build(pipe, calibration)
    with pytest.raises(dpcache.SettingError, match="this method was made for the model FluxTransformer2DModel"):
        dpcache.enable(FAMILIES["dit_ddim"].make().transformer, method)
    with dpcache.cached(Loop(pipe.transformer, 6), method):
        pass
