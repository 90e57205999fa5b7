"""Libraries' own caches under our protocol, and a method from a file of its own."""

import itertools
import json
import os

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, MagCacheConfig

import baselines.dbcache
import dpcache
from baselines.dbcache import dbcache
from baselines.first_block_cache import first_block_cache
from baselines.full import full
from baselines.library import LibraryCache
from baselines.magcache import MagnitudeRatios
from baselines.pab import pab
from baselines.search import closest
from dpcache.sampler import generate, sample
from eval import timing
from helpers.commands import ENVIRONMENT, TINY, composed, results, run
from helpers.embedded import CALL, run_once
from helpers.tracing import count_calls, snapshot

T, K = 10, 6
WHOLE = ["diffusers_taylorseer_lite", "magcache", "seacache"]
FIRST_BLOCK = ["first_block_cache", "dbcache", "dbcache_taylorseer", "dbcache_foca", "dbcache_scm"]
ATTENTION = ["diffusers_taylorseer", "pab", "fastercache"]


def attentions(pipe):
    return [pipe.transformer.single_transformer_blocks[-1].attn.to_q]


@pytest.fixture(scope="module")
def calibration(pipe):
    return dpcache.calibrate(pipe, ["red apple"], T, (), **CALL)


ONE_OF_EACH = {kind[0] for kind in (WHOLE, FIRST_BLOCK, ATTENTION)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ONE_OF_EACH else pytest.mark.ci)
        for name in (*WHOLE, *FIRST_BLOCK, *ATTENTION)
    ],
)
def test_a_peer_spends_its_budget_and_leaves_no_trace(pipe, calibration, name):
    if name.startswith("dbcache"):
        pytest.importorskip("cache_dit")
    _, recipe = composed(f"method={name}", f"budget={K}", f"num_inference_steps={T}")
    expected, before = run_once(pipe), snapshot(pipe.transformer)
    calibration.measure(pipe, recipe.statistics or ())
    method = recipe.build(pipe, calibration)
    assert snapshot(pipe.transformer) == before
    outputs = []
    with dpcache.cached(pipe, method):
        outputs.append(run_once(pipe))
        (attended,) = count_calls(attentions(pipe), lambda: outputs.append(run_once(pipe)))
        report = dpcache.report(pipe)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], expected)
    assert report.computed_counts == {"cond": [attended] * 2} and report.predicted_counts == {
        "cond": [T - attended] * 2
    }
    assert len(report.computed["cond"]) == attended and report.computed["cond"][0] == 0
    assert report.seconds_computed["cond"] > 0 and report.seconds_predicted["cond"] > 0

    assert snapshot(pipe.transformer) == before and torch.equal(run_once(pipe), expected)
    assert torch.equal(sample(pipe, full(T), ["dog"], [0], decode=False, **CALL).latents, expected)

    (spent, _) = report.spent["cond"]
    assert spent > attended if method.partial else spent == attended
    if name not in ATTENTION:  # of which a model without attention is the least that can be spent
        assert abs(spent - K) <= 0.5
    if method.partial:
        calls = []
        sample_flops = timing.flops(
            [pipe.transformer], lambda: calls.append(sample(pipe, method, ["dog"], [0], decode=False, **CALL))
        )[1]
        assert spent == pytest.approx(sum(sample_flops) / max(sample_flops), rel=1e-6)


def test_a_generation_that_broke_off_leaves_no_trace(pipe):
    def stop(pipe, step, timestep, tensors):
        if step == 4:
            raise KeyboardInterrupt
        return {}

    with dpcache.cached(pipe, first_block_cache(K, T, threshold=0.2)):
        expected = run_once(pipe)
        with pytest.raises(KeyboardInterrupt):
            pipe(prompt="cat", num_inference_steps=T, callback_on_step_end=stop, **CALL)
        assert torch.equal(run_once(pipe), expected)


def test_magnitude_ratios_are_those_that_diffusers_measures(pipe, calibration, capsys):
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=T))
    generate(pipe, ["red apple"], [0], T, decode=False, **CALL)
    pipe.transformer.disable_cache()
    theirs = json.loads(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")))
    calibration.measure(pipe, [MagnitudeRatios()])
    assert calibration[MagnitudeRatios()].tolist() == pytest.approx(theirs, rel=1e-4)


def test_guidance_branches(pipe):
    guided = {"negative_prompt": "", "true_cfg_scale": 3.0}
    with (
        dpcache.cached(pipe, pab(K, T, skip_range=2)),
        pytest.raises(ValueError, match="one cache for all guidance branches"),
    ):
        run_once(pipe, **guided)
    expected = run_once(pipe)
    with dpcache.cached(pipe, first_block_cache(K, T, threshold=0.2)):
        run_once(pipe, **guided)
        assert set(dpcache.report(pipe).computed) == {"cond", "uncond"}
    assert torch.equal(run_once(pipe), expected)


def test_cache_dit_is_told_of_guidance_branches(pipe):
    pytest.importorskip("cache_dit")
    guided = {"negative_prompt": "", "true_cfg_scale": 3.0}
    method = dbcache(K, T, threshold=0.2)
    with dpcache.cached(pipe, method), pytest.raises(ValueError, match="one cache for all guidance branches"):
        run_once(pipe, **guided)
    with dpcache.cached(pipe, dbcache(K, T, threshold=0.2, separate_cfg=True)):
        run_once(pipe, **guided)
        counts = dpcache.report(pipe).computed_counts
    assert 1 < counts["cond"][0] < T and 1 < counts["uncond"][0] < T


@pytest.fixture(scope="module")
def dit_pipe():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(2, 8, 4, out_channels=4, num_layers=4, sample_size=8, num_embeds_ada_norm=1000)
    vae = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), latent_channels=4)
    made = DiTPipeline(transformer.eval(), vae, DDIMScheduler(), id2label={0: "cat", 1: "dog"})
    made.set_progress_bar_config(disable=True)
    return made


def test_a_model_that_diffusers_does_not_cache(dit_pipe):
    before = snapshot(dit_pipe.transformer)
    with pytest.raises(ValueError, match="diffusers offers none of its caches for DiTTransformer2DModel"):
        sample(dit_pipe, first_block_cache(K, T, threshold=0.1), ["dog"], [0])
    assert snapshot(dit_pipe.transformer) == before


def test_cache_dit_on_a_model_without_cache_context(dit_pipe):
    pytest.importorskip("cache_dit")
    before, expected = snapshot(dit_pipe.transformer), sample(dit_pipe, full(T), ["dog"], [0]).latents
    method = dbcache(K, T, threshold=10.0, warmup=2)
    made = sample(dit_pipe, method, ["dog"], [0])
    assert not torch.equal(made.latents, expected)
    assert made.report.computed == {"default": [0, 1]}
    assert snapshot(dit_pipe.transformer) == before
    assert torch.equal(sample(dit_pipe, full(T), ["dog"], [0]).latents, expected)


def test_mistakes_are_named(pipe, monkeypatch):
    with pytest.raises(ValueError, match="needs a pipeline"):
        dpcache.enable(pipe.transformer, first_block_cache(K, T, threshold=0.1))
    with pytest.raises(ValueError, match="budget=11 must be between 1 and"):
        first_block_cache(11, T)
    with dpcache.cached(pipe, first_block_cache(K, T, threshold=0.1)), pytest.raises(ValueError, match="steps=6"):
        run_once(pipe, steps=6)
    monkeypatch.setattr(baselines.dbcache, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '.\[peers\]'"):
        dbcache(K, T)


def test_the_search_finds_the_value_with_few_tries():
    tried = []

    def spent(value):
        tried.append(value)
        return 50 / (1 + value)

    value, found = closest(spent, budget=9, first=0.1, tries=20)
    assert abs(found - 9) <= 0.5 and spent(value) == found and len(tried) < 16
    assert closest(lambda value: 30.0, budget=9, first=0.1)[1] == 30


class EveryThird(LibraryCache):
    """The shortest cache that a library could have."""

    def start(self, pipe, transformer):
        forward, call, kept = transformer.forward, itertools.count(), []

        def cached(*args, **kwargs):
            if next(call) % 3 == 0:
                kept[:] = [forward(*args, **kwargs)]
            return kept[0]

        transformer.forward = cached

    def stop(self, pipe, transformer):
        pass


def test_any_cache_can_be_watched(pipe):
    before = snapshot(pipe.transformer)
    method = EveryThird(T)
    report = sample(pipe, method, ["dog"], [0], decode=False, **CALL).report
    assert report.computed == {"cond": [0, 3, 6, 9]} and snapshot(pipe.transformer) == before


PYTHON = '''"""Keys at the square numbers; a skipped step takes the mean of the last two."""

from dpcache.method import Method
from dpcache.predictors import Predictor
from dpcache.schedules import Schedule


class Mean(Predictor):
    history = 2

    def weights(self, keys, step):
        return (0.5, 0.5) if len(keys) > 1 else (1.0,)


def squares(budget, num_inference_steps, site):
    return Method(Schedule([k * k for k in range(budget)], num_inference_steps), site, Mean())
'''
YAML = """_target_: my_methods.squares
budget: ${budget}
num_inference_steps: ${num_inference_steps}
site: stack
"""


@pytest.mark.ci
def test_a_method_of_ones_own_is_one_file_and_its_settings_another(tmp_path, monkeypatch):
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "my_methods.py").write_text(PYTHON)
    (tmp_path / "conf" / "method" / "squares.yaml").write_text(YAML)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", path)
    own = [f"hydra.searchpath=[file://{tmp_path}/conf]", "method=squares", "budget=3"]
    code, _, err = run(*own, *TINY, folder=tmp_path)
    assert code == 0, err
    (result,) = results(tmp_path)
    assert result["method"] == "squares" and result["schedules"] == [[0, 1, 4]] * 2 and result["computed_steps"] == 3
