"""Methods that decide online from more than the first block: DiCache, SpeCa, EasyCache and BWCache.

As in `test_parity.py`, each method's equations are written out by hand, and bent a little, which has to show.
"""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpcache
from baselines.bwcache import bwcache
from baselines.dicache import dicache
from baselines.easycache import easycache
from baselines.speca import speca
from baselines.teacache import teacache
from dpcache.steps import Loop
from eval import timing
from helpers import by_hand as hand
from helpers.by_hand import T, distance, dit_inputs, euler, flux_inputs, sigma
from helpers.embedded import CALL
from helpers.rollout import Rollout
from helpers.tracing import snapshot

pytestmark = pytest.mark.usefixtures("no_grad")


def size(x):
    return x.abs().mean().item()


def attached(model, method, inputs, time=1):
    """Velocities and computed steps of the method under test, the same in two generations."""
    x, condition = inputs
    with dpcache.cached(model, method):
        first, second = (
            euler(lambda x, s: model(x, timestep=sigma(s) * time, **condition, return_dict=False)[0], x)
            for _ in range(2)
        )
        report = dpcache.report(model)
    (steps,), (counts,) = report.computed.values(), report.computed_counts.values()
    assert torch.equal(first, second) and counts == [len(steps)] * 2
    assert 5 < len(steps) < 40
    return first, steps


def dicache_by_hand(model, probe, threshold, retention, minus_input, clip=(1, 1.5), since_computed=False, spill=False):
    """Bent: `since_computed` takes changes against the last computed step, `spill` keeps what exceeds the threshold."""
    x, condition = flux_inputs()
    before, error, residuals, probes, computed = None, 0.0, [], [], []

    def velocity(x, step):
        nonlocal before, error
        h, *rest = hand.flux_start(model, x, step, **condition)
        streams = list(hand.flux_streams(model, h, *rest))
        p, y = streams[probe - 1], streams[-1]
        free = retention * T < step < T - 1
        if free:
            old_h, old_p = before
            change = size(p - old_p) / size(old_p)
            error += abs(change - size(h - old_h) / size(old_h)) if minus_input else change
        if not free or error >= threshold:
            error = error - threshold if spill and free else 0.0
            residuals.append(y - h)
            probes.append(p - h)
            computed.append(step)
        elif len(residuals) == 1:
            y = h + residuals[0]
        else:
            gamma = size(p - h - probes[-2]) / size(probes[-1] - probes[-2])
            y = h + residuals[-2] + min(max(gamma, clip[0]), clip[1]) * (residuals[-1] - residuals[-2])
        if step in computed or not since_computed:
            before = h, p
        return hand.flux_end(model, y, rest[1])

    return euler(velocity, x), computed


@pytest.mark.parametrize(
    ("probe", "threshold", "retention", "minus_input"),
    [
        (1, 0.1, 0.0, True),
        pytest.param(1, 0.3, 0.1, False, marks=pytest.mark.ci),
        pytest.param(3, 0.3, 0.2, False, marks=pytest.mark.ci),
    ],
)
def test_dicache(flux, probe, threshold, retention, minus_input):
    rule = {"probe": probe, "threshold": threshold, "retention": retention, "minus_input": minus_input}
    v, steps = attached(flux, dicache(20, T, **rule), flux_inputs())
    reference, computed = dicache_by_hand(flux, **rule)
    assert steps == computed
    assert distance(v, reference) < 1e-5
    assert steps != dicache_by_hand(flux, **rule, since_computed=True)[1]
    assert steps != dicache_by_hand(flux, **rule, spill=True)[1]
    assert distance(v, dicache_by_hand(flux, **rule, clip=(1, 1))[0]) > 1e-4
    assert distance(v, dicache_by_hand(flux, **rule | {"probe": probe % 3 + 1})[0]) > 1e-3


def speca_by_hand(model, threshold, decay, shortest, longest, order, warmup, ratio_of_means=False, at_once=False):
    """Bent: `at_once` computes the very step whose forecast fails, as the paper says."""
    x, condition = dit_inputs()
    kept, forecasts, error = hand.Kept(set(), order), None, None

    def run(x, step):
        h = model.pos_embed(x)
        for index, block in enumerate(model.transformer_blocks):
            h, before = hand.dit_block(block, index, h, step, **condition, kept=kept), h
        return before, h

    def velocity(x, step):
        nonlocal forecasts, error
        kept.step, limit = step, threshold * decay ** (step / T)
        if forecasts == 0:
            compute = False
        else:
            failed = error is not None and error > limit
            compute = step < warmup or forecasts == longest or failed
        if not compute:
            before, h = run(x, step)
            if forecasts >= shortest:
                real = hand.dit_block(model.transformer_blocks[-1], -1, before, step, **condition)
                error = size(h - real) / size(real) if ratio_of_means else ((h - real) / real).abs().mean().item()
                compute = at_once and error > limit
            forecasts += 1
        if compute:
            kept.steps.add(step)
            h, forecasts, error = run(x, step)[1], 0, None
        return hand.dit_end(model, h, step, **condition)

    return euler(velocity, x), sorted(kept.steps)


@pytest.mark.parametrize(
    "rule",
    [
        {"threshold": 0.5, "decay": 0.3, "shortest": 2, "longest": 8, "order": 2, "warmup": 3},
        pytest.param(
            {"threshold": 0.2, "decay": 1.0, "shortest": 1, "longest": 6, "order": 1, "warmup": 1}, marks=pytest.mark.ci
        ),
        pytest.param(
            {"threshold": 0.5, "decay": 0.1, "shortest": 1, "longest": 9, "order": 3, "warmup": 3}, marks=pytest.mark.ci
        ),
    ],
)
def test_speca(dit, rule):
    v, steps = attached(dit, speca(10, T, **rule), dit_inputs(), time=1000)
    reference, computed = speca_by_hand(dit, **rule)
    gaps = {b - a for a, b in pairwise(steps)}
    assert steps == computed and len(gaps) > 2
    assert distance(v, reference) < 1e-5
    assert steps != speca_by_hand(dit, **rule, at_once=True)[1]
    assert steps != speca_by_hand(dit, **rule, ratio_of_means=True)[1]
    assert distance(v, speca_by_hand(dit, **rule | {"order": rule["order"] - 1})[0]) > 1e-3


def easycache_by_hand(real, x, threshold, warmup, steps=None, since_computed=False, consecutive=False, plain=False):
    """`steps`: computed ones that another branch has settled. Bent: `since_computed` takes the input's change against
    the last computed step, `consecutive` estimates the rate between steps in a row alone, `plain` reuses v."""
    before = rate = last = None
    error, computed = 0.0, []

    def velocity(x, step):
        nonlocal before, rate, last, error
        if steps is not None:
            compute = step in steps
        elif step < warmup or step == T - 1:
            compute = True
        else:
            error += rate * size(x - before) / size(last[1])
            compute = error >= threshold
        if compute:
            v, error = real(x, step), 0.0
            if last is not None and not (consecutive and computed[-1] != step - 1):
                rate = size(v - last[1]) / size(x - last[0])
            last = x, v
            computed.append(step)
        if compute or not since_computed:
            before = x
        return last[1] if plain else x + (last[1] - last[0])

    return euler(velocity, x), computed


def easycache_cases(flux, dit):
    x, condition = flux_inputs()
    yield flux, (x, condition), 1, lambda x, s: flux(x, timestep=sigma(s), **condition, return_dict=False)[0]
    y, labels = dit_inputs()
    yield dit, (y, labels), 1000, lambda x, s: hand.dit_by_hand(dit, x, s, **labels, kept=hand.EVERYTHING)


@pytest.mark.parametrize(("threshold", "warmup"), [(0.1, 5), (0.3, 2)])
@pytest.mark.parametrize("index", [0, 1])
def test_easycache(flux, dit, index, threshold, warmup):
    model, inputs, time, real = list(easycache_cases(flux, dit))[index]
    v, steps = attached(model, easycache(10, T, threshold=threshold, warmup=warmup), inputs, time)
    rule = {"threshold": threshold, "warmup": warmup}
    reference, computed = easycache_by_hand(real, inputs[0], **rule)
    assert steps == computed
    assert distance(v, reference) < 1e-5
    assert steps != easycache_by_hand(real, inputs[0], **rule, since_computed=True)[1]
    assert steps != easycache_by_hand(real, inputs[0], **rule, consecutive=True)[1]
    assert distance(v, easycache_by_hand(real, inputs[0], **rule, steps=steps, plain=True)[0]) > 1e-3


def bwcache_by_hand(model, threshold, reuse, last_alone=False, from_end=False, periodic=False):
    """Bent: `last_alone` looks at the last block, `from_end` counts k in steps that are left, `periodic` tests no more
    after the first reuse."""
    x, condition = flux_inputs()
    before, left, first, computed = None, 0, None, []

    def velocity(x, step):
        nonlocal before, left, first
        h, *rest = hand.flux_start(model, x, step, **condition)
        allowed = first is not None and (T - step > (T - first) / 2 if from_end else step < T - first / 2)
        if left and allowed:
            left -= 1
        else:
            streams = list(hand.flux_streams(model, h, *rest))
            left, computed_now = 0, zip(streams, before or [])
            changes = [size(new - old) / size(old) for new, old in computed_now]
            change = changes[-1] if last_alone and changes else sum(changes) / len(streams)
            if changes and (change < threshold or (periodic and first is not None)):
                left, first = reuse, step if first is None else first
            before = streams
            computed.append(step)
        return hand.flux_end(model, before[-1], rest[1])

    return euler(velocity, x), computed


@pytest.mark.parametrize(("threshold", "reuse"), [(0.08, 3), (0.1, 5), (0.28, 5)])
def test_bwcache(flux, threshold, reuse):
    v, steps = attached(flux, bwcache(10, T, threshold=threshold, reuse=reuse), flux_inputs())
    reference, computed = bwcache_by_hand(flux, threshold, reuse)
    assert steps == computed
    assert distance(v, reference) < 1e-5
    assert steps != bwcache_by_hand(flux, threshold, reuse, last_alone=True)[1]
    assert steps != bwcache_by_hand(flux, threshold, reuse, from_end=True)[1]
    assert steps != bwcache_by_hand(flux, threshold, reuse, periodic=True)[1]


def test_bwcache_ends_with_half_as_many_steps_as_it_began_with():
    """The first reuse is at step 10: of 30 steps the last 5 are computed."""
    schedule = bwcache(10, 30, threshold=0.15, reuse=3).schedule
    context, stream = SimpleNamespace(state=schedule.start(), keys=[]), torch.ones(())
    for context.step in range(30):
        stream = stream * (1.5 if context.step < 10 else 1.01)
        if schedule.decide(context, None, (), {}):
            context.keys.append(context.step)
            schedule.learn(context, 0, stream)
    assert context.keys == [*range(11), 14, 18, 22, *range(25, 30)]


@given(
    st.integers(8, 60), st.integers(1, 5), st.integers(0, 4), st.integers(1, 12), st.lists(st.booleans(), min_size=60)
)
def test_speca_computes_the_step_after_a_failed_forecast(steps, warmup, shortest, longest, fails):
    schedule = speca(8, steps, threshold=1.0, decay=1.0, shortest=shortest, longest=longest, warmup=warmup).schedule
    context, failed = SimpleNamespace(state=schedule.start(), keys=[]), []
    for context.step in range(steps):
        if schedule.decide(context, None, (), {}):
            context.keys.append(context.step)
        elif schedule.verifies(context):
            draft = torch.tensor([3.0 if fails[context.step] else 1.0])
            schedule.verify(context, draft, torch.ones(1))
            failed += [context.step] * fails[context.step]
    computed = context.keys
    assert computed[: (warmup + 1) // 2] == list(range(0, warmup, 2))
    for key, following in zip(computed, [*computed[1:], steps]):
        stop = min([step for step in failed if step > key], default=steps) + 1
        assert following == (key + 2 if key + 2 < warmup else min(max(stop, warmup), key + longest + 1, steps))
        assert all(step > key + max(shortest, 1) for step in failed if key < step < following)


def test_a_change_that_is_no_number_is_computed(monkeypatch):
    """A forecast that has overflowed would else pass its verification, and a step whose change is 0 / 0 put off all
    that follow."""
    schedule = speca(8, 20, threshold=1.0).schedule
    context = SimpleNamespace(state=schedule.start(), keys=[0], step=3)
    for context.step in (3, 4):  # the second forecast is verified
        assert not schedule.decide(context, None, (), {})
    schedule.verify(context, torch.tensor([torch.inf]), torch.tensor([torch.inf]))
    context.step = 5
    assert schedule.decide(context, None, (), {})

    schedule = teacache(8, 20, threshold=0.5, polynomial=[1.0, 0.0]).schedule
    context, inputs = SimpleNamespace(state=schedule.start(), keys=[]), [0.0, 0.0, 1.0, 1.1, 1.2, 2.0]
    monkeypatch.setattr("baselines.teacache.modulated_input", lambda *_: torch.tensor(inputs[context.step]))
    for context.step in range(len(inputs)):
        if schedule.decide(context, None, (), {}):
            context.keys.append(context.step)
    assert context.keys == [0, 1, 2, 5]


ONLINE = {
    "dicache": lambda **settings: dicache(8, 20, **{"threshold": 0.3, "retention": 0.1} | settings),
    "speca": lambda **settings: speca(8, 20, **{"threshold": 0.3} | settings),
    "easycache": lambda **settings: easycache(8, 20, **{"threshold": 0.2, "warmup": 2} | settings),
    "bwcache": lambda **settings: bwcache(8, 20, **{"threshold": 0.2} | settings),
}


def test_dicache_spends_its_probe(any_rollout):
    spent, computed = spent_by_flops(any_rollout, ONLINE["dicache"](probe=2))
    assert computed < spent < 20


def test_speca_spends_its_verification(any_rollout):
    spent, computed = spent_by_flops(any_rollout, ONLINE["speca"]())
    assert computed < spent < 20


def spent_by_flops(rollout, method):
    """What a second generation spends, in full steps and as the method itself says, and its computed steps."""
    rollout.steps = 20
    with dpcache.cached(rollout.model, method):
        rollout()
        calls = timing.flops([rollout.model], rollout)[1]
        report = dpcache.report(rollout.model)
    first, spent = report.spent["default"]
    assert first == pytest.approx(spent, rel=1e-6) and spent == pytest.approx(sum(calls) / max(calls), rel=1e-6)
    return spent, len(report.computed["default"])


def alone_each(rollout) -> tuple[dict, dict]:
    """What each branch makes in a generation of its own, and its computed steps."""
    alone, computed = {}, {}
    for name in ("cond", "uncond"):
        alone |= rollout.branches([name], pooled=9.0)
        computed[name] = dpcache.report(rollout.model).computed[name]
    return alone, computed


@pytest.mark.parametrize("name", ["dicache", "speca", "bwcache"])
def test_guidance_branches_decide_for_themselves(rollout, name):
    rollout.steps = 20
    with dpcache.cached(rollout.model, ONLINE[name]()):
        alone, computed = alone_each(rollout)
        together = rollout.branches(["cond", "uncond"], pooled=9.0)
        assert dpcache.report(rollout.model).computed == computed
    assert all(torch.equal(together[name], alone[name]) for name in alone)


def test_easycache_lets_the_first_guidance_branch_decide(rollout):
    rollout.steps = 20
    with dpcache.cached(rollout.model, ONLINE["easycache"]()):
        alone, computed = alone_each(rollout)
        for first, second in [("cond", "uncond"), ("uncond", "cond")]:
            together = rollout.branches([first, second], pooled=9.0)
            assert dpcache.report(rollout.model).computed == dict.fromkeys(computed, computed[first])
            assert torch.equal(together[first], alone[first]) and not torch.equal(together[second], alone[second])
    assert computed["cond"] != computed["uncond"]


@torch.no_grad()
def test_easycache_forgets_a_generation_that_broke_off(rollout):
    rollout.steps = 20
    with dpcache.cached(rollout.model, ONLINE["easycache"]()):
        expected = rollout.branches(["cond", "uncond"], pooled=9.0)
    method = ONLINE["easycache"]()
    with dpcache.cached(rollout.model, method), rollout.model.cache_context("cond"):
        rollout.model(rollout.start, timestep=torch.ones(2), **rollout.fixed)
    with dpcache.cached(rollout.model, method):
        again = rollout.branches(["cond", "uncond"], pooled=9.0)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ONLINE)
def test_samplers_may_work_in_place(rollout, name):
    rollout.steps = 20
    with dpcache.cached(rollout.model, ONLINE[name]()):
        expected, x = rollout(), rollout.start.clone()
        for step in range(20):
            time = torch.full((2,), 1 - step / 20)
            x -= rollout.model(x, timestep=time, return_dict=False, **rollout.fixed)[0] / 20
    assert torch.equal(x, expected)


@pytest.mark.parametrize("name", ONLINE)
def test_a_model_at_rest_stays_there(rollout, name):
    """Nothing changes, so every ratio of changes is 0 / 0."""
    loop, outputs = Loop(rollout.model, 20), []
    with dpcache.cached(loop, ONLINE[name]()), torch.no_grad():
        for _ in range(20):
            call = {"timestep": torch.ones(2), "return_dict": False, **rollout.fixed}
            outputs.append(rollout.model(rollout.start, **call)[0])
            loop.step()
    assert all(torch.allclose(output, outputs[0], atol=1e-5) for output in outputs)


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    low, high = Rollout("flux", 20, dtype), Rollout("flux", 20)
    with dpcache.cached(low.model, ONLINE[name]()):
        out, computed = low(), dpcache.report(low.model).computed["default"]
    expected = high()
    assert out.dtype == dtype and 1 < len(computed) < 20
    assert (out.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dicache(5, 50, retention=0.1), "budget=5: retention=0.1 and the last step take 7 steps"),
        (lambda: dicache(1, 50), "budget=1 must be between 2"),
        (lambda: dicache(5, 50, probe=0), "probe=0 must be at least 1"),
        (lambda: speca(5, 50, warmup=11), "warmup=11 must be between 1 and twice budget=5"),
        (lambda: speca(5, 50, warmup=0), "warmup=0 must be between 1 and"),
        (lambda: easycache(5, 50, warmup=5), "budget=5: warmup=5 and the last step take 6 steps"),
        (lambda: easycache(5, 50, warmup=6), "budget=5 must be between warmup=6"),
        (lambda: easycache(5, 50, warmup=1), "warmup=1 must be at least 2"),
        (lambda: bwcache(51, 50), "budget=51 must be between 2"),
    ],
)
def test_settings_that_cannot_be_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_models_that_cannot_be_are_named(rollout):
    with pytest.raises(ValueError, match="a probe of 5 blocks leaves nothing of FluxTransformer2DModel's 5"):
        dpcache.enable(rollout.model, ONLINE["dicache"](probe=5))
    for name, make in ONLINE.items():
        with pytest.raises(ValueError, match=r"Search is not built yet: call its build\(pipe, calibration\)"):
            dpcache.enable(rollout.model, make(threshold=None))
        assert make(threshold=None).statistics == () and make().statistics is None, name


def test_a_prediction_of_another_shape_has_no_residual(rollout):
    rollout.model.proj_out = torch.nn.Linear(32, 16)
    before = snapshot(rollout.model)
    with dpcache.cached(rollout.model, ONLINE["easycache"]()), pytest.raises(ValueError, match="has another shape"):
        rollout()
    assert snapshot(rollout.model) == before


@pytest.mark.parametrize(
    ("make", "budget"), [(dicache, 5), (partial(speca, shortest=1), 4), (easycache, 5), (bwcache, 4)]
)
def test_the_threshold_spends_the_budget(pipe, make, budget):
    calibration = dpcache.calibrate(pipe, ["red apple"], 10, (), **CALL)
    method = make(budget, 10).build(pipe, calibration)
    assert method.decided["threshold"] == method.schedule.threshold and abs(method.decided["spent"] - budget) <= 0.5
    _, report = calibration.rerun(pipe, method)
    assert report.spent["cond"] == [method.decided["spent"]]
