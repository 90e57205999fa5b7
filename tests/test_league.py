"""Planners, forecasters and learned weights of other papers: each core against brute force, an equation written out, or
numbers of its authors' code."""

import functools
import math
import random
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

import dpcache
from baselines import budcache, dmd, gits, l2p, lemica, meancache, oss
from baselines.freqca import Bands, freqca, low_cosines, low_frequencies
from baselines.hicache import hicache
from baselines.resilphase import PhaseAxis
from baselines.sencache import LatentsBeside, Sensitivities, SensitivityBound, rms
from baselines.trajectory import answers, follow, recorded
from baselines.uniform_skip import uniform_skip
from dpcache import storage
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.schedules import Schedule
from helpers.by_hand import attached, distance, euler, flux_end, flux_inputs, flux_stack, flux_start
from helpers.cases import T, case
from helpers.tracing import watched

GRID = [0, 1, 3, 4, 6]


def paths(last: int, moves: int):
    """All ways from 0 to `last` in so many moves."""
    return [(0, *between, last) for between in combinations(range(1, last), moves - 1)]


# The sampler's trajectory


@functools.cache
def followed(kind: str):
    one = case(kind)
    return follow(one.pipe, one.family.prompts[:2], (0, 1), T, **one.family.call)


@pytest.mark.parametrize("kind", ["flux", "dit_ddim", "sd3"])
def test_a_trajectory_is_made_of_euler_steps_and_ends_at_the_pipelines_latents(kind):
    run = followed(kind)
    lengths = (run.times[1:] - run.times[:-1]).float().view(-1, *[1] * (run.states.ndim - 1))
    assert distance(run.states[:-1] + lengths * run.slopes, run.states[1:]) < 1e-5
    assert distance(run.states[-1] * run.scales[-1].float(), case(kind).reference) < 1e-6


def test_coordinates_of_noise_predictions_are_those_of_edm():
    run, scheduler = followed("dit_ddim"), case("dit_ddim").pipe.scheduler
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].double()
    noise = (1 / alphas - 1).sqrt()
    torch.testing.assert_close(run.scales[:-1], (alphas / alphas[0]).sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        (run.times[:-1] - run.times[-1]) / run.times[-1].abs(), noise / noise[0], rtol=1e-3, atol=1e-3
    )


def test_a_held_prediction_is_the_schedulers_own_long_step():
    """FLUX's pipeline takes a grid of one's own."""
    family = case("flux")
    sigmas = np.linspace(1, 1 / T, T)[GRID].tolist()
    expected = family.latents(steps=len(GRID), sigmas=sigmas)
    latents, report = family.run(Method(Schedule(GRID, T), "output", Reuse()))
    assert distance(latents, expected) < 1e-5 and list(report.computed.values()) == [GRID]


@pytest.mark.parametrize("kind", ["flux", "dit_ddim", "wan21_t2v"])
def test_the_model_answers_at_the_states_that_it_is_given(kind):
    one, which = case(kind), {"prompts": case(kind).family.prompts[:2], "seeds": (0, 1)}
    run = recorded(one.pipe, num_inference_steps=T, **which, **one.family.call)
    assert distance(run.states[-1], one.reference) < 1e-6
    assert run.timesteps == one.pipe.scheduler.timesteps.tolist()
    ask = functools.partial(answers, one.pipe, **which, **one.family.call)
    assert distance(ask(states=run.states[:-1]), run.slopes) < 1e-5
    moved = run.states[:-1].clone()
    moved[3] += 0.3
    slopes = ask(states=moved)
    assert distance(slopes[3], run.slopes[3]) > 1e-3
    assert distance(slopes[[0, 1, 2, 4, 5, 6, 7]], run.slopes[[0, 1, 2, 4, 5, 6, 7]]) < 1e-5
    assert not watched(one.pipe.scheduler)


def test_a_sampler_that_draws_noise_has_no_grid_to_plan():
    one = case("dit_ddpm")
    with pytest.raises(SettingError, match="DDPMScheduler, as it is configured"):
        follow(one.pipe, one.family.prompts[:2], (0, 1), T, **one.family.call)
    assert not watched(one.pipe.scheduler)


# OSS


def bent_model(steps: int, seed: int):
    """A velocity field with a T-step run of three samples: states, times, and the model as OSS asks for it."""
    weights = 2 * torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def velocity(x, step):
        return torch.tanh(x @ weights * float(times[step])) + x * math.sin(7 * float(times[step]))

    states = [torch.randn(3, 5, generator=torch.Generator().manual_seed(seed + 1))]
    for step in range(steps):
        states.append(states[-1] + velocity(states[-1], step) * float(times[step + 1] - times[step]))
    return torch.stack(states), times, velocity


def asked(velocity, steps: int):
    """The model as OSS asks for it."""
    return lambda states: torch.stack([velocity(states[step], step) for step in range(steps)])


@pytest.mark.parametrize("seed", range(3))
def test_oss_finds_the_best_grid_of_two_steps(seed):
    states, times, velocity = bent_model(12, seed)
    found = oss.optimal_steps(states, velocity(states[0], 0), times, asked(velocity, 12), 2)
    for sample, steps in enumerate(found):

        def error(between, sample=sample):
            x = states[0, sample : sample + 1]
            for a, b in pairwise(dict.fromkeys((0, between, 12))):
                x = x + velocity(x, a) * float(times[b] - times[a])
            return float((x - states[12, sample]).square().mean())

        assert steps.tolist() == [0, min(range(12), key=error)]


def test_oss_with_all_steps_ends_where_the_run_does():
    states, times, velocity = bent_model(6, 0)
    found = oss.optimal_steps(states, velocity(states[0], 0), times, asked(velocity, 6), 6)
    assert found.tolist() == [list(range(6))] * 3


def test_the_median_of_grids_counts_back_from_the_end():
    grids = np.array([[0, 3, 5], [0, 4, 8], [0, 1, 9]])
    assert oss.median(grids[:1], 10) == [0, 3, 5]
    assert oss.median(grids[:2], 10) == [0, 4, 7]  # half of 13 and 7 steps that are left: 6 and 3
    assert oss.median(grids, 10) == [0, 4, 9]


# GITS


@pytest.mark.parametrize("coefficient", [1.0, 1.15, 0.8])
def test_gits_finds_the_cheapest_of_all_paths(coefficient):
    cost = np.random.default_rng(0).random((10, 10))
    for moves in (1, 2, 4, 9):

        def total(path):
            return sum(coefficient**n * cost[edge] for n, edge in enumerate(pairwise(path)))

        assert [*gits.cheapest(cost, moves, coefficient), 9] == list(min(paths(9, moves), key=total))


def test_gits_costs_of_long_steps():
    random_ = torch.Generator().manual_seed(0)
    slopes = torch.randn(4, 2, 3, 5, generator=random_)
    times = torch.tensor([3.0, 2.0, 1.5, 0.5, 0.0])
    lengths = (times[1:] - times[:-1]).view(-1, 1, 1, 1)
    states = torch.cat([torch.zeros(1, 2, 3, 5), (lengths * slopes).cumsum(0)])
    cost = gits.long_step_costs(states, slopes, times, "l2")
    end = states[1, 1] + (times[3] - times[1]) * slopes[1, 1]
    assert cost[1, 3, 1] == pytest.approx(float((end - states[3, 1]).norm()), rel=1e-6)
    one_step = np.arange(4), np.arange(1, 5)
    for metric in ("l1", "l2", "dev"):
        assert np.abs(gits.long_step_costs(states, slopes, times, metric)[one_step][:3]).max() < 1e-6
    point, first, last = torch.tensor([[[1.0, 5.0]]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[7.0, 2.0]])
    assert gits.deviation(point, first, last).item() == pytest.approx(3)


# L2P


def trajectories(count=3, steps=9, size=40):
    rng = np.random.default_rng(1)
    time = np.linspace(0, 1, steps)
    shapes = np.stack([np.ones(steps), time, time**2, np.sin(3 * time)], 1)
    return torch.from_numpy(shapes @ rng.standard_normal((count, 4, size)))


def test_l2p_trains_on_the_gram_matrix_what_it_would_train_on_the_features():
    x = trajectories()
    mask = torch.ones(9, 9, dtype=torch.float64).tril()
    weights = torch.eye(9, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.01)
    for _ in range(40):
        loss = ((weights * mask @ x)[:, :-1] - x[:, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    G = torch.einsum("nsd,ntd->st", x, x).numpy() / (3 * 40)
    np.testing.assert_allclose(l2p.train(G, updates=40), (weights * mask).detach().numpy(), atol=1e-9)


def test_l2p_builds_on_its_own_predictions():
    table = np.tril(np.random.default_rng(0).standard_normal((8, 8)))
    x, keys = np.random.default_rng(1).standard_normal(8), [0, 1, 4]
    filled = {}
    for step in range(8):
        before = np.array([filled[s] for s in range(step)])
        filled[step] = x[step] if step in keys else table[step - 1, :step] @ before
    predictor = l2p.Unrolled(table, 3)
    for step in (2, 3, 5, 7):
        used = [key for key in keys if key < step]
        assert np.dot(predictor.weights(used, step), x[used]) == pytest.approx(filled[step])


def test_l2p_weighs_no_step_of_another_model():
    G = trajectories()[0].numpy() @ trajectories()[0].numpy().T
    table = l2p.train(G, updates=40, switches=[3])
    assert not table[3:, :3].any() and table[:3, :3].all(1).sum() == 1
    apart = l2p.train(G[3:, 3:], updates=40)
    np.testing.assert_allclose(table[3:, 3:], apart, rtol=1e-5)  # as if the second model had been trained alone
    weights = l2p.Unrolled(table, 4).weights([3, 5], 7)
    assert weights == pytest.approx(l2p.Unrolled(apart, 4).weights([0, 2], 4), rel=1e-5)
    with pytest.raises(dpcache.SettingError, match="step 6 weighs steps before 4, where another model takes over"):
        l2p.Unrolled(table, 4).weights([4, 5], 6)


def test_meancache_takes_no_mean_over_steps_of_another_model():
    times = np.linspace(1, 0, 9) ** 2
    whole, later = (meancache.Averages(tuple(part), {key: 4 for key in range(9)}, 5) for part in (times, times[3:]))
    for keys, step in (([3], 5), ([3, 5], 6), ([3, 4, 6], 7)):
        weights = whole.weights(keys, step)
        assert weights == later.weights([key - 3 for key in keys], step - 3) and sum(weights) == pytest.approx(1)


def test_lists_of_steps_are_taken_as_they_are():
    assert l2p.L2P(7, 50).example.schedule.steps == [0, 1, 2, 4, 12, 24, 38]  # the authors'
    assert len(l2p.L2P(13, 50).example.schedule.steps) == 13
    steps = [0, 2, 5]
    assert l2p.L2P(3, 8, steps).example.schedule.steps == steps
    for make in (oss.oss, gits.gits, budcache.budcache, lemica.lemica):
        assert make(3, 8, steps=steps).schedule.steps == steps
    for make in (oss.oss, gits.gits, budcache.budcache, lemica.lemica, meancache.MeanCache, l2p.L2P):
        with pytest.raises(SettingError, match="steps has 3 entries: set budget=3, not 4"):
            make(4, 8, steps=steps)


# BudCache


def test_budcache_finds_the_best_steps_and_asks_once_for_each():
    asked = []

    def error(steps):
        asked.append(steps)
        return sum((step - best) ** 2 for step, best in zip(steps, (0, 1, 4, 7, 10, 11, 12, 19))) / 1000

    steps, least = budcache.search(error, 8, 20, random.Random(0))
    assert steps == (0, 1, 4, 7, 10, 11, 12, 19) and least == 0
    assert len(asked) == len(set(asked)) and all(found[:2] == (0, 1) and len(set(found)) == 8 for found in asked)


def test_budcache_takes_all_steps_where_the_budget_allows():
    assert budcache.search(lambda steps: 1.0, 4, 4, random.Random(0))[0] == (0, 1, 2, 3)


# LeMiCa


@pytest.mark.parametrize("seed", range(4))
def test_lemica_finds_the_lexicographic_minimax_path(seed):
    errors = np.random.default_rng(seed).integers(0, 4, (9, 9)).astype(float)  # many ties
    errors[np.subtract.outer(np.arange(9), np.arange(9)) < -5] = np.inf
    for count in (3, 5, 9):
        words = {p: sorted((errors[edge] for edge in pairwise(p)), reverse=True) for p in paths(8, count - 1)}
        found = tuple(lemica.minimax_path(errors, count))
        assert words[found] == min(words.values())


def test_edges_reach_eight_steps_or_as_far_as_they_have_to():
    assert [lemica.longest_edge(budget, 50, None) for budget in (5, 9, 17)] == [16, 8, 8]
    assert lemica.longest_edge(9, 50, 12) == 12
    with pytest.raises(SettingError, match="max_jump=6: budget=9 takes jumps of at least 7"):
        lemica.longest_edge(9, 50, 6)
    with pytest.raises(SettingError, match="budget=1 must be at least 2"):
        meancache.MeanCache(1, 50)


@pytest.mark.parametrize("make", [oss.oss, gits.gits, l2p.L2P, budcache.budcache, lemica.lemica, meancache.MeanCache])
def test_a_budget_out_of_range_is_refused(make):
    for budget in (0, 51):
        with pytest.raises(SettingError, match=f"budget={budget} must be between 1 and num_inference_steps=50"):
            make(budget, 50)


# MeanCache


def test_meancache_predicts_by_the_sampler_states():
    """As the authors have it: the mean prediction over some steps is how far the sampler went in them."""
    times = (np.linspace(1, 0, 13) ** 1.5).tolist()
    keys, spans = [0, 1, 2, 5, 9], {2: 3, 5: 1, 9: 6}
    computed, x, v, known = dict(zip(keys, np.random.default_rng(0).standard_normal((5, 4)))), [np.zeros(4)], [], []
    predictor = meancache.Averages(tuple(times), spans, 5)
    for step in range(12):
        if step in computed:
            known.append(step)
            v.append(computed[step])
        else:
            first = max(step - spans[known[-1]], 0)
            mean = (x[step] - x[first]) / (times[step] - times[first])
            slope = (v[first] - mean) / (times[step] - times[first])
            v.append(v[-1] - slope * (times[step + 1] - times[step]))
            weights = predictor.weights(known, step)
            np.testing.assert_allclose(sum(w * computed[k] for w, k in zip(weights, known)), v[-1], atol=1e-12)
        x.append(x[-1] + (times[step + 1] - times[step]) * v[-1])


def test_meancache_weighs_what_the_mean_prediction_misses():
    times = torch.linspace(1, 0, 7, dtype=torch.float64)
    slopes = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes[:3] = slopes[0]  # steady so far
    states = torch.cat([torch.zeros(1, 2, 5), (slopes * (times[1:] - times[:-1]).view(-1, 1, 1)).cumsum(0)])
    weights = meancache.edge_weights(states, slopes, times.tolist(), [1, 2])
    assert np.abs(weights[:, 0, 1:4]).max() < 1e-12  # nothing moves up to step 3, and step 3 itself is computed
    expected = (slopes[3:5].mean(0) - slopes[3]).abs().mean(-1)  # reuse of step 3 in step 4
    np.testing.assert_allclose(weights[0, 3, 5], expected)


def test_meancache_chooses_a_span_for_what_a_given_list_leaves_in_the_end():
    errors = np.random.default_rng(0).random((3, 6, 6))
    made = meancache.MeanCache(3, 6, spans=(1, 2, 4), steps=[0, 1, 3])
    method = made.fit(None, dict(zip(made.statistics, (errors, np.linspace(1, 0, 7)))))
    edges = [(0, 1), (1, 3), (3, 5)]
    assert method.predictor.spans == {i: (1, 2, 4)[int(errors[:, i, j].argmin())] for i, j in edges}
    assert method.schedule.steps == [0, 1, 3]


# ResilPhase


@pytest.mark.parametrize(
    ("mapping", "keys", "step", "weights"),
    [  # of the authors' code
        ("balanced", (0, 8), 11, [-0.244615, 1.244615]),
        ("balanced", (0, 8, 15), 20, [0.300849, -1.138837, 1.837987]),
        ("chebyshev", (0, 1, 5, 9, 13), 15, [0.190729, -0.604767, 1.135449, -1.909479, 2.188068]),
    ],
)
def test_resilphase_has_its_authors_weights(mapping, keys, step, weights):
    found = PhaseAxis(len(keys) - 1, mapping).weights(keys, step)
    np.testing.assert_allclose(found, weights, atol=2e-6)


def test_resilphase_goes_nowhere_in_the_end():
    """Far away the balanced axis ends."""
    axis = PhaseAxis(1)
    assert axis.weights((2, 8), 60) == pytest.approx(axis.weights((2, 8), 90), abs=1e-4)


# FreqCa


def test_bands_of_a_square_are_those_of_the_cosine_transform():
    x = torch.randn(2, 36, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    place = np.arange(6)
    low = torch.zeros_like(x)
    for f in range(6):
        for g in range(6):
            if math.hypot(f, g) <= 0.4 * math.hypot(5, 5):
                wave = np.outer(np.cos(math.pi * f * (place + 0.5) / 6), np.cos(math.pi * g * (place + 0.5) / 6))
                wave = torch.from_numpy(wave / np.linalg.norm(wave)).reshape(1, 36, 1)
                low += (x * wave).sum(1, keepdim=True) * wave
    torch.testing.assert_close(low_cosines(x, 0.4), low)


def test_bands_of_a_row_are_those_of_the_fourier_transform():
    x = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    place = torch.arange(10, dtype=torch.float64)
    low = x.mean(1, keepdim=True).expand_as(x).clone()
    for wave in (torch.cos, torch.sin):  # frequency 1 of at most 5
        wave = wave(2 * math.pi * place / 10).view(1, -1, 1)
        low += (x * wave).sum(1, keepdim=True) * wave / 5
    torch.testing.assert_close(low_frequencies(x, 0.25), low)


def test_freqca_is_hicache_where_both_bands_are_treated_alike_and_reuse_where_all_is_low(flux):
    inputs = flux_inputs()
    with torch.no_grad():
        alike, steps = attached(flux, freqca(9, 50, low_order=2, transform="dct"), inputs)
        expected, computed = attached(flux, hicache(9, 50, scale=0.71, lite=True), inputs)
        assert steps == computed and distance(alike, expected) < 1e-5
        reused = attached(flux, freqca(9, 50, cutoff=1.0, warmup=1), inputs)[0]
        expected = attached(flux, Method(uniform_skip(9, 50).schedule, "stack", Reuse()), inputs)[0]
        assert distance(reused, expected) < 1e-5
        bands = [attached(flux, freqca(9, 50, transform=name, cutoff=0.5), inputs)[0] for name in (None, "dct", "fft")]
    assert distance(bands[0], bands[1]) < 1e-6 and distance(bands[0], bands[2]) > 1e-3 < distance(bands[0], alike)


def test_a_cosine_transform_takes_a_square():
    with pytest.raises(SettingError, match="12 tokens are not a square"):
        Bands(transform="dct").split(torch.zeros(1, 12, 2))
    assert Bands().split(torch.ones(1, 12, 2)).shape == (2, 1, 12, 2)


# SenCache


def test_sencache_skips_while_the_expected_change_is_small(flux):
    """By hand: the model is told what to do, and reuses what its blocks add."""
    rng, (x, condition) = np.random.default_rng(0), flux_inputs()
    table = np.stack([0.5 + rng.random(50), 0.02 * rng.random(50), 1000 * (1 - np.arange(50) / 50)])
    method = Method(SensitivityBound(50, table, 0.9, 0.3, 4), LatentsBeside(), Reuse())
    computed, kept, trail = [], None, []

    def velocity(latents, step):
        nonlocal kept
        if computed:
            last = computed[-1]
            moved = float((latents - trail[last]).square().mean().sqrt())
            change = table[0, last] * moved + table[1, last] * (table[2, last] - table[2, step])
            skip = change < (0.27 if step < 10 else 0.9) and step - last <= 4
        trail.append(latents)
        h, text, c, rope = flux_start(flux, latents, step, **condition)
        if not computed or not skip:
            computed.append(step)
            kept = flux_stack(flux, h, text, c, rope) - h
        return flux_end(flux, h + kept, c)

    with torch.no_grad():
        expected = euler(velocity, x)
        v, steps = attached(flux, method, (x, condition))
    assert steps == computed and 10 < len(steps) < 40 and max(b - a for a, b in pairwise(steps)) == 5
    assert distance(v, expected) < 1e-5


def test_sensitivities_are_differences_to_the_next_step():
    one, prompts = case("flux"), case("flux").family.prompts[:2]
    calibration = dpcache.calibrate(one.pipe, prompts, T, (), batch_size=2, **one.family.call)
    table = Sensitivities(2).measure(one.pipe, calibration)
    run = recorded(one.pipe, prompts, (0, 1), T, **one.family.call)
    moved = run.states[:-1].clone()
    moved[3] = run.states[4]
    change = answers(one.pipe, moved, prompts, (0, 1), **one.family.call)[3] - run.slopes[3]
    expected = (rms(change[None]) / rms((run.states[4] - run.states[3])[None])).mean()
    assert table.shape == (3, T) and table[0, 3] == pytest.approx(float(expected), rel=1e-3)
    moved = run.states[:-1].clone()
    moved[4] = run.states[3]
    change = answers(one.pipe, moved, prompts, (0, 1), **one.family.call)[4] - run.slopes[3]
    gap = run.timesteps[3] - run.timesteps[4]
    assert table[1, 3] == pytest.approx(float(rms(change[None]).mean()) / gap, rel=1e-3)
    assert table[2].tolist() == run.timesteps and calibration.reran == 6


# DMD


def test_dynamic_modes_continue_exponentials_between_gaps():
    rng = np.random.default_rng(0)
    shapes = rng.standard_normal((3, 20))

    def feature(time):
        return np.array([0.9**time, math.cos(0.4 * time), math.sin(0.4 * time)]) @ shapes

    features = np.stack([feature(2 * n) for n in range(5)])
    fit = dmd.modal_fit(features @ features.T)
    for gaps in (0.5, 1, 1.5):
        np.testing.assert_allclose(fit.weights(gaps) @ features, feature(8 + 2 * gaps), atol=1e-5)


def test_dynamic_modes_of_nothing_are_nothing():
    assert np.isfinite(dmd.modal_fit(np.zeros((4, 4))).weights(0.5)).all()


@pytest.mark.parametrize(("budget", "steps"), [(9, 50), (13, 50), (17, 50), (5, 8), (20, 50), (3, 50), (8, 8)])
def test_gaps_are_equal_to_the_end(budget, steps):
    found = dmd.equal_gaps(budget, steps, 3)
    assert len(found) == budget and found[:3] == [0, 1, 2]
    gaps = [b - a for a, b in pairwise([*found, steps])]
    first = next((n for n, gap in enumerate(gaps) if gap > 1), len(gaps))
    assert len(set(gaps[first + 1 :])) <= 1


def test_dynamic_modes_are_each_samples_own(flux):
    """And they are not the line that stands in for them."""
    method, (x, condition) = dmd.dmd(13, 50), flux_inputs()
    other = torch.cat([x[:1], torch.randn(1, *x.shape[1:], generator=torch.Generator().manual_seed(5))])
    with torch.no_grad():
        both, steps = attached(flux, method, (x, condition))
        line = attached(flux, Method(Schedule(steps, 50), "residual", dmd.Line(6)), (x, condition))[0]
        beside = attached(flux, method, (other, condition))[0]
    assert distance(both[:, :1], beside[:, :1]) < 1e-4 < 1e-3 < distance(both[:, 1:], beside[:, 1:])
    assert distance(both, line) > 1e-4


# Files


@pytest.mark.parametrize("name", ["oss", "gits", "l2p", "meancache", "freqca", "resilphase", "dmd", "sencache"])
def test_a_method_from_its_file_makes_the_same(name, tmp_path):
    one = case("flux")
    method = one.method(name)
    storage.save({5: method}, tmp_path / "method.safetensors")
    loaded = dpcache.Method.load(tmp_path / "method.safetensors")
    assert type(loaded.site) is type(method.site) and loaded.decided == method.decided
    assert torch.equal(one.run(loaded)[0], one.run(method)[0])
