"""Methods that compute parts of steps: each part at steps of its own (SmoothCache, BAC, Delta-DiT), or a few tokens
(ClusCa)."""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpcache
from baselines.bac import Likeness, bac, bubbled, sampled, update_steps
from baselines.clusca import clusca, draw, k_means, numbers, spread, stream_of
from baselines.delta_dit import delta_dit
from baselines.full import full
from baselines.smoothcache import LayerErrors, computed, layer_types, smoothcache
from dpcache.models.family import known_blocks
from dpcache.predictors import Reuse, Taylor
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced, Staggered
from dpcache.sites import transformer_blocks
from eval import timing
from helpers.embedded import CALL, run_once
from helpers.rollout import Rollout
from helpers.tracing import snapshot, state_of

T = 10
LISTS = {
    "attn": [0, 1, 2, 5, 8],
    "attn1": [0, 1, 2, 5, 8],
    "attn2": [0, 6],
    "ff": [0, 2, 4, 7],
    "ffn": [0, 2, 4, 7],
    "ff_context": [0, 3, 5, 8],
    "proj_out": [0, 1, 4, 5],
}


def parts(model) -> dict[str, torch.nn.Module]:
    """What is kept of the model, by name."""
    blocks = enumerate(transformer_blocks(model))
    found = {f"{i}.{name}": getattr(block, name, None) for i, block in blocks for name in LISTS}
    if "Single" in type(transformer_blocks(model)[-1]).__name__:  # whose attention feeds its output projection
        single = [i for i, block in enumerate(transformer_blocks(model)) if "Single" in type(block).__name__]
        found = {name: part for name, part in found.items() if name not in {f"{i}.attn" for i in single}}
    return {name: part for name, part in found.items() if part is not None}


def own_lists(model) -> dict[str, list[int]]:
    """Lists for the kinds that the model has, and for one part by its name; one kind has none."""
    *names, last = parts(model)
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return {kind: LISTS[kind] for kind in kinds if kind != last.rpartition(".")[2]} | {last: [0, 4]}


def by_hand(rollout, lists, order):
    """The final sample where every part's output is replaced at the steps that its list does not have, by the line
    through what it was at the last two that it has, or by the last."""
    counts, kept = defaultdict(int), defaultdict(list)

    def replace(name, module, args, output):
        step = counts[name]
        counts[name] += 1
        own = lists.get(name, lists.get(name.rpartition(".")[2], range(T)))
        streams = output if isinstance(output, tuple) else (output,)
        if step in own:
            kept[name].append((step, streams))
            return None
        (key, last), (before, earlier) = kept[name][-1], kept[name][-2 if len(kept[name]) > 1 else -1]
        slope = (step - key) / (key - before) if order and key > before else 0.0
        streams = tuple(x + slope * (x - y) for x, y in zip(last, earlier))
        return streams if len(streams) > 1 else streams[0]

    handles = [part.register_forward_hook(partial(replace, name)) for name, part in parts(rollout.model).items()]
    sample = rollout()
    for handle in handles:
        handle.remove()
    return sample


@pytest.mark.parametrize("predictor", [Reuse(), Taylor(1)])
def test_every_part_is_predicted_from_the_steps_at_which_it_was_computed(any_rollout, predictor):
    model, lists = any_rollout.model, own_lists(any_rollout.model)
    expected, before = by_hand(any_rollout, lists, getattr(predictor, "order", 0)), snapshot(model)
    with dpcache.cached(model, dpcache.Method(Staggered(T, lists), "modules", predictor)):
        first, second = any_rollout(), any_rollout()
        report = dpcache.report(model)
    assert torch.equal(first, second) and snapshot(model) == before
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    common = sorted(set(range(T)).intersection(*lists.values()))
    (own,), (spent,) = report.computed.values(), {tuple(spent) for spent in report.equivalents.values()}
    assert own == common and len(common) < spent[0] < T


def test_with_every_step_in_every_list_nothing_changes(any_rollout):
    model, expected = any_rollout.model, any_rollout()
    lists = {name: range(T) for name in own_lists(model)}
    with dpcache.cached(model, dpcache.Method(Staggered(T, lists), "modules", Taylor(2))):
        assert torch.equal(any_rollout(), expected)


def test_blocks_have_steps_of_their_own(rollout):
    """Of a run of blocks, here two single-stream ones, the last one names it."""
    model, lists = rollout.model, {"1": [0, 2, 3, 6], "4": [0, 1, 5]}
    method = dpcache.Method(Staggered(T, lists), dpcache.sites.Blocks([1, 3, 4]), Reuse())
    with dpcache.cached(model, method):
        ran = defaultdict(list)
        blocks = transformer_blocks(model)
        handles = [
            layer.register_forward_hook(lambda *_, i=i: ran[i].append(len(ran[0]) if i else len(ran[0]) + 1))
            for i, layer in enumerate([blocks[0].ff, blocks[1].ff, blocks[3].proj_mlp, blocks[4].proj_mlp])
        ]
        first = rollout()
        for handle in handles:
            handle.remove()
        assert torch.equal(rollout(), first)
    assert [[step - 1 for step in ran[i]] for i in (1, 2, 3)] == [lists["1"], lists["4"], lists["4"]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Staggered(T, {"ff": [1, 2]}), r"steps=\[1, 2\] must increase strictly from 0"),
        (lambda: Staggered(T, {"ff": [0, 10]}), "end below num_inference_steps=10"),
        (
            lambda: dpcache.Method(Staggered(T, {}), "stack", Reuse()),
            "site=stack computes all that it keeps at the same steps",
        ),
        (lambda: dpcache.Method(Staggered(T, {}), "tokens", Reuse()), "site=tokens computes all"),
        (lambda: smoothcache(11, T), "budget=11 must be between"),
        (lambda: smoothcache(5, T, lookahead=0), "lookahead=0 must be at least 1"),
        (lambda: delta_dit(5, T, interval=0, share=0.5), "interval=0 must be at least 1"),
        (lambda: delta_dit(5, T, interval=2, share=1.5), "share=1.5 must be above 0 and at most 1"),
        (lambda: bac(5, T, updates=11), "updates=11 must be between 1"),
        (lambda: bac(5, T, upstream=-1), "upstream=-1 must be at least 0"),
        (lambda: delta_dit(5, T, boundary=2), "boundary=2 must be between 0 and 1"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(dpcache.SettingError, match=message):
        make()


def test_a_list_for_something_that_the_model_does_not_have_is_refused(rollout):
    before = state_of(rollout.model)
    with (
        pytest.raises(dpcache.SettingError, match="steps of mlp: this model keeps attn, ff, ff_context, proj_out"),
        dpcache.cached(rollout.model, smoothcache(5, T, steps={"mlp": [0, 5], "attn": [0, 5]})),
    ):
        rollout()
    assert state_of(rollout.model) == before


def flops(pipe, method) -> float:
    return sum(timing.flops([pipe.transformer], lambda: sample(pipe, method, ["dog"], [0], decode=False, **CALL))[1])


def check_spending(pipe, recipe, budget):
    """The built method spends the budget by PyTorch's own count of FLOPs."""
    calibration = dpcache.calibrate(pipe, ["red apple"], T, recipe.statistics, **CALL)
    method = recipe.build(pipe, calibration)
    with dpcache.cached(pipe, method):
        run_once(pipe)
        (spent,) = dpcache.report(pipe).spent["cond"]
    assert spent == method.decided["spent"] and abs(spent - budget) <= 0.5
    assert spent == pytest.approx(T * flops(pipe, method) / flops(pipe, full(T)), rel=0.01)
    return method, calibration


# SmoothCache


@given(st.integers(1, 6), st.integers(2, 24), st.integers(0, 2**32 - 1))
def test_smoothcache_skips_as_many_steps_as_the_last_ones_error_allows(lookahead, steps, seed):
    rng = np.random.default_rng(seed)
    errors = rng.random((lookahead, steps))
    for lag in range(lookahead):
        errors[lag, max(steps - lag - 1, 0) :] = np.inf
    threshold = rng.random()
    found = computed(errors, threshold)
    assert found[0] == 0 and found[-1] == steps - 1
    for key, following in pairwise(found):
        longest = [lag for lag in range(1, lookahead + 1) if key + lag < steps and errors[lag - 1, key] <= threshold]
        wanted = key + 1 + max(longest, default=0)
        assert following == wanted or (following == steps - 1 and wanted == steps)


def test_smoothcache_computes_less_the_larger_its_threshold():
    errors = np.full((3, 9), np.inf)
    for lag in range(3):
        errors[lag, : 8 - lag] = 0.1 * (lag + 1)
    lengths = {threshold: computed(errors, threshold) for threshold in (0.05, 0.15, 0.25, 9.0)}
    assert lengths == {
        0.05: list(range(9)),
        0.15: [0, 2, 4, 6, 8],
        0.25: [0, 3, 6, 8],
        9.0: [0, 4, 8],
    }


def test_smoothcache_spends_its_budget_with_lists_that_follow_from_the_errors(pipe):
    method, calibration = check_spending(pipe, smoothcache(6, T), 6)
    errors = calibration[LayerErrors(3)]
    types = layer_types(pipe)
    assert types == ["attn", "ff", "ff_context", "proj_out"] == list(method.schedule.lists)
    for name, own in zip(types, errors):
        assert method.schedule.lists[name] == computed(own, method.decided["threshold"])
    assert smoothcache(6, T, steps=method.decided["lists"]).schedule == method.schedule
    assert smoothcache(T, T).build(pipe, calibration).schedule.steps == list(range(T))


def test_layer_errors_are_relative_changes_of_the_modules_outputs(pipe):
    calibration = dpcache.calibrate(pipe, ["dog"], T, [LayerErrors(2)], seeds=[0], **CALL)
    outputs = defaultdict(list)
    blocks = pipe.transformer.transformer_blocks
    handles = [
        module.register_forward_hook(lambda module, args, output, i=i: outputs[i].append(output))
        for i, module in enumerate(block.ff for block in blocks)
    ]
    run_once(pipe)
    for handle in handles:
        handle.remove()
    errors = calibration[LayerErrors(2)][layer_types(pipe).index("ff")]
    for lag in (1, 2):
        for step in range(T):
            if step + lag >= T:
                assert errors[lag - 1, step] == np.inf
                continue
            expected = [(o[step] - o[step + lag]).abs().sum() / o[step + lag].abs().sum() for o in outputs.values()]
            assert errors[lag - 1, step] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_smoothcache_reaches_small_budgets_by_looking_further_ahead():
    assert [smoothcache(budget, 50).reach for budget in (5, 9, 13, 20, 50)] == [24, 9, 7, 4, 3]
    assert smoothcache(9, 50, lookahead=3).reach == 3


# Delta-DiT


def ends_by_hand(rollout, interval, count, boundary):
    """The final sample where `count` blocks add to their input what they did at the last multiple of `interval`: the
    last ones, and from the first such step at or after the boundary on the first ones."""
    blocks = transformer_blocks(rollout.model)
    ends = {"first": range(count), "last": range(len(blocks) - count, len(blocks))}
    steps, entered, added = defaultdict(int), {}, {}

    def replace(i, module, args, kwargs, output):
        step = steps[i]
        steps[i] += 1
        entered[i] = args[0] if args else kwargs["hidden_states"]
        if step % interval == 0:
            added.update({end: output - entered[of[0]] for end, of in ends.items() if i == of[-1]})
            return None
        end = "last" if step < -(-boundary // interval) * interval else "first"
        if i not in ends[end]:
            return None
        return entered[i] + added[end] if i == ends[end][-1] else entered[i]

    handles = [block.register_forward_hook(partial(replace, i), with_kwargs=True) for i, block in enumerate(blocks)]
    sample = rollout()
    for handle in handles:
        handle.remove()
    return sample


@pytest.mark.parametrize("family", ["dit", "wan"])
@pytest.mark.parametrize(("interval", "count", "boundary"), [(2, 2, 5), (4, 1, 5), (3, 2, 0), (3, 3, 6), (4, 2, 10)])
def test_delta_dit_reuses_what_the_last_blocks_add_and_then_what_the_first_do(family, interval, count, boundary):
    rollout = Rollout(family)  # of three blocks
    expected, plain = ends_by_hand(rollout, interval, count, boundary), rollout()
    method = delta_dit(5, T, interval=interval, share=count / 3, boundary=boundary / T)
    with dpcache.cached(rollout.model, method):
        found = rollout()
        report = dpcache.report(rollout.model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3)
    assert report.computed["default"] == list(range(0, T, interval))
    with dpcache.cached(rollout.model, delta_dit(T, T, interval=1, share=count / 3)):
        assert torch.equal(rollout(), plain)


@pytest.mark.parametrize(("share", "reused"), [(None, 5), pytest.param(0.5, 3, marks=pytest.mark.ci)])  # of six blocks
def test_delta_dit_spends_its_budget(pipe, share, reused):
    method, calibration = check_spending(pipe, delta_dit(7, T, share=share), 7)
    assert method.decided["share"] == pytest.approx(reused / 6) == method.site.share
    assert method.schedule.steps == EvenlySpaced(method.decided["full"], T).steps
    if share is None:
        assert delta_dit(T, T).build(pipe, calibration).schedule.steps == list(range(T))


# ClusCa


def one_token_by_hand(rollout, full, warmup, order, propagation):
    """The final sample of ClusCa with one cluster: attention outputs, and those of single-stream blocks, on the line
    through the last two full steps; of feed-forward outputs the constant term has one token of every step in it."""
    terms, steps = {}, defaultdict(int)

    def fill(name, module, args, output):
        step = steps[name]
        steps[name] += 1
        streams = output if isinstance(output, tuple) else (output,)
        if step in full:
            known = terms.get(name) if order and step >= warmup - 1 else None
            slopes = [(x - y) / (step - known[2]) for x, y in zip(streams, known[0])] if known else [0.0] * len(streams)
            terms[name] = ([x.clone() for x in streams], slopes, step)
            return None
        constants, slopes, key = terms[name]
        if ".ff" in name:
            (constant,), token = constants, numbers(output.shape[1], f"{step} {name}").argmax()
            constant[:, token] = output[:, token]
            if "context" not in name:
                constant += propagation * (output[:, token, None] - constant)
        filled = tuple(c + (step - key) * s for c, s in zip(constants, slopes))
        return filled if len(filled) > 1 else filled[0]

    handles = [part.register_forward_hook(partial(fill, name)) for name, part in parts(rollout.model).items()]
    sample = rollout()
    for handle in handles:
        handle.remove()
    return sample


@pytest.mark.parametrize("family", ["dit", "flux", "wan"])
@pytest.mark.parametrize(("order", "propagation"), [(0, 0.0), (1, 0.0), (1, 0.4)])
def test_clusca_computes_one_token_which_tells_on_the_others(family, order, propagation):
    rollout, full_steps = Rollout(family), [0, 1, 2, 5, 8]
    method = clusca(5, T, interval=3, clusters=1, propagation=propagation, order=order)
    assert method.schedule.steps == full_steps
    expected, plain = one_token_by_hand(rollout, full_steps, 3, order, propagation), rollout()
    with dpcache.cached(rollout.model, method):
        found, again = rollout(), rollout()
    assert torch.equal(found, again) and not torch.allclose(found, plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    bent = one_token_by_hand(rollout, full_steps, 3, order, propagation + 0.2)
    assert not torch.allclose(bent, expected, rtol=1e-3, atol=1e-4)
    with dpcache.cached(rollout.model, clusca(T, T, interval=1)):
        assert torch.equal(rollout(), plain)


def test_clusters_are_those_of_k_means_in_l1_and_do_not_depend_on_the_batch():
    tokens = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0))
    labels, centres = k_means(tokens, None, 4)
    for own_tokens, own, means in zip(tokens.numpy(), labels.numpy(), centres.numpy()):
        start = own_tokens[numbers(30, "centres").argsort()[:4].numpy()]
        for _ in range(10):
            nearest = np.array([np.abs(start - token).sum(1).argmin() for token in own_tokens])
            start = np.array(
                [own_tokens[nearest == c].mean(0) if (nearest == c).any() else 0 * start[c] for c in range(4)]
            )
        assert own.tolist() == nearest.tolist()
        np.testing.assert_allclose(means, start, rtol=1e-4, atol=1e-6)
    assert torch.equal(k_means(tokens[1:], None, 4)[0], labels[1:])
    again = k_means(tokens, centres, 4, iterations=1)[0]  # goes on where it stopped
    assert (again == labels).float().mean() > 0.9
    assert k_means(tokens[:, :3], None, 16)[0].sort().values.tolist() == [[0, 1, 2]] * 2


def test_every_cluster_draws_one_of_its_tokens_and_moves_the_others():
    labels = torch.tensor([[0, 2, 2, 0, 1, 2], [2, 2, 0, 0, 0, 0]])  # the second sample has no cluster 1
    order = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.5, 0.4])
    index = draw(labels, 3, order)
    assert index.tolist() == [[3, 4, 1], [4, 0, 1]]
    kept, fresh = torch.zeros(2, 6, 1), torch.tensor([[[1.0], [2.0], [3.0]], [[1.0], [4.0], [2.0]]])
    spread(kept, fresh, labels, index, 0.5)
    # Token 0 of the second sample stands in for the empty cluster, so its cluster moves towards the mean of two.
    assert kept[..., 0].tolist() == [[0.5, 3.0, 1.5, 1.0, 2.0, 1.5], [3.5, 2.5, 0.5, 0.5, 1.0, 0.5]]


def test_clusca_spends_its_budget(pipe):
    method, _ = check_spending(pipe, clusca(6, T), 6)
    assert method.schedule.steps == EvenlySpaced(method.decided["full"], T, 3).steps


def test_a_block_with_two_feed_forwards_at_a_time_has_one_for_the_text():
    pairs = [
        [name for _, name in block.feed_forwards]
        for block in known_blocks().values()
        if block.part != "single" and len({name for _, name in block.feed_forwards}) > 1
    ]
    assert len(pairs) > 5 and all(sorted(map(stream_of, names)) == ["image", "text"] for names in pairs)


def test_clusca_refuses_what_it_does_not_know(rollout):
    with pytest.raises(dpcache.SettingError, match="clusters=0, propagation="):
        clusca(5, T, clusters=0)
    with pytest.raises(dpcache.SettingError, match="order=2"):
        clusca(5, T, order=2)
    unknown = replace(known_blocks()["FluxTransformerBlock"], feed_forwards=())
    site = clusca(5, T, interval=3).site
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(known_blocks(), unknown.kind, unknown)
        with pytest.raises(
            dpcache.SettingError, match="site=clusters does not know FluxTransformerBlock; known blocks:"
        ):
            site.hooks(SimpleNamespace(online=False), rollout.model)


# BAC


@pytest.mark.parametrize("updates", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_bac_updates_where_the_similarities_of_what_is_reused_are_largest(updates, seed):
    similarity = np.random.default_rng(seed).uniform(-1, 1, (7, 7))

    def total(steps):
        return sum(similarity[max(s for s in steps if s <= step), step] for step in range(7) if step not in steps)

    best = max(((0, *others) for others in combinations(range(1, 7), updates - 1)), key=total)
    assert update_steps(similarity, updates) == list(best)


def test_bac_lets_the_worst_feed_forwards_take_the_steps_of_later_ones():
    steps = {"0.attn": [0, 9], "0.ff": [0, 1], "1.ff": [0, 2], "1.ff_context": [0, 3], "2.ff": [0, 4], "3.ff": [0, 5]}
    depths = {name: int(name[0]) for name in steps if ".ff" in name}
    errors = {"0.ff": 2.0, "1.ff": 3.0, "1.ff_context": 0.5, "2.ff": 4.0, "3.ff": 1.0}
    assert bubbled(steps, depths, errors, 0) == steps
    assert bubbled(steps, depths, errors, 1) == steps | {"2.ff": [0, 4, 5]}
    assert bubbled(steps, depths, errors, 2) == steps | {"2.ff": [0, 4, 5], "1.ff": [0, 2, 4, 5]}
    assert bubbled(steps, depths, errors, 3)["0.ff"] == [0, 1, 2, 3, 4, 5]
    assert bubbled(steps, depths, errors, 9)["3.ff"] == [0, 5]


@pytest.mark.ci
def test_bac_spends_its_budget_on_the_lists_that_the_similarities_give(pipe):
    method, calibration = check_spending(pipe, bac(6, T), 6)
    likeness, names = calibration[Likeness()], list(method.schedule.lists)
    assert names == [f"{i}.{name}" for i in range(2) for name in ("attn", "ff", "ff_context")] + [
        f"{i}.proj_out" for i in range(2, 6)
    ]
    assert likeness.shape == (2, len(names), T, T)
    updates = method.decided["updates"]
    assert max(updates) - min(updates) <= 1
    for name, similarity, count in zip(names, likeness[0], updates):
        own = update_steps(similarity, count)
        if "attn" in name or name == "5.proj_out":
            assert method.schedule.lists[name] == own
        else:
            assert set(method.schedule.lists[name]) >= set(own)
    assert bac(T, T).build(pipe, calibration).schedule.steps == list(range(T))
    assert {len(own) for own in bac(6, T, updates=3, upstream=0).build(pipe, calibration).schedule.lists.values()} == {
        3
    }

    outputs, kept = [], pipe.transformer.transformer_blocks[1].ff
    handle = kept.register_forward_hook(lambda module, args, output: outputs.append(output.flatten()))
    sample(pipe, full(T), ["red apple"], [calibration.made_from["seeds"][0]], decode=False, **CALL)
    handle.remove()
    rows = torch.stack(outputs)
    expected = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    np.testing.assert_allclose(likeness[0, names.index("1.ff")], expected, atol=1e-5)
    expected = (rows[:, None] - rows[None]).abs().mean(-1)
    np.testing.assert_allclose(likeness[1, names.index("1.ff")], expected, rtol=1e-3, atol=1e-5)


def test_large_outputs_are_compared_by_some_of_their_elements():
    streams = torch.arange(2 * 300_000.0).view(2, 300, 1000), -torch.ones(2, 7, 10)
    rows = sampled(streams)
    assert rows.shape[0] == 2 and 2**15 < rows.shape[1] <= 2**16
    assert rows[1, :3].tolist() == [300_000.0, 300_005.0, 300_010.0] and rows[0, -1] == -1
