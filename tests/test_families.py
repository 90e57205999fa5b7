"""Every method on every model family: whole diffusers pipelines with random weights, sampled as run.py samples them."""

import functools
from dataclasses import replace

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from hydra.utils import instantiate
from omegaconf import OmegaConf

import dpcache
from baselines.full import full
from baselines.taylorseer import taylorseer
from baselines.uniform_skip import uniform_skip
from dpcache.models.pretrained import load
from dpcache.sampler import sample
from dpcache.sites import transformer_blocks
from helpers.cases import Case, K, T, case, settings
from helpers.commands import ROOT
from helpers.families import FAMILIES, wan21_t2v
from helpers.tracing import calls_of, computed_steps, distance, state_of

METHODS = ("full", "dpcache", "dpcache_lsq", "dpcache_lsq_output", "taylorseer", "teacache", "fora", "uniform_skip")
GIVEN = {  # what the other methods would have to search for
    "ab_cache": "order=2",
    "zeus": "warmup=3",
    "easycache": "threshold=1.0",
    "ertacache": "threshold=null",
    "hicache": "order=2",
    "foca": "warmup=3",
    "speca": "threshold=1e9",
    "toca": "interval=3",
    "profilingdit": "interval=3",
    "spectrum": "warmup=3",
    "hyca": "clusters=2",
    "dicache": "threshold=1e9",
    "bwcache": "threshold=1e9",
}
INSIDE = ("dpcache", "teacache", "taylorseer")  # one for every site inside the model
GUIDED = [name for name, family in FAMILIES.items() if len(family.branches) > 1]


@pytest.fixture(params=FAMILIES)
def family(request) -> Case:
    return case(request.param)


@pytest.fixture(params=GUIDED)
def guided(request) -> Case:
    return case(request.param)


@pytest.mark.parametrize("name", METHODS)
def test_every_step_computed_is_the_plain_pipeline_to_the_bit(family, name):
    method = family.method(name, T)
    if name == "teacache":
        method.schedule.threshold = 0.0
        method.schedule.polynomial = (0.0,)
    assert torch.equal(family.latents(method), family.reference)
    assert method.report().computed == {branch: list(range(T)) for branch in family.family.branches}


@pytest.mark.parametrize("name", METHODS)
def test_the_budget_is_spent_in_every_branch_and_generations_are_alike(family, name):
    method, pipe, branches = family.method(name), family.pipe, family.family.branches
    with dpcache.cached(pipe, method):
        with calls_of(pipe.transformer) as calls:
            first = family.latents()
        assert len(calls) == T * len(branches)
        assert dpcache.report(pipe).computed == computed_steps(pipe.transformer, calls, branches)
        family.latents(which=(2,))  # another prompt and shape in between
        assert torch.equal(family.latents(), first)
        counts = dpcache.report(pipe).computed_counts
    budget, margin = T if name == "full" else K, name == "teacache"  # which spends its budget on average
    assert list(counts) == list(branches) and all(len(generations) == 3 for generations in counts.values())
    assert all(abs(count - budget) <= margin for generations in counts.values() for count in generations)
    assert first.isfinite().all() and torch.equal(first, family.reference) == (name == "full")


@pytest.mark.parametrize("name", METHODS)
def test_methods_come_and_go_without_a_trace(family, name):
    pipe, method = family.pipe, family.method(name)
    reference, before = family.reference, state_of(pipe.transformer)
    first = family.latents(method)
    assert state_of(pipe.transformer) == before and torch.equal(family.latents(), reference)
    assert torch.equal(family.latents(method), first)
    assert state_of(pipe.transformer) == before


@pytest.mark.parametrize("name", GIVEN)
def test_the_other_methods_run_on_every_family(family, name):
    pipe, method = family.pipe, instantiate(settings(name, K, f"method.{GIVEN[name]}"))
    if name == "profilingdit":
        method.blocks, method.profiled = [1], False
    channels = pipe.transformer.config.in_channels
    if name in ("easycache", "ertacache") and pipe.transformer.config.out_channels == 2 * channels:  # with a variance
        with pytest.raises(ValueError, match="has another shape than its prediction"):
            method.prepare(pipe, family.calibration("stack"))
            family.latents(method)
        return
    method.prepare(pipe, family.calibration("stack"))
    reference, before = family.reference, state_of(pipe.transformer)
    first = family.latents(method)
    counts = method.report().computed_counts
    assert list(counts) == list(family.family.branches) and all(2 <= count < T for (count,) in counts.values())
    assert first.isfinite().all() and not torch.equal(first, reference)
    assert torch.equal(family.latents(method), first) and state_of(pipe.transformer) == before


@pytest.mark.parametrize("name", ["taylorseer", "teacache"])
def test_a_generation_that_broke_off_leaves_no_trace(family, name):
    pipe, method, calls = family.pipe, family.method(name), []

    def stop(module, args):  # between two branches of a step, where there are two
        calls.append(module)
        if len(calls) == 6:
            raise KeyboardInterrupt

    expected = family.latents(method)
    with dpcache.cached(pipe, method):
        handle = pipe.transformer.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            family.latents(which=(2, 3))
        handle.remove()
        assert torch.equal(family.latents(), expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_gives_the_same_samples_as_one_by_one(family, name):
    """Noise, also a stochastic scheduler's, comes from each sample's seed, and no sample's features reach another's."""
    method = family.method(name)
    if name == "teacache":  # decides for a whole batch, so the steps have to be given
        method = dpcache.Method(family.method("dpcache").schedule, method.site, method.predictor)
    together = family.latents(method)
    alone = [family.latents(method, which=(i,)) for i in (0, 1)]
    assert distance(together, torch.cat(alone)) < 1e-4
    assert distance(*alone) > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_histories_of_guidance_branches_never_mix(guided, name):
    """On given latents, where the other branch cannot reach a branch through the sampler: what it computes is what it
    computes without a cache, and what it predicts does not change with the other branch's prompt."""
    pipe, method, branches = guided.pipe, guided.method(name), guided.family.branches
    trajectory = []

    def remember(pipe, step, time, tensors):
        trajectory.append(tensors["latents"])
        return {}

    def give(pipe, step, time, tensors):
        return {"latents": trajectory[step]}

    def outputs(method, callback, *negative):
        """Of the transformer in every step, branch by branch."""
        kept = []
        handle = pipe.transformer.register_forward_hook(lambda module, args, output: kept.append(output[0].clone()))
        guided.latents(method, callback_on_step_end=callback, negative_prompt=list(negative))
        handle.remove()
        return {branch: torch.stack(kept[i::2]) for i, branch in enumerate(branches)}

    plain = outputs(None, remember, "a night", "an old city")
    one = outputs(method, give, "a night", "an old city")
    computed = method.report().computed
    other = outputs(method, give, "boats", "snow")
    for branch, steps in computed.items():
        assert torch.equal(one[branch][steps], plain[branch][steps])
        assert torch.equal(one[branch], plain[branch]) == (name == "full")
    assert torch.equal(other["cond"], one["cond"]) and method.report().computed["cond"] == computed["cond"]
    assert (other["uncond"] != one["uncond"]).flatten(1).any(1).all()


def test_a_scheduler_that_calls_the_model_twice_a_step_is_refused():
    pipe = FAMILIES["dit_ddim"].make()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler calls the model 15 times in 8 steps"):
        sample(pipe, uniform_skip(K, T), ["7"], [0])


@pytest.mark.parametrize("name", INSIDE)
def test_model_offload_keeps_the_cache(family, name):
    """diffusers' own offload, with the CPU for its accelerator: its hooks come off and on after every call, inside ours
    or around them."""
    pipe, method = family.pipe, family.method(name)
    expected, reference, computed = family.latents(method), family.reference, method.report().computed
    pipe.enable_model_cpu_offload(device="cpu")
    with dpcache.cached(pipe, method):
        assert torch.equal(family.latents(), expected) and torch.equal(family.latents(), expected)
        assert dpcache.report(pipe).computed == computed
    assert torch.equal(family.latents(), reference)
    pipe.remove_all_hooks()
    with dpcache.cached(pipe, method):
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(family.latents(), expected) and torch.equal(family.latents(), expected)
    pipe.remove_all_hooks()
    assert torch.equal(family.latents(), reference)


@pytest.mark.parametrize("kind", [name for name in FAMILIES if name not in ("flux", "dit_ddpm")])  # one a transformer
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # of diffusers
def test_compiled_blocks_give_the_same(kind):
    family = case(kind)
    plain = [(method, family.latents(method), method.report().computed) for method in map(family.method, INSIDE)]
    reference, blocks = family.reference, transformer_blocks(family.pipe.transformer)
    torch.compiler.reset()
    for block in blocks:
        block.compile(backend="eager")
    for method, expected, computed in plain:
        with dpcache.cached(family.pipe, method):
            assert distance(family.latents(), expected) < 1e-5 and distance(family.latents(), expected) < 1e-5
            assert dpcache.report(family.pipe).computed == computed
    assert distance(family.latents(), reference) < 1e-5
    for block in blocks:
        block._compiled_call_impl = None


@pytest.mark.parametrize("kind", [name for name, family in FAMILIES.items() if family.config])
def test_a_saved_pipeline_runs_in_the_precision_of_its_config(kind, tmp_path):
    family = case(kind)
    family.pipe.save_pretrained(tmp_path)
    config = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/model/{family.family.config}.yaml"))
    options = {name: config[name] for name in ("dtype", "vae_dtype", "vae_tiling", "scheduler") if name in config}
    pipe = load(str(tmp_path), device="cpu", **options)
    assert type(pipe) is type(family.pipe) and config["dtype"] == str(pipe.transformer.dtype).removeprefix("torch.")
    for name in ("labels", "prompt_template_encode", "prompt_template_encode_start_idx"):  # not among what is saved
        if hasattr(pipe, name):
            setattr(pipe, name, getattr(family.pipe, name))
    pipe.set_progress_bar_config(disable=True)
    method = family.method("taylorseer")
    low = sample(pipe, method, family.family.prompts[:2], (0, 1), **family.family.call)
    high = sample(family.pipe, method, family.family.prompts[:2], (0, 1), **family.family.call)
    assert distance(low.latents, high.latents) < 0.05
    assert low.images.shape == high.images.shape and low.images.dtype == "uint8"
    assert abs(low.images.astype(float) - high.images).mean() < 5


@pytest.fixture(scope="module")
def two_stages():
    return Case(replace(FAMILIES["wan21_t2v"], build=functools.partial(wan21_t2v, two=True)))


def test_two_transformers_take_a_method_each(two_stages):
    pipe, branches = two_stages.pipe, two_stages.family.branches
    with pytest.raises(ValueError, match="has two transformers, for two ranges of steps"):
        dpcache.enable(pipe, uniform_skip(K, T))
    reference = two_stages.latents()
    boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    high = int((pipe.scheduler.timesteps >= boundary).sum())
    stages, low = (pipe.transformer, pipe.transformer_2), T - high
    assert min(high, low) > 2  # both have something to skip

    with dpcache.cached(stages[0], full(high)), dpcache.cached(stages[1], full(low)):
        assert torch.equal(two_stages.latents(), reference)
    methods = uniform_skip(2, high), taylorseer(3, low, warmup=2)
    with dpcache.cached(stages[0], methods[0]), dpcache.cached(stages[1], methods[1]):
        with calls_of(stages[0]) as first, calls_of(stages[1]) as second:
            latents = two_stages.latents()
        assert not torch.equal(latents, reference) and torch.equal(two_stages.latents(), latents)
        for stage, method, calls in zip(stages, methods, (first, second)):
            report = dpcache.report(stage)
            assert report.computed == computed_steps(stage, calls, branches)
            assert report.computed == {branch: method.schedule.steps for branch in branches}
            assert all(len(counts) == 2 for counts in report.computed_counts.values())
    assert torch.equal(two_stages.latents(), reference)
