"""Each method's defining equations, written out by hand on small random models, against the attached method.

The references know nothing of hooks, sites or predictors: they call the models' layers themselves. Each also runs with
its rule bent a little, which has to show.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from baselines.foca import foca
from baselines.fora import fora
from baselines.hyca import SOLVERS, HyCa
from baselines.spectrum import spectrum
from baselines.taylorseer import taylorseer
from baselines.teacache import teacache
from baselines.zeus import zeus
from dpcache.planned import dpcache as planned
from dpcache.predictors import Multistep
from helpers.by_hand import (
    EVERYTHING,
    Kept,
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
    sigma,
)

FLUX_POLYNOMIAL = [498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861]


pytestmark = pytest.mark.usefixtures("no_grad")


def test_references_are_the_models(flux, dit):
    x, condition = flux_inputs()
    h, text, c, rope = flux_start(flux, x, 20, **condition)
    v = flux(x, timestep=sigma(20), **condition, return_dict=False)[0]
    torch.testing.assert_close(flux_end(flux, flux_stack(flux, h, text, c, rope), c), v)
    x, condition = dit_inputs()
    v = dit(x, timestep=1000 * sigma(20), **condition).sample
    torch.testing.assert_close(dit_by_hand(dit, x, 20, **condition, kept=EVERYTHING), v)


def teacache_by_hand(model, threshold, polynomial, since_computed=False):
    """`since_computed` bends the rule: the change is taken against the last computed step's probe."""
    x, condition = flux_inputs()
    previous, accumulated, residual, computed = None, 0.0, None, []

    def velocity(x, step):
        nonlocal previous, accumulated, residual
        h, text, c, rope = flux_start(model, x, step, **condition)
        probe = model.transformer_blocks[0].norm1(h, emb=c)[0]
        if previous is not None:
            change = (probe - previous).abs().mean() / previous.abs().mean()
            accumulated += sum(a * change.item() ** n for n, a in enumerate(reversed(polynomial)))
        if step in (0, T - 1) or accumulated >= threshold:
            accumulated, residual = 0.0, flux_stack(model, h, text, c, rope) - h
            computed.append(step)
            previous = probe
        elif not since_computed:
            previous = probe
        return flux_end(model, h + residual, c)

    return euler(velocity, x), computed


@pytest.mark.parametrize(
    ("threshold", "polynomial"), [(0.5, FLUX_POLYNOMIAL), (0.8, FLUX_POLYNOMIAL), (0.15, [1.0, 0.0]), (0.4, [1.0, 0.0])]
)
def test_teacache(flux, threshold, polynomial):
    v, steps = attached(flux, teacache(10, T, threshold=threshold, polynomial=polynomial), flux_inputs())
    reference, computed = teacache_by_hand(flux, threshold, polynomial)
    assert 5 < len(steps) < 40 and steps == computed
    assert distance(v, reference) < 1e-5
    assert distance(v, teacache_by_hand(flux, 1.3 * threshold, polynomial)[0]) > 1e-2
    if polynomial == [1.0, 0.0]:
        assert steps != teacache_by_hand(flux, threshold, polynomial, since_computed=True)[1]


def taylorseer_by_hand(model, interval, order, warmup, **rule):
    """Computed: the warm-up, then every `interval`-th step after its last."""
    x, condition = flux_inputs()
    steps = [s for s in range(T) if s < warmup or (s - warmup + 1) % interval == 0]
    kept = Kept(steps, order, **{"start": warmup - 2} | rule)

    def velocity(x, step):
        kept.step = step
        h, text, c, rope = flux_start(model, x, step, **condition)
        return flux_end(model, flux_stack(model, h, text, c, rope, kept), c)

    return euler(velocity, x), steps


@pytest.mark.parametrize(
    ("interval", "order"), [(6, 2), pytest.param(5, 1, marks=pytest.mark.ci), pytest.param(4, 3, marks=pytest.mark.ci)]
)
def test_taylorseer(flux, interval, order):
    reference, computed = taylorseer_by_hand(flux, interval, order, 3)
    method = taylorseer(len(computed), T, order=order, warmup=3, interval=interval)
    v, steps = attached(flux, method, flux_inputs())
    assert steps == computed
    assert distance(v, reference) < 1e-5
    assert distance(v, taylorseer_by_hand(flux, interval, order - 1, 3)[0]) > 1e-2
    assert distance(v, taylorseer_by_hand(flux, interval + 1, order, 3)[0]) > 1e-2
    assert distance(v, taylorseer_by_hand(flux, interval, order, 3, after_gate=True)[0]) > 1e-2
    if order > 1:
        assert distance(v, taylorseer_by_hand(flux, interval, order, 3, start=0)[0]) > 1e-3


def fora_by_hand(model, interval, shift=0, **rule):
    """Computed: the first step, and every `interval`-th counted back from the last."""
    x, condition = dit_inputs()
    steps = [s for s in range(T) if s == 0 or (T - 1 - s + shift) % interval == 0]
    kept = Kept(steps, 0, **rule)

    def velocity(x, step):
        kept.step = step
        return dit_by_hand(model, x, step, **condition, kept=kept)

    return euler(velocity, x), steps


@pytest.mark.parametrize("interval", [3, 5])
def test_fora(dit, interval):
    reference, computed = fora_by_hand(dit, interval)
    v, steps = attached(dit, fora(len(computed), T, interval=interval), dit_inputs(), time=1000)
    assert steps == computed
    assert distance(v, reference) < 1e-5
    assert distance(v, fora_by_hand(dit, interval, shift=1)[0]) > 1e-2
    assert distance(v, fora_by_hand(dit, interval, after_gate=True)[0]) > 1e-2


def dpcache_by_hand(model, steps, order, warmup, **rule):
    """The last block's output alone is kept and predicted; the output layers always run."""
    x, condition = flux_inputs()
    kept = Kept(steps, order, **{"start": warmup - 2} | rule)

    def velocity(x, step):
        kept.step = step
        h, text, c, rope = flux_start(model, x, step, **condition)
        h = kept.fill("last block", flux_stack(model, h, text, c, rope) if kept.computing else None)
        return flux_end(model, h, c)

    return euler(velocity, x)


@pytest.mark.parametrize("plan", [[0, 1, 2, 5, 9, 14, 21, 28, 38], [0, 1, 2, 4, 7, 10, 14, 19, 23, 28, 34, 40, 45]])
@pytest.mark.parametrize(("order", "warmup"), [(1, 3), (2, 2), (2, 3)])
def test_dpcache(flux, plan, order, warmup):
    method = planned(len(plan), T, warmup=warmup, order=order, steps=plan)
    v, steps = attached(flux, method, flux_inputs())
    assert steps == plan
    assert distance(v, dpcache_by_hand(flux, plan, order, warmup)) < 1e-5
    assert distance(v, dpcache_by_hand(flux, plan, 3 - order, warmup)) > 1e-2
    assert distance(v, dpcache_by_hand(flux, [s + (s == 28) for s in plan], order, warmup)) > 1e-2
    if (order, warmup) == (2, 3):
        assert distance(v, dpcache_by_hand(flux, plan, order, warmup, start=0)) > 1e-3


class KeptAll(Kept):
    """Every feature that was computed, and a rule that predicts from them: `rule(features, keys, step)`."""

    def __init__(self, steps, rule):
        super().__init__(steps, 0)
        self.rule, self.features = rule, {}

    def fill(self, name, feature=None):
        if not self.computing:
            return self.rule(self.features[name], [s for s in self.steps if s < self.step], self.step)
        self.features.setdefault(name, []).append(feature)
        return feature


def predicted_by_hand(model, steps, rule, site):
    x, condition = flux_inputs()
    kept = KeptAll(steps, rule)

    def velocity(x, step):
        kept.step = step
        h, text, c, rope = flux_start(model, x, step, **condition)
        if site == "modules":
            h = flux_stack(model, h, text, c, rope, kept)
        else:
            h = kept.fill("last block", flux_stack(model, h, text, c, rope) if kept.computing else None)
        return flux_end(model, h, c)

    return euler(velocity, x)


def foca_rule(F, keys, step, literal=True):
    """Eq. 6-8; bent, the calibration takes the newest slope for the one before."""
    h, slopes = step - keys[-1], [(F[i] - F[i - 1]) / (keys[i] - keys[i - 1]) for i in (-1, -2)]
    forecast = 4 / 3 * F[-1] - 1 / 3 * F[-2] + 2 * h / 3 * slopes[0]
    ahead = (3 * forecast - 4 * F[-1] + F[-2]) / (2 * h)
    return F[-1] + h / 2 * (slopes[literal] + ahead)


@pytest.mark.parametrize(("budget", "lite"), [(10, False), (8, True)])
def test_foca(flux, budget, lite):
    v, steps = attached(flux, foca(budget, T, lite=lite), flux_inputs())
    site = "stack" if lite else "modules"
    assert distance(v, predicted_by_hand(flux, steps, foca_rule, site)) < 1e-5
    assert distance(v, predicted_by_hand(flux, steps, lambda *a: foca_rule(*a, literal=False), site)) > 1e-2


def spectrum_rule(F, keys, step, degree=4):
    """Coefficients of the Chebyshev polynomials that minimize squared error + 0.1 squared norm; half of the prediction
    is theirs, half the line's through the last two keys."""
    basis = [[math.cos(m * math.acos(2 * t / T - 1)) for m in range(degree + 1)] for t in [*keys, step]]
    *X, x = torch.tensor(basis, dtype=torch.float64).unbind()
    X, H = torch.stack(X), torch.stack(F).flatten(1).double()
    inverse = torch.linalg.inv(X.T @ X + 0.1 * torch.eye(degree + 1))
    fit = (x @ inverse @ X.T @ H).float().view_as(F[0])
    return fit / 2 + (F[-1] + (F[-1] - F[-2]) * (step - keys[-1]) / (keys[-1] - keys[-2])) / 2


@pytest.mark.parametrize("budget", [8, 14])
def test_spectrum(flux, budget):
    v, steps = attached(flux, spectrum(budget, T), flux_inputs())
    assert distance(v, predicted_by_hand(flux, steps, spectrum_rule, "stack")) < 1e-5
    assert distance(v, predicted_by_hand(flux, steps, lambda *a: spectrum_rule(*a, degree=3), "stack")) > 1e-3


def zeus_by_hand(model, steps, interleaved=True):
    """As a state machine: at the first skipped step the extrapolation is stored, and used again at every other one.
    Bent, it is used at all of them."""
    x, condition = flux_inputs()
    computed, stored, skipped = [], None, 0

    def velocity(x, step):
        nonlocal stored, skipped
        if step in steps:
            computed.append(model(x, timestep=sigma(step), **condition, return_dict=False)[0])
            skipped = 0
            return computed[-1]
        skipped += 1
        if skipped == 1:
            stored = computed[-1] + (computed[-1] - computed[-2])
        return computed[-1] if interleaved and skipped % 2 == 0 else stored

    return euler(velocity, x)


@pytest.mark.parametrize("budget", [8, 20])
def test_zeus(flux, budget):
    v, steps = attached(flux, zeus(budget, T), flux_inputs())
    assert distance(v, zeus_by_hand(flux, steps)) < 1e-5
    assert budget == 20 or distance(v, zeus_by_hand(flux, steps, interleaved=False)) > 1e-2


def hyca_rule(F, keys, step, solvers):
    """One channel after the other, each by its solver on the slopes between keys."""
    latest, before = (F[-1] - F[-2]) / (keys[-1] - keys[-2]), (F[-2] - F[-3]) / (keys[-2] - keys[-3])
    channels = []
    for d, solver in enumerate(solvers):
        a, b = SOLVERS[solver]
        channels.append(F[-1][..., d] + (step - keys[-1]) * (a * latest[..., d] + b * before[..., d]))
    return torch.stack(channels, -1)


def test_hyca(flux):
    solvers = (list(SOLVERS) * 7)[:32]
    predictor = Multistep(*np.array([SOLVERS[solver] for solver in solvers]).T)
    method = replace(HyCa(9, T).example, predictor=predictor)
    v, steps = attached(flux, method, flux_inputs())
    assert distance(v, predicted_by_hand(flux, steps, lambda *a: hyca_rule(*a, solvers), "stack")) < 1e-5
    assert distance(v, predicted_by_hand(flux, steps, lambda *a: hyca_rule(*a, solvers[::-1]), "stack")) > 1e-2
