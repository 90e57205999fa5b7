"""The step cache on real diffusers transformers and on the embedded pipeline."""

import re
from operator import attrgetter

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch._dynamo.utils import counters

import dpcache
from baselines.fewer_steps import fewer_steps
from baselines.fora import fora
from baselines.full import full
from baselines.taylorseer import taylorseer
from baselines.teacache import teacache
from baselines.uniform_skip import uniform_skip
from dpcache._diffusers import foreign_forward
from dpcache.errors import SettingError
from dpcache.models.family import Family, family_of
from dpcache.predictors import Reuse, Taylor
from dpcache.sampler import generate, sample
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.sites import SITES, transformer_blocks
from helpers.embedded import CALL
from helpers.rollout import STEPS, Rollout
from helpers.tracing import count_calls, state_of


@pytest.mark.parametrize("site", SITES)
def test_disable_restores_the_module_exactly(any_rollout, site):
    model = any_rollout.model
    before, forward, expected = state_of(model), model.forward, any_rollout()
    with dpcache.cached(model, dpcache.Method(Schedule(STEPS, 10), site, Taylor(2))):
        assert not torch.equal(any_rollout(), expected)
    assert state_of(model) == before and model.forward == forward
    assert torch.equal(any_rollout(), expected)


@pytest.mark.parametrize("site", SITES)
def test_all_steps_computed_is_the_plain_model_to_the_bit(any_rollout, site):
    expected = any_rollout()
    with dpcache.cached(any_rollout.model, dpcache.Method(EvenlySpaced(10, 10), site, Taylor(2))):
        assert torch.equal(any_rollout(), expected)


@pytest.mark.parametrize("site", SITES)
def test_computed_steps_are_those_of_the_schedule_and_generations_are_alike(any_rollout, site):
    method = dpcache.Method(Schedule(STEPS, 10), site, Taylor(2))
    with dpcache.cached(any_rollout.model, method):
        first = any_rollout()
        assert torch.equal(any_rollout(), first)
        report = dpcache.report(any_rollout.model)
    assert report.computed == {"default": STEPS}
    assert report.computed_counts == {"default": [5, 5]} and report.predicted_counts == {"default": [5, 5]}
    assert report.seconds_computed["default"] > 0 and report.seconds_predicted["default"] > 0


@pytest.mark.parametrize("site", ["stack", "residual", "modules"])
def test_skipped_steps_do_no_work_inside_the_blocks(rollout, site):
    # Linear layers of the attention and the feed-forward branches: run on computed steps alone.
    inner = [block.attn.norm_q for block in transformer_blocks(rollout.model)]
    with dpcache.cached(rollout.model, dpcache.Method(Schedule(STEPS, 10), site, Taylor(2))):
        assert count_calls(inner, rollout) == [len(STEPS)] * len(inner)


def test_embedders_of_skipped_blocks_are_left_out_and_nothing_else_changes(any_rollout, monkeypatch):
    model, method, calls = any_rollout.model, dpcache.Method(Schedule(STEPS, 10), "stack", Taylor(2)), []
    embedders = list(filter(None, (attrgetter(name)(model) for name in family_of(model).embedders)))
    with monkeypatch.context() as patch:
        patch.setattr("dpcache.sites.family_of", lambda transformer: Family(type(transformer).__name__))
        with dpcache.cached(model, method):
            expected = any_rollout()

    def counting(embedder, forward):
        def counted(*args):
            calls.append(embedder)
            return forward(*args)

        return counted

    for embedder in embedders:
        monkeypatch.setattr(embedder, "forward", counting(embedder, embedder.forward))
    with dpcache.cached(model, method):
        assert torch.equal(any_rollout(), expected)
    assert [calls.count(embedder) for embedder in embedders] == [len(STEPS)] * len(embedders)


def test_output_site_never_enters_the_model(rollout):
    with dpcache.cached(rollout.model, uniform_skip(4, 10)):
        assert count_calls([rollout.model.x_embedder], rollout) == [4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("site", SITES)
def test_predictions_in_half_precision_are_close_to_float32(site, dtype):
    low, high = Rollout("flux", dtype=dtype), Rollout("flux")
    method = dpcache.Method(Schedule(STEPS, 10), site, Taylor(2))
    with dpcache.cached(low.model, method):
        out = low()
    with dpcache.cached(high.model, method):
        expected = high()
    assert out.dtype == dtype and (out.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.ci
@pytest.mark.parametrize(("site", "compile_first"), [("stack", False), ("residual", True), ("modules", True)])
def test_compiled_blocks_give_the_same_images(rollout, site, compile_first):
    method = dpcache.Method(Schedule(STEPS, 10), site, Taylor(2))
    with dpcache.cached(rollout.model, method):
        expected = rollout()
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    def compile_blocks():
        for block in transformer_blocks(rollout.model):
            block.compile(backend=backend)

    if compile_first:
        compile_blocks()
    with dpcache.cached(rollout.model, method):
        if not compile_first:
            compile_blocks()
        assert torch.allclose(rollout(), expected, atol=1e-5)
        asked = counters["frames"]["total"]
        assert torch.allclose(rollout(), expected, atol=1e-5)
        assert counters["frames"]["total"] == asked  # of the compiler, which is not asked once it has done its work
        assert dpcache.report(rollout.model).computed_counts == {"default": [5, 5]}
    # The model is compiled, the cache is not: its copies and weighted sums would be, anew for every step's weights.
    assert any("scaled_dot_product_attention" in code for code in graphs)
    assert not any("copy_" in code or "alpha" in code for code in graphs)


def test_the_history_is_allocated_once(rollout):
    method = dpcache.Method(Schedule(STEPS, 10), "stack", Taylor(2))
    with dpcache.cached(rollout.model, method) as session:
        rollout()
        (history,) = session.branches["default"].histories["stack"]
        addresses = [buffer.data_ptr() for buffer in history.buffers]
        rollout()
        assert [buffer.data_ptr() for buffer in history.buffers] == addresses and len(addresses) == 3


def test_guidance_branches_have_histories_of_their_own(rollout, pipe):
    method = dpcache.Method(Schedule(STEPS, 10), "stack", Taylor(2))
    with dpcache.cached(rollout.model, method):
        alone = rollout.branches(["cond"]) | rollout.branches(["uncond"])
        together = rollout.branches(["cond", "uncond"])
    assert not torch.equal(alone["cond"], alone["uncond"])
    assert all(torch.equal(together[name], alone[name]) for name in alone)

    with dpcache.cached(pipe, method):
        generate(pipe, ["dog"], [0], 10, decode=False, negative_prompt=[""], true_cfg_scale=3.0, **CALL)
        assert dpcache.report(pipe).computed == {"cond": STEPS, "uncond": STEPS}


def test_a_generation_that_broke_off_leaves_no_trace(pipe):
    method = taylorseer(5, 10)

    def stop(pipe, step, timestep, tensors):
        if step == 4:
            raise KeyboardInterrupt
        return {}

    with dpcache.cached(pipe, method):
        expected = generate(pipe, ["dog"], [0], 10, decode=False, **CALL).latents
        with pytest.raises(KeyboardInterrupt):
            pipe(prompt="cat", num_inference_steps=10, callback_on_step_end=stop, **CALL)
        assert torch.equal(generate(pipe, ["dog"], [0], 10, decode=False, **CALL).latents, expected)
        assert dpcache.report(pipe).computed["cond"] == method.schedule.steps


def test_noise_depends_on_the_seed_alone_and_batches_agree(pipe):
    together = sample(pipe, fora(4, 10), ["dog", "red apple"], [3, 4], decode=False, **CALL).latents
    alone = sample(pipe, fora(4, 10), ["red apple"], [4], decode=False, **CALL).latents
    assert torch.allclose(together[1:], alone, atol=1e-4)


def test_offloading_does_not_lose_the_cache(pipe):
    """diffusers' model offload takes its hook off and on again after every call; here by hand, on the CPU."""
    hook, method = ModelHook(), taylorseer(5, 10)
    expected = sample(pipe, method, ["dog"], [0], decode=False, **CALL).latents
    add_hook_to_module(pipe.transformer, hook)
    with dpcache.cached(pipe, method):
        for _ in range(2):
            assert torch.equal(generate(pipe, ["dog"], [0], 10, decode=False, **CALL).latents, expected)
            remove_hook_from_module(pipe.transformer, recurse=True)
            add_hook_to_module(pipe.transformer, hook)
        assert dpcache.report(pipe).computed_counts == {"cond": [5, 5]}
    remove_hook_from_module(pipe.transformer, recurse=True)
    assert "forward" not in vars(pipe.transformer) or pipe.transformer.forward == type(
        pipe.transformer
    ).forward.__get__(pipe.transformer)


def test_features_are_freed_and_the_report_stays(rollout):
    method = dpcache.Method(Schedule(STEPS, 10), "stack", Taylor(2))
    with dpcache.cached(rollout.model, method) as session:
        rollout()
    assert not session.branches and session.current is None
    assert session.report().computed == {"default": STEPS}
    assert session.report().history_bytes == 3 * 2 * 9 * 32 * 4  # keys x batch x tokens x width x float32


def test_a_report_can_be_read(rollout):
    method = uniform_skip(3, 10)
    with dpcache.cached(rollout.model, method) as session:
        rollout()
    said = str(session.report()).splitlines()
    assert len(said) == 2 and said[0].startswith(f"default: 3 of 10 steps computed {method.schedule.steps}; ")
    assert re.search(r"a computed step took \d+\.\d ms, a predicted one \d+\.\d ms$", said[0])
    assert said[1] == f"kept features: {session.report().history_bytes / 2**20:.2f} MiB"
    assert str(dpcache.session.Report()) == "kept features: 0.00 MiB"


def test_a_sample_has_uint8_images_and_float32_latents(pipe):
    batch = sample(pipe, full(4), ["dog"], [0], **CALL)
    assert (
        batch.images.shape == (1, 64, 64, 3) and batch.images.dtype == "uint8" and batch.latents.dtype == torch.float32
    )


def test_fewer_steps_asks_for_a_short_grid(pipe):
    method = fewer_steps(4, 10)
    report = sample(pipe, method, ["dog"], [0], decode=False, **CALL).report
    assert method.num_inference_steps == 4 and report.computed == {"cond": [0, 1, 2, 3]}


def test_teacache_computes_the_warmup_and_the_last_step_and_all_at_threshold_zero(rollout):
    for threshold, warmup, expected in [(0.0, 1, list(range(10))), (1e9, 1, [0, 9]), (1e9, 4, [0, 1, 2, 3, 9])]:
        method = teacache(5, 10, threshold=threshold, polynomial=[1.0, 0.0], warmup=warmup)
        with dpcache.cached(rollout.model, method):
            rollout()
            assert dpcache.report(rollout.model).computed["default"] == expected


def test_a_class_that_has_a_forward_of_somebody_elses_is_refused(rollout, monkeypatch):
    kind = type(rollout.model)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda model, *args, **kwargs: own(model, *args, **kwargs))
    with pytest.raises(SettingError, match=f"the class {kind.__name__} has .*<lambda> in place of its own forward"):
        dpcache.enable(rollout.model, full(10))
    monkeypatch.undo()
    with dpcache.cached(rollout.model, full(10)):
        rollout()


def test_no_class_of_diffusers_seems_to_have_somebody_elses_forward():
    kinds, found = [torch.nn.Module], set()
    while kinds:
        found.add(kind := kinds.pop())
        kinds += set(kind.__subclasses__()) - found
    libraries = [kind for kind in found if kind.__module__.startswith(("diffusers.", "transformers.", "torch.nn."))]
    assert len(libraries) > 200 and not [kind for kind in libraries if foreign_forward(kind)]


def test_mistakes_are_named(pipe, rollout):
    with dpcache.cached(pipe, full(10)), pytest.raises(ValueError, match="num_inference_steps=6"):
        generate(pipe, ["dog"], [0], 6, decode=False, **CALL)
    with pytest.raises(ValueError, match="no method is enabled"):
        dpcache.disable(rollout.model)
    with pytest.raises(ValueError, match="no method is enabled"):
        dpcache.report(rollout.model)
    with dpcache.cached(rollout.model, full(10)), pytest.raises(ValueError, match="already enabled"):
        dpcache.enable(rollout.model, full(10))
    with pytest.raises(ValueError, match=r"site=heart is not one of stack"):
        dpcache.Method(Schedule([0], 10), "heart", Reuse())
    with pytest.raises(ValueError, match="transformer nor a unet"):
        dpcache.enable(object(), full(10))
    with pytest.raises(ValueError, match="has no transformer blocks"):
        dpcache.enable(torch.nn.Linear(1, 1), fora(4, 10))
    with pytest.raises(ValueError, match=r"Planned is not built yet: call its build\(pipe"):
        from dpcache.planned import dpcache as planned

        dpcache.enable(rollout.model, planned(5, 10))


def test_a_reused_prediction_is_the_callers_own(rollout):
    """Some schedulers keep predictions, and the history writes its buffers again."""
    outputs, forward = [], rollout.model.forward
    with dpcache.cached(rollout.model, uniform_skip(3, 10)):
        hook = rollout.model.register_forward_hook(lambda *call: outputs.append((call[-1][0], call[-1][0].clone())))
        rollout()
        hook.remove()
    assert len(outputs) == 10 and all(torch.equal(now, then) for now, then in outputs)
    assert rollout.model.forward == forward
