"""Every site and every method on the model families: whole diffusers pipelines with random weights, sampled as run.py
samples them.

A site's scenario runs on every family, and on those that have little of their own in turn; there a shorter one runs at
all sites. The methods take the families in turn.
"""

import functools
import inspect
import re
from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from hydra.utils import instantiate
from omegaconf import OmegaConf

import dpcache
from baselines.full import full
from baselines.profilingdit import profilingdit
from baselines.taylorseer import taylorseer
from baselines.teacache import teacache
from baselines.toca import toca
from baselines.uniform_skip import uniform_skip
from dpcache.models.family import block_of
from dpcache.models.pretrained import load
from dpcache.predictors import LeastSquares, Reuse, Taylor
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.sites import SITES, transformer_blocks
from dpcache.statistics import Gram
from helpers.cases import Case, K, T, case, settings
from helpers.commands import ROOT, compose
from helpers.families import FAMILIES, wan21_t2v
from helpers.tracing import calls_of, computed_steps, distance, snapshot, state_of

PLAN = [0, 1, 2, 3, 6]
INSIDE = ("stack", "residual", "modules")
PARTIAL = ("tokens", "blocks")  # whose skipped steps compute something
METHODS = sorted(path.stem for path in (ROOT / "conf/method").glob("*.yaml"))
REFUSALS = (  # of a method on a family that it is not made for
    "has another shape than its prediction|diffusers offers none of its caches|one cache for all guidance branches|"
    "for schedulers of the first order|does not take these arguments|another stream than|"
    "site=(tokens|modules|clusters|matching) does not know|has two streams to keep|runs twice in one call of the model|"
    "takes features of one tensor|not one of the schedulers that weights are trained for|and this method is for|"
    "looks at more than its latest prediction|adds noise, so that runs of more steps end elsewhere|"
    "SeaCache needs the noise levels|has no attention to watch|cache_dit does not run on|"
    "AsymRnR thins the tokens of videos"
)


def at(site: str, case: Case, everything: bool = False):
    """A method of K steps at `site`, or of all. Where a schedule or weights come from calibration, so do they here."""
    budget, steps = (T, list(range(T))) if everything else (K, PLAN)
    if site == "stack":
        return case.method("dpcache", budget)
    if site == "residual":
        return teacache(T, T, threshold=0.0, polynomial=[0.0]) if everything else case.method("teacache")
    if site == "modules":
        return taylorseer(budget, T)
    if site == "tokens":
        return toca(budget, T, interval=1 if everything else 3, warmup=4, fresh_ratio=0.5)
    if site == "blocks":
        return profilingdit(budget, T, blocks=[1], interval=1 if everything else 3, warmup=3)
    if site == "output":
        gram = case.calibration([Gram("output")])[Gram("output")]
        return dpcache.Method(Schedule(steps, T), site, LeastSquares(gram, 2, sees_input=len(gram) == 2 * T))
    return dpcache.Method(EvenlySpaced(budget, T), site, Taylor(1))


def refusal(site: str, case: Case) -> str | None:
    """What a site says to a family that it does not take: one whose prediction has another shape than its input, whose
    feed-forwards have no norm of their own, or whose text comes after the image in its last blocks alone; and
    calibration to one that also denoises sound."""
    transformer, known = case.pipe.transformer, [block_of(block) for block in transformer_blocks(case.pipe.transformer)]
    channels, made = transformer.config.in_channels, transformer.config.get("out_channels")
    if site == "output_residual" and made in (2 * channels, channels // 3):  # a third: FLUX.1-Fill's
        return "has another shape than its prediction"
    if site == "tokens" and not all(block.feed_forwards for block in known):
        return "site=tokens does not know"
    if site == "residual" and known[-1].kind == "HiDreamImageSingleTransformerBlock":
        return "another stream than"
    if known[0].streams is not None and known[0].streams.both and site not in ("blocks", "modules"):
        return "takes features of one tensor|has another shape than its prediction"
    return None


def taken(site: str, case: Case) -> str:
    """The site, or one that every family takes."""
    return "modules" if refusal(site, case) else site


CORE = [name for name, family in FAMILIES.items() if not family.further]
FURTHER = [name for name, family in FAMILIES.items() if family.further]
# FLUX.1-Fill's pipeline encodes an image that several samples share with noise from the first one's generator: a batch
# is not the same as one by one.
IN_TURN = [(kind, site) for kind, site in zip(FAMILIES, cycle(SITES)) if kind != "flux_fill"]
REST = [cell for cell in product(CORE, SITES) if cell not in IN_TURN]
NEGATIVE = [name for name, family in FAMILIES.items() if len(family.branches) > 1 and "negative_prompt" in family.call]


@pytest.fixture
def family(kind) -> Case:
    return case(kind)


@pytest.mark.parametrize(("kind", "site"), [*IN_TURN, *(pytest.param(*rest, marks=pytest.mark.ci) for rest in REST)])
def test_a_site_caches_what_it_says_and_nothing_else_changes(family, site):
    pipe, branches, reference = family.pipe, family.family.branches, family.reference
    transformer, before = pipe.transformer, state_of(pipe.transformer)
    if message := refusal(site, family):
        with pytest.raises(dpcache.SettingError, match=message):
            family.run(at(site, family))
        assert state_of(transformer) == before and torch.equal(family.latents(), reference)
        return

    # Every step computed is the plain pipeline, to the bit.
    latents, report = family.run(at(site, family, everything=True))
    assert torch.equal(latents, reference)
    assert report.computed == {branch: list(range(T)) for branch in branches}

    method = at(site, family)
    assert state_of(transformer) == before
    with dpcache.cached(pipe, method):
        # The budget is spent in every branch, on the steps that are reported.
        with calls_of(transformer) as calls:
            first = family.latents()
        assert len(calls) == T * len(branches)
        computed = dpcache.report(pipe).computed
        assert computed == computed_steps(transformer, calls, branches, partial=site in PARTIAL)
        assert first.isfinite().all() and not torch.equal(first, reference)

        # Generations are alike, whatever comes between: other prompts and shapes, and one that broke off.
        alone = [family.latents(which=(0,)), break_off(family), family.latents(which=(1,))]
        assert torch.equal(family.latents(), first)
        assert dpcache.report(pipe).computed == computed
        counts = dpcache.report(pipe).computed_counts
    margin = 1 if site == "residual" else 0  # it spends its budget on average
    assert list(counts) == list(branches) and all(len(generations) == 5 for generations in counts.values())
    whole = [count for generations in counts.values() for count in (*generations[:2], *generations[3:])]
    assert all(abs(count - K) <= margin for count in whole)

    # It goes without a trace, and comes again.
    assert state_of(transformer) == before and torch.equal(family.latents(), reference)
    again, report = family.run(method)
    assert torch.equal(again, first) and report.computed == computed
    assert state_of(transformer) == before

    # A batch gives the same samples as one by one: no sample's features reach another's.
    if site == "residual":  # decides for a whole batch, so the steps have to be given
        fixed = dpcache.Method(Schedule(PLAN, T), site, Reuse())
        first, *alone = (family.run(fixed, which)[0] for which in ((0, 1), (0,), (1,)))
    padded = site == "tokens"  # of a text that the batch makes longer, more tokens are taken
    assert distance(first, torch.cat([alone[0], alone[-1]])) < (1e-2 if padded else 1e-4)
    assert distance(alone[0], alone[-1]) > 0.1


@pytest.mark.parametrize(("kind", "site"), [pair for pair in product(FURTHER, SITES) if pair not in IN_TURN])
def test_a_site_spends_its_budget_or_is_refused(family, site):
    pipe, branches, transformer = family.pipe, family.family.branches, family.pipe.transformer
    reference, before = family.reference, state_of(transformer)

    def method(steps):
        if site in PARTIAL:
            return at(site, family, everything=len(steps) == T)
        return dpcache.Method(Schedule(steps, T), site, Reuse())

    if message := refusal(site, family):
        with pytest.raises(dpcache.SettingError, match=message):
            family.run(method(PLAN))
    else:
        assert torch.equal(family.run(method(list(range(T))))[0], reference)
        with dpcache.cached(pipe, method(PLAN)), calls_of(transformer) as calls:
            latents = family.latents()
            computed = dpcache.report(pipe).computed
        assert computed == computed_steps(transformer, calls, branches, partial=site in PARTIAL)
        assert latents.isfinite().all() and not torch.equal(latents, reference)
    assert state_of(transformer) == before


def break_off(family: Case) -> None:
    """Interrupt a generation of two other prompts: between two branches of a step, where there are two."""
    calls = []

    def stop(module, args):
        calls.append(module)
        if len(calls) == 6:
            raise KeyboardInterrupt

    handle = family.pipe.transformer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        family.latents(which=(2, 3))
    handle.remove()


@pytest.mark.parametrize(
    ("kind", "site"),
    [pair for pair in [*IN_TURN, *REST] if pair[0] in NEGATIVE],
)
def test_histories_of_guidance_branches_never_mix(kind, site):
    """On given latents, where the other branch cannot reach a branch through the sampler: what it computes is what it
    computes without a cache, and what it predicts does not change with the other branch's prompt."""
    guided = case(kind)
    if "callback_on_step_end" not in inspect.signature(guided.pipe.__call__).parameters:
        pytest.skip("the pipeline does not let its latents be replaced")
    if refusal(site, guided):
        pytest.skip("refused")
    pipe, method, branches = guided.pipe, at(site, guided), guided.family.branches
    trajectory = []

    def remember(pipe, step, time, tensors):
        trajectory.append(tensors["latents"])
        return {}

    def give(pipe, step, time, tensors):
        return {"latents": trajectory[step]}

    def outputs(sample, callback, *negative):
        """Of the transformer in every step, branch by branch; and what `sample` returns."""
        kept = []
        handle = pipe.transformer.register_forward_hook(lambda module, args, output: kept.append(output[0].clone()))
        returned = sample(callback_on_step_end=callback, negative_prompt=list(negative))
        handle.remove()
        return {branch: torch.stack(kept[i::2]) for i, branch in enumerate(branches)}, returned

    def close(a, b):
        return distance(a, b) < 1e-5 if site == "tokens" else torch.equal(a, b)  # it has its own attention

    cached = functools.partial(guided.run, method)
    plain, _ = outputs(guided.latents, remember, "a night", "an old city")
    one, (_, report) = outputs(cached, give, "a night", "an old city")
    other, (_, again) = outputs(cached, give, "boats", "snow")
    for branch, steps in report.computed.items():
        assert close(one[branch][steps], plain[branch][steps])
        assert not torch.equal(one[branch], plain[branch])
    cond, uncond = branches
    assert torch.equal(other[cond], one[cond]) and again.computed[cond] == report.computed[cond]
    assert (other[uncond] != one[uncond]).flatten(1).any(1).all()


@pytest.mark.parametrize("index", range(len(METHODS)), ids=METHODS)
def test_a_method_spends_its_budget_gives_the_same_twice_and_leaves_no_trace(index, caplog):
    config = settings(METHODS[index])
    budget = config.get("budget", T)  # all steps are computed by a method that has none
    if METHODS[index].startswith("dbcache"):
        pytest.importorskip("cache_dit")
    families = [*FAMILIES][index % len(FAMILIES) :] + [*FAMILIES][: index % len(FAMILIES)]
    for family in map(case, families):
        reference, before = family.reference, snapshot(family.pipe.transformer)
        try:
            method = family.build(instantiate(config))
            (first, report), (second, _) = family.run(method), family.run(method)
        except ValueError as refusal:
            assert re.search(REFUSALS, str(refusal)) and "\n" not in str(refusal)
        else:
            break
        finally:
            assert snapshot(family.pipe.transformer) == before and torch.equal(family.latents(), reference)
    else:
        pytest.fail("refused by every family")
    assert first.isfinite().all() and torch.equal(first, second)
    everything = all(spent == [T] for spent in report.spent.values())  # where the budget is out of reach, as is said
    assert torch.equal(first, reference) == (budget == T or everything)
    assert list(report.spent) == list(family.family.branches)
    for branch, (spent,) in report.spent.items():
        whole = len(report.computed[branch])  # steps; `spent` has the parts of others, too
        assert report.computed[branch][0] == 0 and report.computed_counts[branch] == [whole]
        assert min(abs(spent - budget), abs(whole - budget)) <= 1 or "is out of reach" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_on_a_family_or_says_why_not(family, name):
    """The whole matrix, which takes half an hour; above, each method meets one family that takes it."""
    if name.startswith("dbcache"):
        pytest.importorskip("cache_dit")
    reference, before = family.reference, snapshot(family.pipe.transformer)
    try:
        latents, report = family.run(family.method(name))
    except dpcache.SettingError as refusal:
        assert re.search(REFUSALS, str(refusal)) and "\n" not in str(refusal)
    else:
        assert latents.isfinite().all() and latents.shape == reference.shape and report.computed
    finally:
        assert snapshot(family.pipe.transformer) == before


def test_a_scheduler_that_calls_the_model_twice_a_step_is_refused():
    pipe = FAMILIES["dit_ddim"].make()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"HeunDiscreteScheduler runs 15 steps \(num_inference_steps=8\)"):
        sample(pipe, uniform_skip(K, T), ["7"], [0])


@pytest.mark.ci
@pytest.mark.parametrize(("kind", "site"), zip(CORE, cycle(SITES)))
def test_model_offload_keeps_the_cache(kind, site):
    """diffusers' own offload, with the CPU for its accelerator: its hooks come off and on after every call, inside ours
    or around them."""
    family = case(kind)
    pipe, method, reference = family.pipe, at(taken(site, family), family), family.reference
    expected, report = family.run(method)
    pipe.enable_model_cpu_offload(device="cpu")
    with dpcache.cached(pipe, method):
        assert torch.equal(family.latents(), expected) and torch.equal(family.latents(), expected)
        assert dpcache.report(pipe).computed == report.computed
    assert torch.equal(family.latents(), reference)
    pipe.remove_all_hooks()
    with dpcache.cached(pipe, method):
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(family.latents(), expected) and torch.equal(family.latents(), expected)
        assert dpcache.report(pipe).computed == report.computed
    pipe.remove_all_hooks()
    assert torch.equal(family.latents(), reference)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("kind", "site"), zip((kind for kind in CORE if kind not in ("flux", "dit_ddpm", "ltx2")), cycle(INSIDE))
)  # one family a transformer; the blocks of LTX-2 take long to trace
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # of diffusers
def test_compiled_blocks_give_the_same(kind, site):
    family = case(kind)
    blocks = transformer_blocks(family.pipe.transformer)
    method, reference = at(taken(site, family), family), family.reference
    expected, report = family.run(method)
    torch.compiler.reset()
    for block in blocks:
        block.compile(backend="eager")
    with dpcache.cached(family.pipe, method):
        assert distance(family.latents(), expected) < 1e-5 and distance(family.latents(), expected) < 1e-5
        assert dpcache.report(family.pipe).computed == report.computed
    assert distance(family.latents(), reference) < 1e-5
    for block in blocks:
        block._compiled_call_impl = None


@pytest.mark.ci
@pytest.mark.parametrize("kind", [name for name, family in FAMILIES.items() if family.config])
def test_a_saved_pipeline_runs_in_the_precision_of_its_config(kind, tmp_path):
    family = case(kind)
    family.pipe.save_pretrained(tmp_path)
    config = OmegaConf.to_container(compose(f"model={family.family.config}").model)
    options = {name: config[name] for name in ("dtype", "vae_dtype", "vae_tiling", "scheduler") if name in config}
    pipe = load(str(tmp_path), device="cpu", **options)
    assert type(pipe) is type(family.pipe) and config["dtype"] == str(pipe.transformer.dtype).removeprefix("torch.")
    for name, value in vars(family.pipe).items():  # not among what is saved
        if isinstance(value, (str, int, dict)) and not name.startswith("_"):
            setattr(pipe, name, value)
    pipe.set_progress_bar_config(disable=True)
    method = taylorseer(K, T)
    low = sample(pipe, method, family.family.prompts[:2], (0, 1), **family.family.call)
    high = sample(family.pipe, method, family.family.prompts[:2], (0, 1), **family.family.call)
    assert distance(low.latents, high.latents) < (0.2 if kind == "mochi" else 0.05)  # it keeps latents in bfloat16
    assert low.images.shape == high.images.shape and low.images.dtype == "uint8"
    assert abs(low.images.astype(float) - high.images).mean() < 5


def test_tokens_are_not_selected_where_each_is_told_a_time_of_its_own():
    """Wan2.2's TI2V: the selected tokens would meet the modulation of all."""
    pipe, call = wan21_t2v(token_times=True), FAMILIES["wan21_t2v"].call
    with pytest.raises(dpcache.SettingError, match="tells the model the time of every token"):
        sample(pipe, toca(K, T, interval=3, warmup=4, fresh_ratio=0.5), ["two boats"], [0], decode=False, **call)


@pytest.fixture(scope="module")
def two_stages():
    return Case(replace(FAMILIES["wan21_t2v"], build=functools.partial(wan21_t2v, two=True)))


def test_two_transformers_take_a_method_each(two_stages):
    pipe, branches = two_stages.pipe, two_stages.family.branches
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
