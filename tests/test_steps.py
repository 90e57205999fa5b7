"""Which call is which step and branch: pipelines that do not name their branches, start from an image, copy their
scheduler, change in mid-run, or are used in ways that a cache cannot follow."""

import copy
import pickle
import re
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from diffusers.callbacks import SD3CFGCutoffCallback
from PIL import Image

import dpcache
from baselines.ertacache import ERTACache
from baselines.l2p import L2P
from baselines.library import LibraryCache
from baselines.teacache import fit_polynomial, teacache
from baselines.uniform_skip import uniform_skip
from dpcache._diffusers import copy_of_scheduler
from dpcache.lsq import FittedWeights, LeastSquaresPlan, fit_closed_loop
from dpcache.method import session_of
from dpcache.planned import dpcache as planned
from dpcache.predictors import LeastSquares, Reuse, Taylor
from dpcache.sampler import generate, sample
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.session import STOPWATCHES, Stopwatch
from dpcache.statistics import Gain, Gram, InputChange, OutputChange
from dpcache.steps import Loop
from helpers.commands import results, run
from helpers.families import FAMILIES, flux, wan21_t2v
from helpers.tracing import watched

T, STEPS = 10, [0, 3, 6]
SIZE = {"height": 16, "width": 16, "max_sequence_length": 12}
PROMPT = {"prompt": ["two boats"], **SIZE}
NEGATIVE = {"negative_prompt": ["an old clock at night"], "true_cfg_scale": 3.0}
IMAGE = Image.fromarray((np.random.RandomState(0).rand(16, 16, 3) * 255).astype("uint8"))
SITES = ("stack", "residual", "blocks", "modules", "output", "output_residual")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipe


def tiny_flux(kind=FluxPipeline, **more):
    torch.manual_seed(0)
    return quiet(kind(**{**flux().components, **more}))


@torch.no_grad()
def latents(pipe, steps=T, **call) -> torch.Tensor:
    return pipe(
        num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="latent", **call
    ).images.clone()


def method(steps=STEPS, T=T, site="stack", predictor=None):
    return dpcache.Method(Schedule(steps, T), site, predictor or Taylor(2))


def named_by_hand(transformer, run):
    """`run()` with every other call of the transformer in a cache context of its own."""
    calls, forward = [], transformer.forward

    def named(*args, **kwargs):
        calls.append(len(calls))
        with transformer.cache_context(("cond", "uncond")[calls[-1] % 2]):
            return forward(*args, **kwargs)

    transformer.forward = named
    try:
        return run()
    finally:
        transformer.forward = forward


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (FluxImg2ImgPipeline, {"image": IMAGE, "strength": 1.0}),
        (FluxKontextPipeline, {"image": IMAGE, "max_area": 256, "_auto_resize": False}),
    ],
)
def test_branches_that_the_pipeline_does_not_name_have_their_own_histories(kind, more, site):
    pipe, call = tiny_flux(kind), PROMPT | NEGATIVE | more
    with dpcache.cached(pipe, method(site=site)) as session:
        made = latents(pipe, **call)
    assert list(session.report().computed.values()) == [STEPS, STEPS]
    with dpcache.cached(pipe, method(site=site)):
        expected = named_by_hand(pipe.transformer, lambda: latents(pipe, **call))
    assert torch.equal(made, expected)


def test_calibration_keeps_unnamed_branches_apart():
    pipe, call = tiny_flux(FluxKontextPipeline), {"image": IMAGE, "max_area": 256, "_auto_resize": False, **SIZE}
    one, two = (
        dpcache.calibrate(pipe, ["two boats"], T, **call, **more)
        for more in ({}, {"negative_prompt": "an old clock at night", "true_cfg_scale": 3.0})
    )
    grams = [made[Gram("stack")] for made in (one, two)]
    changes = [np.diag(G)[1:] + np.diag(G)[:-1] - 2 * np.diag(G, 1) for G in grams]
    assert (changes[1] < 5 * changes[0]).all()  # between the branches it is far more
    np.testing.assert_allclose(two[InputChange()], one[InputChange()], rtol=0.5)


def test_steps_of_a_run_that_starts_from_an_image_are_those_that_are_run():
    pipe = tiny_flux(FluxImg2ImgPipeline)
    call = PROMPT | {"image": IMAGE, "strength": 0.6}
    refused = pytest.raises(ValueError, match=r"runs 6 steps \(num_inference_steps=10\), but the method was made for")
    with dpcache.cached(pipe, method()), refused:
        latents(pipe, **call)
    with dpcache.cached(pipe, method([0, 1, 4], 6)) as session:
        made = latents(pipe, **call)
        assert session.report().computed == {"default": [0, 1, 4]}
    with dpcache.cached(pipe.transformer, method([0, 1, 4], 6)) as session:  # told by the timestep alone
        assert torch.equal(latents(pipe, **call), made)
        assert session.report().computed == {"default": [0, 1, 4]}


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.55, 0.31])
def test_the_sampler_asks_for_as_many_steps_as_are_to_be_run(strength):
    pipe = tiny_flux(FluxImg2ImgPipeline)
    call = SIZE | {"image": IMAGE, "strength": strength}
    batch = sample(pipe, uniform_skip(3, 7), ["two boats"], [0], decode=False, **call)
    assert list(batch.report.computed.values()) == [uniform_skip(3, 7).schedule.steps]


@pytest.mark.parametrize("site", ["stack", "output"])
def test_calibration_of_a_run_that_starts_from_an_image_holds_no_undefined_memory(site, monkeypatch):
    pipe, empty, grams = tiny_flux(FluxImg2ImgPipeline), torch.empty, []
    for value in (1e4, float("nan")):

        def filled(*args, value=value, **kwargs):
            tensor = empty(*args, **kwargs)
            return tensor.fill_(value) if tensor.is_floating_point() else tensor

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", filled)
            calibration = dpcache.calibrate(pipe, ["two boats"], T, site=site, image=IMAGE, strength=0.6, **SIZE)
        grams.append(calibration[Gram(site)])
    np.testing.assert_array_equal(*grams)
    assert np.isfinite(grams[0]).all() and np.diag(grams[0]).max() < 100


def test_custom_sigmas_count_as_steps():
    pipe = tiny_flux()
    sigmas = np.linspace(1.0, 0.1, 6).tolist()
    with dpcache.cached(pipe, method([0, 1, 4], 6)) as session:
        latents(pipe, 28, **PROMPT, sigmas=sigmas)
        assert session.report().computed == {"cond": [0, 1, 4]}
    with dpcache.cached(pipe, method()), pytest.raises(ValueError, match="made for num_inference_steps=10"):
        latents(pipe, 10, **PROMPT, sigmas=sigmas)


def test_a_scheduler_that_is_replaced_is_followed():
    pipe = tiny_flux()
    expected = {}
    for shift in (1.0, 3.0):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        with dpcache.cached(pipe, method()):
            expected[shift] = latents(pipe, **PROMPT)
    with dpcache.cached(pipe, method()) as session:
        assert torch.equal(latents(pipe, **PROMPT), expected[3.0])
        old, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=1.0)
        assert torch.equal(latents(pipe, **PROMPT), expected[1.0])
        assert session.report().computed_counts == {"cond": [3, 3]}
        with pytest.raises(ValueError, match="num_inference_steps=6 in the pipeline call"):
            latents(pipe, 6, **PROMPT)
        assert not watched(old)
    assert not watched(pipe.scheduler)


def test_another_pipeline_with_the_same_transformer():
    pipe = tiny_flux()
    shared = quiet(FluxImg2ImgPipeline.from_pipe(pipe))  # the scheduler, too
    call = PROMPT | {"image": IMAGE, "strength": 1.0}
    with dpcache.cached(shared, method()):
        expected = latents(shared, **call)
    own = quiet(FluxPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}))
    with dpcache.cached(pipe, method()):
        first = latents(pipe, **PROMPT)
        assert torch.equal(latents(shared, **call), expected)
        with pytest.raises(ValueError, match="enable the method on the pipeline that is run"):
            latents(own, **PROMPT)
        assert torch.equal(latents(pipe, **PROMPT), first)


def test_guidance_that_changes_in_mid_run_is_refused():
    pipe = FAMILIES["sd3"].make()
    call = PROMPT | {"negative_prompt": ["an old clock at night"], "guidance_scale": 5.0}
    cutoff = call | {"callback_on_step_end": SD3CFGCutoffCallback(cutoff_step_ratio=0.5)}
    layers = call | {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    for site in ("stack", "residual", "modules", "output"):
        for steps in ([0, 2, 4, 8], list(range(T))):
            with dpcache.cached(pipe, method(steps, site=site)):
                with pytest.raises(ValueError, match=r"changes from \(2, 4, 8, 8\) float32 to \(1, 4, 8, 8\) float32"):
                    latents(pipe, **cutoff)
                with pytest.raises(
                    ValueError, match=r"2 times and the first step 1|does not pass|first appears at step 1"
                ):
                    latents(pipe, **layers)


def test_one_method_on_two_models():
    pipes, one = [tiny_flux(), FAMILIES["sd3"].make()], method()
    calls = [PROMPT, PROMPT | {"guidance_scale": 1.0}]
    plain = [latents(pipe, **call) for pipe, call in zip(pipes, calls)]
    expected = []
    for pipe, call in zip(pipes, calls):
        with dpcache.cached(pipe, method()):
            expected.append(latents(pipe, **call))
    for pipe in pipes:
        dpcache.enable(pipe, one)
    assert all(torch.equal(latents(pipe, **call), made) for pipe, call, made in zip(pipes, calls, expected))
    dpcache.disable(pipes[0])
    assert torch.equal(latents(pipes[0], **calls[0]), plain[0])
    assert torch.equal(latents(pipes[1], **calls[1]), expected[1])
    dpcache.disable(pipes[1])
    assert torch.equal(latents(pipes[1], **calls[1]), plain[1])


def test_copies_and_pickles_of_a_hooked_model_are_refused():
    pipe = tiny_flux()
    with dpcache.cached(pipe, method()):
        for make in (copy.deepcopy, pickle.dumps):
            for what in (pipe.transformer, pipe.transformer.transformer_blocks[0]):
                with pytest.raises(ValueError, match="a caching method is enabled on it"):
                    make(what)
        with pytest.raises(pickle.PicklingError, match="watched until dpcache"):
            pickle.dumps(pipe.scheduler)
    copied = copy.deepcopy(pipe.transformer)
    torch.nn.init.zeros_(copied.proj_out.weight)
    assert not torch.equal(latents(tiny_flux(transformer=copied), **PROMPT), latents(pipe, **PROMPT))


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, copy_of_scheduler])
def test_a_copy_of_a_scheduler_takes_its_own_steps_before_and_after_the_method_is_gone(make):
    def stepped(scheduler):
        scheduler.set_timesteps(4)
        return scheduler.step(torch.ones(1, 2), scheduler.timesteps[0], torch.zeros(1, 2))[0], scheduler.step_index

    pipe = tiny_flux(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    expected, at = stepped(copy.deepcopy(pipe.scheduler))
    with dpcache.cached(pipe, method()):
        made, twin = latents(pipe, **PROMPT), make(pipe.scheduler)
        for _ in range(2):
            assert torch.equal(stepped(twin)[0], expected) and twin.step_index == at
        assert pipe.scheduler.step_index == T
    assert not watched(pipe.scheduler)
    assert torch.equal(stepped(twin)[0], expected) and twin.step_index == at
    pipe.scheduler = twin  # which is then watched as any other
    assert torch.equal(sample(pipe, method(), PROMPT["prompt"], [0], decode=False, **SIZE).latents, made)


def test_a_controlnet_adds_to_what_lies_between_the_blocks():
    torch.manual_seed(1)
    net = FluxControlNetModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=[4, 6, 6],
    )
    for layer in (*net.controlnet_blocks, *net.controlnet_single_blocks):
        torch.nn.init.normal_(layer.weight, std=0.2)
    pipe = tiny_flux(FluxControlNetPipeline, controlnet=net)
    call = PROMPT | {"control_image": IMAGE}
    full = latents(pipe, **call)
    for site in SITES:
        with dpcache.cached(pipe, method(list(range(T)), site=site)):
            assert torch.equal(latents(pipe, **call), full)
        with dpcache.cached(pipe, method(site=site)):
            assert 0 < (latents(pipe, **call) - full).norm() < full.norm()


ADDED = ("controlnet_block_samples", "controlnet_single_block_samples")


def flux_inputs(time: float = 1.0) -> dict[str, torch.Tensor]:
    """Of one call of FLUX's transformer, the same for the same time."""
    random, config = torch.Generator().manual_seed(0), flux().transformer.config
    sizes = {
        "hidden_states": (1, 4, 16),
        "encoder_hidden_states": (1, 3, config.joint_attention_dim),
        "pooled_projections": (1, config.pooled_projection_dim),
    }
    inputs = {name: torch.randn(size, generator=random) for name, size in sizes.items()}
    times = dict.fromkeys(("timestep", "guidance"), torch.full((1,), time))
    return inputs | times | {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}


@pytest.mark.parametrize("site", SITES)
def test_what_a_controlnet_adds_counts_once_on_a_skipped_step(site):
    """The same inputs at two steps: a reused step has to be the computed one."""
    model, inputs = flux().transformer, flux_inputs()
    added = {name: [torch.randn(1, 4, model.inner_dim)] for name in ADDED}
    loop = Loop(model, 2)
    with torch.no_grad(), dpcache.cached(loop, method([0], 2, site, Reuse())):
        computed = model(**inputs, **added).sample.clone()
        loop.step()
        reused = model(**inputs, **added).sample
    assert (reused - computed).norm() < 1e-5 * computed.norm()


def test_a_named_branch_that_comes_again_without_a_pipeline_is_a_run_that_broke_off():
    model = flux().transformer

    def call(time):
        with torch.no_grad(), model.cache_context("cond"):
            model(**flux_inputs(time))

    with dpcache.cached(model, method([0, 2], 3, "output", Reuse())) as session:
        call(0.9)
        with pytest.raises(dpcache.SettingError, match="'cond' is called twice at one value of timestep"):
            call(0.9)
        [call(time) for time in (0.9, 0.5, 0.1)]
        assert session.report().computed["cond"] == [0, 2]


def test_what_is_kept_in_inference_mode_is_used_outside_of_it():
    pipe = tiny_flux()
    expected = latents(pipe, **PROMPT)
    with dpcache.cached(pipe, method(list(range(T)))):
        with torch.inference_mode():
            latents(pipe, **PROMPT)
        assert torch.equal(latents(pipe, **PROMPT), expected)


@pytest.mark.parametrize("longer", [{"max_sequence_length": 8}, {}])
def test_all_steps_count_as_such_whatever_the_text_and_the_layers(longer):
    pipe = tiny_flux()
    for turn in range(3):
        with dpcache.cached(pipe, method(list(range(T)), site="blocks")) as session:
            latents(pipe, **(PROMPT | (longer if turn == 1 else {})))
        assert session.report().equivalents == {"cond": [pytest.approx(T)]}
        if turn == 0 and not longer:
            pipe.transformer.fuse_qkv_projections()
        elif turn == 1 and not longer:
            pipe.transformer.unfuse_qkv_projections()


def test_a_branch_that_has_no_part_in_a_generation_has_computed_nothing_there():
    pipe = tiny_flux()
    with dpcache.cached(pipe, method()) as session:
        latents(pipe, **PROMPT)
        latents(pipe, **PROMPT, **NEGATIVE)
        latents(pipe, **PROMPT)
        report = session.report()
    kept, other = report.computed
    assert report.computed_counts[kept] == [len(STEPS)] * 3 and report.computed_counts[other] == [0, len(STEPS), 0]
    assert report.computed == {kept: STEPS, other: []}


def test_layers_that_are_replaced_while_enabled_are_hooked_again():
    """As a LoRA does: another module takes the place of a layer and calls it."""

    class Adapted(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer, self.added = layer, torch.nn.Linear(layer.in_features, layer.out_features)

        def forward(self, x):
            return self.base_layer(x) + self.added(x)

    def adapt(pipe):
        torch.manual_seed(3)
        pipe.transformer.x_embedder = Adapted(pipe.transformer.x_embedder)
        for block in pipe.transformer.single_transformer_blocks:
            block.proj_out, block.proj_mlp = Adapted(block.proj_out), Adapted(block.proj_mlp)

    for site in SITES:
        first, later = tiny_flux(), tiny_flux()
        adapt(first)
        with dpcache.cached(first, method(site=site)):
            expected = latents(first, **PROMPT)
        with dpcache.cached(later, method(site=site)):
            latents(later, **PROMPT)
            adapt(later)
            assert torch.equal(latents(later, **PROMPT), expected)
        assert torch.equal(latents(later, **PROMPT), latents(first, **PROMPT))


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("offload_first", [True, False])
def test_offloading_in_groups_stays_known_to_diffusers(kind, offload_first):
    pipe, cpu = tiny_flux(), torch.device("cpu")
    full = latents(pipe, **PROMPT)
    with dpcache.cached(pipe, method()):
        expected = latents(pipe, **PROMPT)

    def offload(pipe):
        size = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **size)
        return pipe

    def known(pipe) -> list[str]:
        registries = [(n, vars(m).get("_diffusers_hook")) for n, m in pipe.transformer.named_modules()]
        return [n for n, registry in registries if registry is not None and "group_offloading" in registry.hooks]

    if offload_first:
        offload(pipe)
    with dpcache.cached(pipe, method()):
        if not offload_first:
            offload(pipe)
        assert torch.equal(latents(pipe, **PROMPT), expected)
    assert known(pipe) == known(offload(tiny_flux())) and known(pipe)
    assert torch.equal(latents(pipe, **PROMPT), full)


def test_a_cache_of_diffusers_beside_ours_is_refused_and_outlives_it():
    pipe, alone, config = tiny_flux(), tiny_flux(), FirstBlockCacheConfig(threshold=10.0)
    full = latents(pipe, **PROMPT)
    alone.transformer.enable_cache(config)
    expected = latents(alone, **PROMPT)
    with pytest.raises(ValueError, match=r"diffusers' own cache \(FirstBlockCacheConfig\) is enabled"):
        dpcache.enable(alone, method())
    with dpcache.cached(pipe, method()):
        pipe.transformer.enable_cache(config)
        with pytest.raises(ValueError, match="a model takes one cache at a time"):
            latents(pipe, **PROMPT)
    assert torch.equal(latents(pipe, **PROMPT), expected) and not torch.equal(expected, full)
    pipe.transformer.disable_cache()
    assert torch.equal(latents(pipe, **PROMPT), full)


def test_a_transformer_that_is_replaced_while_enabled_is_named_and_can_be_disabled():
    pipe, other = tiny_flux(), tiny_flux()
    old, pipe.transformer = pipe.transformer, pipe.transformer
    dpcache.enable(pipe, method())
    pipe.transformer = other.transformer
    with pytest.raises(ValueError, match=r"pipe.transformer has been replaced"):
        latents(pipe, **PROMPT)
    dpcache.disable(pipe)
    assert not hasattr(old, "_diffusers_hook") and "forward" not in vars(old)


def test_one_pipeline_in_two_threads_is_refused_and_one_after_the_other_is_not():
    pipe = tiny_flux()
    with dpcache.cached(pipe, method()):
        expected, results = latents(pipe, **PROMPT), []

        def alone():
            results.append(latents(pipe, **PROMPT))

        thread = threading.Thread(target=alone)
        thread.start()
        thread.join()
        assert torch.equal(results[0], expected)

        def between(pipe, step, time, tensors):  # another thread's call while this one is in mid-run
            if step == 4:
                thread = threading.Thread(target=call_once)
                thread.start()
                thread.join()
            return {}

        errors = []

        def call_once():
            try:
                pipe.transformer(*seen[0], **seen[1])
            except ValueError as error:
                errors.append(str(error))

        seen = []
        handle = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: None if seen else seen.extend([args, kwargs]), with_kwargs=True
        )
        latents(pipe, **PROMPT, callback_on_step_end=between)
        handle.remove()
        assert len(errors) == 1 and "two threads" in errors[0]


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_without_graph_breaks_is_refused_with_the_reason():
    pipe = tiny_flux()
    plain = pipe.transformer
    torch.compiler.reset()
    with dpcache.cached(pipe, method()):
        expected = latents(pipe, **PROMPT)
        pipe.transformer = torch.compile(plain, backend="eager")
        assert torch.equal(latents(pipe, **PROMPT), expected)
        torch.compiler.reset()
        pipe.transformer = torch.compile(plain, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="compile without fullgraph=True"):
            latents(pipe, **PROMPT)
    torch.compiler.reset()


def test_an_interrupted_run_is_no_mistake_and_leaves_no_trace():
    pipe = tiny_flux()

    def stop(pipe, step, time, tensors):
        pipe._interrupt = step == 4
        return {}

    with dpcache.cached(pipe, method()) as session:
        expected = latents(pipe, **PROMPT)
        latents(pipe, **PROMPT, callback_on_step_end=stop)
        assert torch.equal(latents(pipe, **PROMPT), expected)
        assert session.report().computed_counts == {"cond": [3, 2, 3]}


VIDEO = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 12, "guidance_scale": 5.0}
VIDEO |= {"negative_prompt": "a night"}


class Video:
    """Wan2.2: two transformers, the first for the noisier steps."""

    def __init__(self):
        torch.manual_seed(0)
        self.pipe = quiet(wan21_t2v(two=True))

    def latents(self, steps=T):
        return generate(self.pipe, ["two boats"], [0], steps, decode=False, **VIDEO).latents

    def ran(self, run) -> list[list[bool]]:
        """For both transformers, which calls ran their last block's feed-forward."""
        calls, handles = [[], []], []
        for index, model in enumerate((self.pipe.transformer, self.pipe.transformer_2)):

            def begin(module, args, kwargs, index=index):
                calls[index].append(False)

            def inside(module, args, output, index=index):
                calls[index][-1] = True

            handles.append(model.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(model.blocks[-1].ffn.net[0].proj.register_forward_hook(inside))
        self.result = run()
        for handle in handles:
            handle.remove()
        return calls


@pytest.fixture(scope="module")
def video():
    return Video()


@pytest.mark.parametrize("site", ["stack", "residual", "modules", "output"])
def test_two_transformers_share_a_method_and_the_second_begins_with_a_computed_step(video, site):
    plain = video.ran(video.latents)
    first = len(plain[0]) // 2  # steps of the first transformer, with two branches each
    reference = video.result
    assert 1 < first < T - 1
    with dpcache.cached(video.pipe, method(list(range(T)), site=site)):
        assert torch.equal(video.latents(), reference)
    schedule = [0, first - 1, T - 1]
    with dpcache.cached(video.pipe, method(schedule, site=site)) as session:
        calls = video.ran(video.latents)
        made = video.result
        assert torch.equal(video.latents(), made)
    expected = [0, first - 1, first]  # in place of the next one that was planned
    ran = [any(pair) for part in calls for pair in zip(part[::2], part[1::2])]
    assert [step for step, computed in enumerate(ran) if computed] == expected
    assert session.report().computed == {"cond": expected, "uncond": expected}
    assert session.report().switches == [first] and not torch.equal(made, reference)
    refused = pytest.raises(ValueError, match=f"step {first} is the first of the .*second model .* raise the budget")
    with dpcache.cached(video.pipe, method([0, 1], site=site)), refused:
        video.latents()


def test_two_transformers_take_online_and_planned_methods(video):
    calibration = dpcache.calibrate(video.pipe, ["two boats"], T, **VIDEO)
    (first,) = calibration.switches
    plan = planned(5, T, warmup=2).build(video.pipe, calibration)
    assert first in plan.schedule.steps and len(plan.schedule.steps) == 5
    online = teacache(5, T, threshold=1e9, polynomial=[1.0, 0.0])
    for which, steps in ((plan, plan.schedule.steps), (online, [0, first, T - 1])):
        batch = sample(video.pipe, which, ["two boats"], [0], decode=False, **VIDEO)
        assert batch.report.computed == {"cond": steps, "uncond": steps}


def forget_before(model, session) -> None:
    """Before the model's next call, all that was kept becomes not a number."""

    def forget(*_):
        handle.remove()
        for branch in session.branches.values():
            for history in (history for histories in branch.histories.values() for history in histories):
                for buffer in filter(torch.is_tensor, history.buffers):
                    buffer.fill_(torch.nan)

    handle = model.register_forward_pre_hook(forget)


def test_weights_reach_back_to_the_first_step_of_the_second_transformer_alone(video):
    """Whatever was fitted on both: where the second one begins, all that the first has left is made not a number."""
    calibration = dpcache.calibrate(video.pipe, ["two boats", "an old city"], T, (Gram("output"),), **VIDEO)
    (first,) = calibration.switches
    assert 1 < first < T - 2
    even = LeastSquaresPlan(4, T, "output", ("lsq3",), ("even",), (3,))
    plan = Schedule([0, 1, first, T - 2], T)
    gram_of = LeastSquares(calibration[Gram("output")][:T, :T])
    _, fitted = fit_closed_loop(video.pipe, calibration, dpcache.Method(plan, "output", gram_of), 1)
    calibration.measure(video.pipe, even.statistics)
    assert first not in EvenlySpaced(4, T, 3).steps and first in even.build(video.pipe, calibration).schedule.steps
    recipes = L2P(5, T), ERTACache(1 + len(calibration.switches), T)
    for recipe in recipes:
        calibration.measure(video.pipe, recipe.statistics)
    made = [recipe.build(video.pipe, calibration) for recipe in recipes]
    for which in (dpcache.Method(plan, "output", fitted), *made):
        with dpcache.cached(video.pipe, which) as session:
            expected = video.latents()
            forget_before(video.pipe.transformer_2, session)
            assert torch.equal(video.latents(), expected) and session.report().switches == [first]

    with pytest.raises(dpcache.SettingError, match="has no weights: they were fitted for other computed steps"):
        fitted.weights([0, 1], T - 2)
    other = FittedWeights(3, {step: (0.5, 0.2, 0.3) for step in range(T)})  # as of a plan without the switch
    refused = pytest.raises(dpcache.SettingError, match="weighs 3 computed steps where 1 are kept")
    with dpcache.cached(video.pipe, dpcache.Method(Schedule([0, 1, 2, *range(3, T, 2)], T), "output", other)), refused:
        video.latents()


def test_a_step_at_which_another_transformer_takes_over_tells_nothing_of_the_others(video):
    """It cannot be skipped, and the change of the output from the one model to the other is not that of a step."""
    changes, gain = (InputChange(), OutputChange()), Gain("stack", points=T, prompts=1)
    calibration = dpcache.calibrate(video.pipe, ["two boats"], T, (*changes, gain), **VIDEO)
    (first,) = calibration.switches
    around = calibration[gain][first - 1 : first + 2]
    assert around[1] == pytest.approx((around[0] * around[2]) ** 0.5)  # half-way on a logarithmic scale
    others = [np.delete(calibration[change], first, 1) for change in changes]
    method = teacache(5, T, threshold=0.1).build(video.pipe, calibration)
    np.testing.assert_allclose(method.schedule.polynomial, fit_polynomial(*others))


def test_a_wrong_split_of_steps_over_two_transformers_is_refused(video):
    first = len(video.ran(video.latents)[0]) // 2
    parts = video.pipe.transformer, video.pipe.transformer_2

    def run(high, low):
        with dpcache.cached(parts[0], uniform_skip(2, high)), dpcache.cached(parts[1], uniform_skip(2, low)):
            return video.latents()

    assert torch.equal(run(first, T - first), run(first, T - first))
    for high, low in ((first - 1, T - first + 1), (first + 1, T - first - 1), (T, T)):
        with pytest.raises(ValueError, match="steps"):
            run(high, low)


def test_a_loop_of_ones_own(video):
    model = FAMILIES["dit_ddim"].make().transformer
    x, more = torch.randn(1, 4, 8, 8), {"timestep": torch.tensor([7]), "class_labels": torch.tensor([3])}
    loop = Loop(model, 4)
    with torch.no_grad(), dpcache.cached(loop, method([0, 2], 4, "output", Reuse())) as session:
        for _ in range(2):
            outputs = []
            for step in range(4):
                outputs.append(model(x * (1 + step), **more).sample)
                loop.step()
            assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
            assert not torch.equal(outputs[1], outputs[2])
        assert session.report().computed_counts == {"default": [2, 2]}


def test_calls_are_timed_by_the_clock_of_the_device_that_they_run_on(monkeypatch):
    class Clock(Stopwatch):
        def seconds(self, spans):
            return 100.0 * len(spans)

    monkeypatch.setitem(STOPWATCHES, "meta", Clock())
    model = FAMILIES["dit_ddim"].make().transformer
    loop = Loop(model, 2)
    with torch.no_grad(), dpcache.cached(loop, method([0], 2, "output", Reuse())) as session:
        for device in ("cpu", "meta"):  # moved while the method is enabled
            model.to(device)
            for _ in range(2):
                one = torch.ones(1, dtype=torch.long, device=device)
                model(torch.zeros(1, 4, 8, 8, device=device), timestep=one, class_labels=one)
                loop.step()
        report = session.report()
    assert 100 < report.seconds_computed["default"] < 200 and 100 < report.seconds_predicted["default"] < 200


def test_a_model_without_a_pipeline_is_followed_by_its_timestep():
    model = FAMILIES["dit_ddim"].make().transformer
    x = torch.randn(2, 4, 8, 8)

    def call(time):
        with torch.no_grad():
            return model(x, timestep=torch.tensor([time]), class_labels=torch.tensor([3, 4])).sample

    with dpcache.cached(model, method([0, 2], 3, "output", Reuse())) as session:
        for _ in range(2):  # two generations, with two branches each
            first = [call(900), call(900)]
            assert all(torch.equal(call(500), made) for made in first)
            call(100), call(100)
        call(900), call(700)  # broken off
        call(950), call(900), call(800)
        assert session.report().computed_counts == {"default": [2, 2, 1, 2], "default #2": [2, 2, 0, 0]}
        with pytest.raises(ValueError, match="called at more steps than the num_inference_steps=3"):
            call(100)


@pytest.mark.parametrize(
    ("times", "steps", "told"),
    [
        ([900, 500, 100], 3, None),
        ([900, 900, 500, 500, 100, 100], 3, None),  # two branches
        ([900, 900, 500, 500], 4, "run at 2 values of timestep, but the method was made for num_inference_steps=4"),
        ([900, 900, 500, 500, 100], 3, "step 2 calls the model .* 1 times and the first step 2 times"),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_a_run_without_a_pipeline_whose_end_is_not_that_of_its_method_is_told(times, steps, told, again, caplog):
    model = FAMILIES["dit_ddim"].make().transformer

    def run():
        for time in times:
            model(torch.randn(1, 4, 8, 8), timestep=torch.tensor([time]), class_labels=torch.tensor([3]))

    refusal = ""
    with torch.no_grad(), dpcache.cached(model, method([0, 1], steps, "output", Reuse())):
        run()
        if again:
            try:
                run()
            except dpcache.SettingError as error:
                refusal = str(error)
    said = refusal + caplog.text
    assert re.search(told, said) if told else not said


def test_every_step_has_to_be_there():
    pipe = tiny_flux()
    refused = pytest.raises(ValueError, match="num_inference_steps=10 in the pipeline call")
    with dpcache.cached(pipe, dpcache.Method(EvenlySpaced(3, 20), "stack", Reuse())), refused:
        latents(pipe, **PROMPT)


@pytest.mark.ci
def test_two_transformers_from_the_command_line(video, tmp_path):
    video.pipe.save_pretrained(tmp_path / "model")
    size = [f"+model.call.{name}={value}" for name, value in VIDEO.items() if name not in ("height", "width")]
    size = [item.replace("+model.call.num_frames", "model.call.num_frames") for item in size if "guidance" not in item]
    common = [f"num_inference_steps={T}", "num_prompts=1", "calibration.num_prompts=1", "eval.timing.repeats=0"]
    common += [f"model.path={tmp_path / 'model'}", "model=wan22_t2v", "model.dtype=float32", "eval.metrics=[psnr]"]
    common += ["model.call.height=32", "model.call.width=32", *size]
    for name in ("dpcache", "teacache"):
        code, out, err = run(*common, f"method={name}", "budget=5", folder=tmp_path)
        assert code == 0, err
    made = results(tmp_path)
    assert sorted(result["method"] for result in made) == ["dpcache", "teacache"]
    assert {len(result["schedules"][0]) for result in made if result["method"] == "dpcache"} == {5}
    code, out, err = run(*common, "method=fora", "budget=4", "+dry_run=true", folder=tmp_path)
    assert code == 0 and "2 WanTransformer3DModel" in out


def test_a_model_whose_steps_nothing_tells_is_refused_without_a_trace():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="has no timestep argument that tells its steps"):
        dpcache.enable(model, method(site="output"))
    assert not hasattr(model, "_diffusers_hook") and "forward" not in vars(model)


@dataclass(frozen=True, eq=False)
class Told(LibraryCache):
    """A library's cache that computes everything, and writes down where it is told that the sampler is."""

    told: list = field(default_factory=list)

    def start(self, pipe, transformer):
        forward = transformer.forward

        def watched(*args, **kwargs):
            self.told.append((session_of(pipe).timestep, 1000 * kwargs["timestep"].item()))
            return forward(*args, **kwargs)

        transformer.forward = watched

    def stop(self, pipe, transformer):
        pass


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_libraries_are_told_the_timesteps_that_are_run(strength):
    pipe = tiny_flux(FluxImg2ImgPipeline)
    library = Told(6)
    sample(pipe, library, ["two boats"], [0], decode=False, image=IMAGE, strength=strength, **SIZE)
    told, real = zip(*library.told)
    assert len(told) == 6
    np.testing.assert_allclose(told, real, rtol=1e-5)
