"""Published settings: each record is sound, a method made of them needs no calibration, others are refused."""

import math
import re

import numpy as np
import pytest
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from eval import published
from eval.schema import config_hash
from helpers.commands import ROOT, run

RECORDS = [(model, method) for model, methods in published.records().items() for method in methods]
METHODS = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
MODELS = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
MADE = [(model, method) for model, method in RECORDS if model in MODELS and method in METHODS]


@pytest.fixture(scope="module", autouse=True)
def session():
    """One session of Hydra for all."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


@pytest.fixture(autouse=True)
def warned_again():
    published._warn.cache_clear()


def made(model: str, method: str, *overrides: str):
    """The recipe of a command, as run.py makes it."""
    config = compose("config", [f"model={model}", f"method={method}", *overrides])
    return instantiate(published.resolve(config.method, model, method))


def everything(model: str, method: str, *overrides: str):
    """The recipe with all that is published, for the authors' number of steps and a budget that there is."""
    record = published.records()[model][method]
    names, steps = [f"method.{name}=published" for name in record["settings"]], record["num_inference_steps"]
    budget = max(next((value for value in record["settings"].values() if isinstance(value, dict)), [20]))
    return made(model, method, *names, f"num_inference_steps={steps}", f"budget={budget}", *overrides)


def test_there_are_records_of_the_models_and_methods_that_were_asked_for():
    wanted = [("flux", "teacache"), ("flux", "magcache"), ("wan21_t2v", "teacache"), ("hunyuan_video", "easycache")]
    assert {*wanted, ("flux", "dicache"), ("flux", "dpcache"), ("qwen_image", "meancache")} <= {*RECORDS}
    assert len(MADE) > 15


@pytest.mark.parametrize(("model", "method"), RECORDS)
def test_a_record_is_well_formed(model, method):
    record = published.records()[model][method]
    assert list(record) == ["source", "num_inference_steps", "size", "settings"]
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/blob/[0-9a-f]{7}/\S+", record["source"])
    T, settings = record["num_inference_steps"], record["settings"]
    assert T is None or 20 <= T <= 100
    assert record["size"] is None or isinstance(record["size"], str)
    if method in METHODS:
        assert settings.keys() <= OmegaConf.load(ROOT / "conf" / "method" / f"{method}.yaml").method.keys()
    sound = {
        "polynomial": lambda value: len(value) == 5 and all(map(math.isfinite, value)) and value[0] != 0,
        "ratios": lambda value: len(value) == T and value[0] == 1 and min(value) > 0.5 and max(value) < 2,
        "threshold": lambda value: 0 < value < 1,
        "retention": lambda value: 0 < value < 1,
        "clip": lambda value: value in ([1, 1.5], [1, 2]),
        "warmup": lambda value: value in (5, 10),
        "max_skip": lambda value: value in range(2, 7),
        "probe": lambda value: value == 1,
        "steps": lambda value: all(map(is_schedule, value, value.values())),
        "weights": lambda value: all(len(rows) == budget for budget, rows in value.items()),
        "scales": lambda value: all(len(row) == budget and 0.5 < min(row) < 1.5 for budget, row in value.items()),
    }

    def is_schedule(budget, steps):
        return len(steps) == budget and steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] < T

    assert all(sound[name](value) for name, value in settings.items())


@pytest.mark.parametrize(
    ("model", "method"),
    [made for made in MADE if made[1] != "meancache"],  # which still chooses its spans
)
def test_all_that_is_published_makes_a_method_that_needs_no_calibration(model, method):
    assert everything(model, method).statistics is None


def test_the_numbers_arrive_where_they_belong():
    schedule = everything("flux", "teacache").schedule
    by_hand = 498.651651e-4 - 283.781631e-3 + 55.8554382e-2 - 3.82021401e-1 + 0.264230861  # at a change of 0.1
    assert np.polyval(schedule.polynomial, 0.1) == pytest.approx(by_hand) and schedule.threshold == 0.6
    assert everything("wan21_t2v", "teacache").schedule.warmup == 5
    assert everything("hunyuan_video", "easycache").schedule.threshold == 0.025


def test_ratios_are_those_that_diffusers_has_and_taken_from_the_nearest_of_other_steps(caplog):
    assert everything("flux", "magcache").config(None).mag_ratios.tolist() == FLUX_MAG_RATIOS.tolist()
    assert not caplog.records
    taken = everything("flux", "magcache", "num_inference_steps=55").config(None).mag_ratios.tolist()
    assert taken[::2] == FLUX_MAG_RATIOS.tolist()  # 55 steps have those of 28 at every second one
    assert "published for num_inference_steps=28, used for 55" in caplog.text


def test_what_was_published_together_is_used_together_or_warned_of(caplog):
    made("wan21_t2v", "teacache", "method.polynomial=published", "method.warmup=published")
    made("wan21_t2v", "dicache", "method.threshold=published", "method.clip=[1,2]", "method.retention=0.2", "budget=20")
    assert not caplog.records
    made("wan21_t2v", "teacache", "method.polynomial=published")
    assert "polynomial published for warmup=5, used with 1: method.warmup=published takes it too" in caplog.text


def test_only_what_is_not_published_is_calibrated():
    recipe = made("flux", "magcache", "method.ratios=published", "budget=20")
    assert recipe.statistics == () and recipe.threshold is None
    assert {type(s).__name__ for s in made("flux", "teacache", "method.polynomial=published").statistics} == {
        "InputChange"
    }


def test_the_list_of_steps_is_that_of_the_recorded_experiment():
    recorded = compose("config", ["experiment=flux_published"]).method
    assert made("flux", "dpcache", "method.steps=published", "budget=13").schedule.steps == recorded.steps


@pytest.mark.parametrize(
    ("model", "method", "overrides", "message"),
    [
        ("dit", "teacache", ["method.polynomial=published"], "none is known for model=dit, only for model=flux,"),
        ("flux", "fora", ["method.interval=published"], "none is known for model=flux, nor for any other model"),
        ("flux", "dpcache", ["method.steps=published", "budget=12"], "takes one of budget=9,10,11,13,15,17,20, not 12"),
        ("flux", "dpcache", ["method.steps=published", "num_inference_steps=28"], "num_inference_steps=50, not 28"),
    ],
)
def test_what_is_not_published_is_refused(model, method, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        made(model, method, *overrides)


@pytest.mark.ci
def test_a_command_takes_what_is_published(tmp_path):
    settings = ["method=teacache", "method.polynomial=published", "method.threshold=published", "+dry_run=true"]
    for model, name in (("flux", "FLUX.1-dev"), ("wan21_t2v", "Wan2.1-T2V"), ("hunyuan_video", "HunyuanVideo")):
        code, out, err = run(f"model={model}", *settings, folder=tmp_path)
        assert code == 0, err
        assert name in out and "decided online" in out


def test_a_run_of_teacache_without_a_warmup_keeps_its_name():
    """As in run folders from before there was that setting."""
    assert config_hash(compose("config", ["method=teacache"])) == "bd13777af27a"
    assert config_hash(compose("config", ["method=teacache", "method.warmup=5"])) != "bd13777af27a"
