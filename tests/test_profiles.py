"""Methods that profile the model offline: ProfilingDiT and ERTACache."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpcache
from baselines.ertacache import ERTACache, rectification, refreshed
from baselines.full import full
from baselines.profilingdit import profilingdit
from dpcache.models.family import Streams
from dpcache.sites import runs, transformer_blocks
from dpcache.statistics import BlockChanges
from helpers.embedded import CALL
from helpers.rollout import Rollout
from helpers.tracing import state_of

T = 10


@pytest.fixture(scope="module")
def calibration(pipe):
    statistics = (*ERTACache(5, T).statistics, *profilingdit(7, T).statistics)
    return dpcache.calibrate(pipe, ["red apple", "dog"], T, statistics, batch_size=2, **CALL)


@given(st.sets(st.integers(0, 11)))
def test_runs_are_consecutive_and_as_long_as_can_be(blocks):
    parts = runs(sorted(blocks), [Streams()] * 12)
    assert [index for part in parts for index in part] == sorted(blocks)
    assert all(b == a + 1 for part in parts for a, b in pairwise(part))
    assert all(b[0] > a[-1] + 1 for a, b in pairwise(parts))


@torch.no_grad()
def by_hand(rollout: Rollout, blocks, refresh, bent=False) -> torch.Tensor:
    """The rollout with what each of `blocks` adds replaced, outside `refresh`, by what it added in the last of them.

    bent: by what the first of them added.
    """
    step, added, handles = [-1], {}, []

    def count(*_):
        step[0] += 1

    def replace(index):
        def hook(module, args, kwargs, output):
            image, text = kwargs.get("hidden_states", args[0] if args else None), kwargs.get("encoder_hidden_states")
            both = isinstance(output, tuple)
            streams = (text, image) if both else (image,)
            if step[0] in refresh:
                outputs = output if both else (output,)
                added[index] = tuple(after - before for after, before in zip(outputs, streams, strict=True))
            else:
                made = added[blocks[0] if bent else index]
                output = tuple(before + more for before, more in zip(streams, made, strict=True))
                output = output if both else output[0]
            return output

        return hook

    handles.append(rollout.model.register_forward_pre_hook(count))
    for index, block in enumerate(transformer_blocks(rollout.model)):
        if index in blocks:
            handles.append(block.register_forward_hook(replace(index), with_kwargs=True))
    result = rollout()
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("kind", ["flux", "dit"])
@pytest.mark.parametrize("blocks", [[0], [0, 1], [0, 2]])
def test_profilingdit_reuses_what_blocks_add(kind, blocks):
    rollout = Rollout(kind, T)
    before, full, refresh = state_of(rollout.model), rollout(), {0, 1, 2, 5, 8}
    with dpcache.cached(rollout.model, profilingdit(8, T, blocks=blocks, interval=3, warmup=2)):
        made, again = rollout(), rollout()
        report = dpcache.report(rollout.model)
    assert torch.equal(made, again) and state_of(rollout.model) == before
    assert report.computed["default"] == sorted(refresh)
    expected = by_hand(rollout, blocks, refresh)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    assert (made - full).norm() > 100 * (made - expected).norm()
    if len(blocks) > 1:
        assert (made - by_hand(rollout, blocks, refresh, bent=True)).norm() > 100 * (made - expected).norm()


def test_all_families_take_runs_of_blocks(any_rollout):
    full = any_rollout()
    with dpcache.cached(any_rollout.model, profilingdit(8, T, blocks=[1, 2], interval=3, warmup=2)):
        made = any_rollout()
        (spent,) = dpcache.report(any_rollout.model).spent["default"]
    assert made.isfinite().all() and not torch.equal(made, full) and 5 < spent < T


def test_profilingdit_profiles_spends_the_budget_and_says_so(pipe, calibration):
    changes, blocks = calibration[BlockChanges()], transformer_blocks(pipe.transformer)
    assert len(changes) == len(blocks) and min(changes) > 0
    method = profilingdit(7, T, warmup=2).build(pipe, calibration)
    count = round(0.6 * len(blocks))
    assert sorted(np.argsort(changes)[:count]) == method.site.blocks == method.decided["blocks"]
    assert abs(method.decided["spent"] - 7) <= 0.5


def test_profile_is_the_change_of_what_a_block_adds(pipe, calibration):
    added = []

    def see(module, args, kwargs, output):
        added.append(output[1] - kwargs["hidden_states"])

    handle = transformer_blocks(pipe.transformer)[1].register_forward_hook(see, with_kwargs=True)
    calibration.rerun(pipe, full(T))
    handle.remove()
    expected = [((b - a).abs().mean() / a.abs().mean()).item() for a, b in pairwise(added)]
    assert len(added) == T and calibration[BlockChanges()][1] == pytest.approx(np.mean(expected), rel=1e-4)


@given(st.integers(2, 12), st.integers(0, 10**6))
def test_ertacache_refreshes_where_the_error_since_the_last_refresh_reaches_the_threshold(steps, seed):
    errors = np.random.default_rng(seed).random((steps, steps))
    counts = [len(refreshed(errors, threshold)) for threshold in (0, *np.unique(errors), 2)]
    assert counts[0] == steps and counts[-1] == 1
    threshold = float(np.median(errors))
    computed = refreshed(errors, threshold)
    for step in range(1, steps):
        last = max(key for key in computed if key < step)
        assert (errors[last, step] >= threshold) == (step in computed)


@given(st.integers(0, 10**6))
def test_rectification_is_the_regression_of_the_error_on_the_reused_prediction(seed):
    D, x = np.random.default_rng(seed).normal(size=(2, 6, 40))
    rows = np.concatenate([D, x])
    for step, (of_residual, of_input) in rectification(rows @ rows.T, [0, 3]).items():
        reused = x[step] + D[0 if step < 3 else 3]
        error = reused - (x[step] + D[step])
        a = (reused @ error) / (reused @ reused)
        assert (of_residual, of_input) == pytest.approx((1 - a, -a))


def test_ertacache_by_hand(pipe, calibration):
    method = ERTACache(5, T).build(pipe, calibration)
    steps = method.schedule.steps
    assert steps[0] == 0 and 2 <= len(steps) <= 5
    plain = ERTACache(5, T, threshold=method.decided["threshold"], rectify=False).build(pipe, calibration)
    assert plain.schedule.steps == steps
    errors = [np.linalg.norm(calibration.rerun(pipe, m)[0] - calibration.latents) for m in (method, plain)]
    assert errors[0] < errors[1]  # on the prompts of the profile

    # What the scheduler is given at a skipped step, from the input then and what was kept last.
    inputs, kept, predictions, step = {}, {}, [], pipe.scheduler.step

    def observe(branch, step, name, value):
        (inputs if name == "input" else kept)[step] = value

    pipe.scheduler.step = lambda v, *rest, **more: (predictions.append(v), step(v, *rest, **more))[1]
    with dpcache.cached(pipe, method, observe):
        pipe(["dog"], num_inference_steps=T, output_type="latent", **CALL)
    del pipe.scheduler.step
    assert sorted(kept) == steps and sorted(inputs) == list(range(T))
    for s in set(range(T)) - set(steps):
        key = max(k for k in steps if k < s)
        of_residual, of_input = method.predictor.weights((key,), s)
        expected = inputs[s] * (1 + of_input) + kept[key] * of_residual
        torch.testing.assert_close(predictions[s], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: profilingdit(11, T), "budget=11 must be between 1"),
        (lambda: profilingdit(5, T, share=0), "share=0 must be above 0"),
        (lambda: ERTACache(11, T), "budget=11 must be between"),
        (
            lambda: dpcache.enable(Rollout("dit").model, profilingdit(5, T, blocks=[7], interval=2)),
            r"blocks=\[7\]",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
