"""ToCa: its rules written out by hand on small random models, what it spends, and what it leaves behind."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

import dpcache
from baselines.full import full
from baselines.toca import spread_out, toca
from dpcache.predictors import Reuse, Taylor
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.sites import Tokens
from dpcache.tokens import TokenState, attend
from eval import timing
from helpers.by_hand import (
    T,
    attached,
    distance,
    dit_by_hand,
    dit_inputs,
    euler,
    flux_end,
    flux_inputs,
    flux_stack,
    flux_start,
)
from helpers.cases import case
from helpers.embedded import CALL, run_once
from helpers.rollout import STEPS
from helpers.tracing import count_calls, snapshot

DIT, DOUBLE, SINGLE = "BasicTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"
pytestmark = pytest.mark.usefixtures("no_grad")


def received(attn, image, text=None, image_rotary_emb=None):
    """The attention map's mean over heads and queries, (B, N), text first."""
    joint = []
    for added, own in [
        (("add_q_proj", "norm_added_q"), ("to_q", "norm_q")),
        (("add_k_proj", "norm_added_k"), ("to_k", "norm_k")),
    ]:
        parts = []
        for stream, (project, norm) in [(text, added), (image, own)]:
            if stream is not None:
                heads = getattr(attn, project)(stream).unflatten(2, (attn.heads, -1))
                parts.append(heads if getattr(attn, norm) is None else getattr(attn, norm)(heads))
        heads = torch.cat(parts, 1)
        joint.append(heads if image_rotary_emb is None else apply_rotary_emb(heads, image_rotary_emb, sequence_dim=1))
    query, key = joint
    return torch.einsum("bqhd,bkhd->bhqk", query / query.shape[-1] ** 0.5, key).softmax(-1).mean((1, 2))


class ByToken:
    """Full steps at `steps`. On the others attention outputs are what they were, and of the feed-forward outputs those
    of the tokens with the highest scores are computed anew, and stay.

    Bent rules: no age or no attention in the score, no bonus for the best token of a cell, outputs that do not stay.
    """

    def __init__(self, steps, interval, ratio, dit=False, age=0.25, attention=1.0, bonus=0.6, stay=True):
        self.steps, self.interval, self.ratio, self.dit, self.step = steps, interval, ratio, dit, 0
        self.age, self.attention, self.bonus, self.stay = age, attention, bonus, stay
        self.attended, self.received, self.kept, self.ages = {}, {}, {}, {}

    def __call__(self, name, gates, module, *inputs, **more):
        kind, layer = name.rsplit(" ", 1)
        got = self.received.get(f"single {layer}" if kind == "single" else f"attn {layer}")
        if kind == "attn":
            if self.step in self.steps:
                output = module(*inputs, **more)
                self.attended[name] = output if isinstance(output, tuple) else (output,)
                self.received[name] = received(module, *inputs, **more)
            outputs = self.attended[name]
        elif kind == "single":
            block, joint, rope = inputs
            if self.step in self.steps:
                self.attended[name] = block.attn(joint, image_rotary_emb=rope)
                got = self.received[name] = received(block.attn, joint, image_rotary_emb=rope)
            hidden = torch.nn.functional.gelu(block.proj_mlp(joint), approximate="tanh")
            anew = block.proj_out(torch.cat([self.attended[name], hidden], 2))
            outputs = [self.tokens(name, anew, got, (1.5 - int(layer) / 27) * 1.6)]
        else:
            anew = module(*inputs)
            length, share = anew.shape[1], (1.5 - int(layer) / 27) * 0.4
            if self.dit:
                share = (0.8 + 0.4 * int(layer) / 27) * (3 - 4 * (T - 1 - self.step) / T) * 2.5
            outputs = [self.tokens(name, anew, got[:, :length] if kind == "text ff" else got[:, -length:], share)]
        return [gate[:, None] * output for gate, output in zip(gates, outputs, strict=True)]

    def tokens(self, name, anew, got, share):
        if self.step in self.steps:
            self.kept[name], self.ages[name] = anew.clone(), np.zeros(got.shape)
            return anew
        output = self.kept[name] if self.stay else self.kept[name].clone()
        count = int(got.shape[1] * min(max(self.ratio * share, 0), 1))
        for b, ages in enumerate(self.ages[name]):
            score = self.attention * got[b].numpy() / np.linalg.norm(got[b].numpy()) + self.age * ages / self.interval
            if self.dit:
                side = round(len(score) ** 0.5)
                square = np.arange(len(score)).reshape(side, side)
                for row in range(0, side, 2):
                    for column in range(0, side, 2):
                        cell = square[row : row + 2, column : column + 2].ravel()
                        score[max(cell, key=lambda token: score[token])] *= 1 + self.bonus
            fresh = sorted(range(len(score)), key=lambda token: -score[token])[:count]
            output[b, fresh] = anew[b, fresh]
            ages += 1
            ages[fresh] = 0
        return output


def every(interval, warmup=3):
    return [step for step in range(T) if step < warmup or (step - warmup + 1) % interval == 0]


def flux_by_hand(model, interval, ratio, **bent):
    x, condition = flux_inputs(6, 12)
    filled = ByToken(every(interval), interval, ratio, **bent)

    def velocity(x, step):
        filled.step = step
        h, text, c, rope = flux_start(model, x, step, **condition)
        return flux_end(model, flux_stack(model, h, text, c, rope, filled), c)

    return euler(velocity, x)


def dit_rolled(model, interval, ratio, **bent):
    x, condition = dit_inputs()
    filled = ByToken(every(interval), interval, ratio, dit=True, **bent)

    def velocity(x, step):
        filled.step = step
        return dit_by_hand(model, x, step, **condition, kept=filled)

    return euler(velocity, x)


BENT = [{"age": 0.0}, {"attention": -1.0}, {"stay": False}]


@pytest.mark.ci
@pytest.mark.parametrize(("interval", "ratio"), [(4, 0.3), (7, 0.5)])
def test_flux_is_the_rule_by_hand(flux, interval, ratio):
    v, steps = attached(flux, toca(9, T, interval=interval, fresh_ratio=ratio), flux_inputs(6, 12))
    assert steps == every(interval)
    assert distance(v, flux_by_hand(flux, interval, ratio)) < 1e-5
    for bent in BENT:
        assert distance(v, flux_by_hand(flux, interval, ratio, **bent)) > 1e-3
    assert distance(v, flux_by_hand(flux, interval, 0.8 * ratio)) > 1e-3
    assert distance(v, flux_by_hand(flux, interval + 1, ratio)) > 1e-3


@pytest.mark.parametrize(("interval", "ratio"), [(4, 0.07), (7, 0.12)])
def test_dit_is_the_rule_by_hand(dit, interval, ratio):
    v, steps = attached(dit, toca(9, T, interval=interval, fresh_ratio=ratio), dit_inputs(), time=1000)
    assert steps == every(interval)
    assert distance(v, dit_rolled(dit, interval, ratio)) < 1e-5
    for bent in [*BENT, {"bonus": 0.0}]:
        assert distance(v, dit_rolled(dit, interval, ratio, **bent)) > 1e-3


@pytest.mark.parametrize(
    ("block", "step", "layers", "length", "counts"),
    [
        (DOUBLE, 9, (0, 18), 512, (30, 17)),
        (DOUBLE, 9, (0, 18), 4096, (245, 136)),
        (SINGLE, 9, (0, 37), 4608, (1105, 95)),
        ("WanTransformerBlock", 9, (0, 39), 1000, (150, 5)),
        (DIT, 1, (0, 14, 27), 256, (0, 0, 0)),
        (DIT, 12, (0, 14, 27), 256, (1, 1, 2)),
        (DIT, 19, (0, 14, 27), 256, (21, 27, 32)),
        (DIT, 39, (0, 14, 27), 256, (78, 99, 118)),
        (DIT, 48, (0, 14, 27), 256, (104, 131, 156)),
    ],
)
def test_numbers_of_fresh_tokens_are_the_authors(block, step, layers, length, counts):
    scores = toca(9, 50, interval=4).site.selector
    assert tuple(scores.count(step, block, layer, length) for layer in layers) == counts


def test_no_token_waits_for_longer_than_another():
    scores = toca(9, 50, interval=6, fresh_ratio=0.21).site.selector  # 3 of 10
    context = SimpleNamespace(state=TokenState(), keys=[0, 1, 2], step=3)
    got = 0.1 + torch.arange(10.0)[None] / 1e4  # less than a step of age apart
    turns = []
    for context.step in range(3, 8):
        turns += scores.select(context, "ff", "WanTransformerBlock", 0, got).tolist()
    assert turns == [[9, 8, 7], [6, 5, 4], [3, 2, 1], [0, 9, 8], [7, 6, 5]]
    context.keys, context.step = [*context.keys, 8], 9
    assert scores.select(context, "ff", "WanTransformerBlock", 0, got).tolist() == turns[:1]


def test_the_best_token_of_every_cell_gains():
    score = torch.arange(1.0, 17).view(1, 16)
    gained = [5, 7, 13, 15]
    assert [i for i in range(16) if spread_out(score)[0, i] != score[0, i]] == gained
    torch.testing.assert_close(spread_out(score)[0, gained], 1.6 * score[0, gained])
    with pytest.raises(ValueError, match="9 tokens are not a square of an even number"):
        spread_out(torch.ones(1, 9))


@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention_in_parts(monkeypatch, masked):
    query, key, value = torch.randn(3, 2, 4, 33, 8).unbind()
    mask = torch.rand(2, 1, 33, 33) < 0.7 if masked else None
    mask = mask.float().log() if masked == "float" else mask
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(attend(query, key, value, mask)[0], expected)
    torch.testing.assert_close(attend(query, key, value, mask)[1].sum(1), torch.ones(2))


@pytest.mark.parametrize("predictor", [Reuse(), Taylor(2)])
def test_without_fresh_tokens_it_is_the_site_modules(any_rollout, predictor):
    outputs = []
    for site in ("modules", "tokens"):
        with dpcache.cached(any_rollout.model, dpcache.Method(Schedule(STEPS, 10), site, predictor)):
            outputs.append(any_rollout())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen_image", "sd3"])
def test_the_same_on_whole_pipelines(name):
    family, outputs = case(name), []
    for site in ("modules", "tokens"):
        outputs.append(family.run(dpcache.Method(Schedule([0, 1, 2, 5], 8), site, Taylor(2)))[0])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    method = toca(4, 8, interval=3, fresh_ratio=0.5)
    (first, report), (again, _) = family.run(method), family.run(method)
    assert torch.equal(first, again) and not torch.allclose(first, outputs[0])
    (spent,) = next(iter(report.spent.values()))
    assert method.schedule.steps == [0, 1, 2, 5] and 4 < spent < 7


def test_with_all_tokens_fresh_attention_alone_is_reused(any_rollout):
    class All:
        def select(self, context, name, block, layer, received):
            return torch.arange(received.shape[1]).expand(len(received), -1)

    model, outputs = any_rollout.model, []
    with dpcache.cached(model, dpcache.Method(Schedule(STEPS, 10), Tokens(selector=All()), Reuse())):
        outputs.append(any_rollout())
    kept, calls = {}, {}

    def attention(module, args, output):
        calls[module] = step = calls.get(module, -1) + 1
        kept[module] = output if step in STEPS else kept[module]
        return kept[module]

    handles = [
        module.register_forward_hook(attention)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("attn", "attn1", "attn2") and "blocks" in name and "refiner" not in name
    ]
    outputs.append(any_rollout())
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def calibration(pipe):
    return dpcache.calibrate(pipe, ["red apple"], 10, (), **CALL)


@pytest.mark.ci
@pytest.mark.parametrize("budget", [5, 7, 10])
def test_the_budget_is_spent_in_full_step_equivalents(pipe, calibration, budget):
    recipe = toca(budget, 10)
    assert recipe.statistics == () and recipe.example.site.partial
    expected, before = run_once(pipe), snapshot(pipe.transformer)
    method = recipe.build(pipe, calibration)
    outputs = []
    with dpcache.cached(pipe, method):
        outputs.append(run_once(pipe))
        attention = [pipe.transformer.transformer_blocks[0].attn.to_q]
        (attended,) = count_calls(attention, lambda: outputs.append(run_once(pipe)))
        report = dpcache.report(pipe)
    assert torch.equal(*outputs) and torch.equal(outputs[0], expected) == (budget == 10)
    assert snapshot(pipe.transformer) == before and torch.equal(run_once(pipe), expected)
    assert report.computed["cond"] == method.schedule.steps == EvenlySpaced(attended, 10, 3).steps

    (spent, _) = report.spent["cond"]
    assert spent == method.decided["spent"] and abs(spent - budget) <= 0.5

    def flops(method):
        return sum(
            timing.flops([pipe.transformer], lambda: sample(pipe, method, ["dog"], [0], decode=False, **CALL))[1]
        )

    assert spent == pytest.approx(10 * flops(method) / flops(full(10)), rel=0.01)


def test_guidance_branches_have_tokens_of_their_own(rollout):
    method = toca(5, 10, interval=4, fresh_ratio=0.5)
    with dpcache.cached(rollout.model, method):
        alone = rollout.branches(["cond"]) | rollout.branches(["uncond"])
        together = rollout.branches(["cond", "uncond"])
    assert not torch.equal(alone["cond"], alone["uncond"])
    assert all(torch.equal(together[name], alone[name]) for name in alone)


def test_mistakes_are_named(pipe, rollout):
    with pytest.raises(ValueError, match="budget=2 must be between warmup=3"):
        toca(2, 50)
    with pytest.raises(ValueError, match="ToCa is not built yet"):
        dpcache.enable(pipe, toca(5, 10))
    with dpcache.cached(rollout.model, toca(5, 10, interval=4)):
        for block in rollout.model.transformer_blocks:  # as another library's kernels would have it
            block.attn.processor = lambda attn, image, text, *more: (image, text)
        with pytest.raises(ValueError, match="set_attention_backend"):
            rollout()


def test_a_budget_out_of_reach_is_said(pipe, calibration, caplog):
    method = toca(3, 10).build(pipe, calibration)
    assert method.schedule.steps == [0, 1, 2] and "budget=3 is out of reach: 3 full steps spend" in caplog.text
