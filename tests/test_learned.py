"""Methods that are trained through the sampler: what they compute, against their equations written out, and the
gradients that train them."""

from functools import partial

import numpy as np
import pytest
import torch

import dpcache
from baselines.dyweight import DyWeight, WeightedSteps, dyweight, student
from baselines.fewer_steps import fewer_steps
from baselines.harmonica import EndOfSteps, HarmoniCa, Router, gradient, harmonica, highest, image_errors, modules_of
from baselines.trajectory import answers, recorded
from dpcache._diffusers import watching, with_gradients
from dpcache.errors import SettingError
from dpcache.sampler import generate
from helpers.cases import K, T, case
from helpers.tracing import state_of

# DyWeight

ROWS, SCALES = [[0.9], [-0.2, 1.1], [0.3, 0.65], [0.1, -0.3, 1.0]], [1.0, 0.9, 1.1, 0.8]
GIVEN = dyweight(4, T, weights=ROWS, scales=SCALES)


def seen_by(pipe, method, one):
    """Final latents of one sample, and of every step what the model was given and returned: latents, timestep,
    prediction."""
    calls = []

    def remember(model, args, kwargs, output):
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        calls.append((latents, kwargs["timestep"].double(), output[0]))

    handle = pipe.transformer.register_forward_hook(remember, with_kwargs=True)
    latents, _ = one.run(method, which=(0,))
    handle.remove()
    return latents, calls


def test_a_step_follows_weighted_predictions_to_the_grid_and_its_time_to_where_they_lead():
    one = case("flux")
    end, calls = seen_by(one.pipe, GIVEN, one)
    one.latents(which=(0,), steps=4)
    grid = one.pipe.scheduler.sigmas.double()  # which the method has left to the pipeline
    time, states = grid[0], [latents for latents, _, _ in calls] + [end]
    for step, (latents, told, _) in enumerate(calls):
        assert told.item() == pytest.approx(SCALES[step] * time.item(), rel=1e-5)
        latest = [prediction for _, _, prediction in calls[: step + 1]][-len(ROWS[step]) :]
        slope = sum(weight * prediction for weight, prediction in zip(ROWS[step], latest))
        expected = latents + (grid[step + 1] - time) * slope
        torch.testing.assert_close(states[step + 1], expected.float(), rtol=1e-5, atol=1e-5)
        time = time + (grid[step + 1] - time) * sum(ROWS[step])


def test_noise_predictions_are_followed_in_the_states_and_times_in_which_ddim_is_eulers_method():
    one = case("dit_ddim")
    end, calls = seen_by(one.pipe, GIVEN, one)
    scheduler = one.pipe.scheduler
    scheduler.set_timesteps(4)
    variance = lambda alpha: ((1 - alpha) / alpha).sqrt()  # noqa: E731
    table = variance(scheduler.alphas_cumprod.double())
    grid = [*table[scheduler.timesteps], variance(scheduler.final_alpha_cumprod.double())]
    time, scale = grid[0], one.family.call["guidance_scale"]
    states = [latents[:1] for latents, _, _ in calls] + [end]
    predictions = []
    for step, (latents, told, output) in enumerate(calls):
        at = np.interp(np.log(SCALES[step] * float(time)), np.log(table), np.arange(len(table)))
        assert told[0].item() == pytest.approx(at, rel=1e-5)
        cond, uncond = output[:, :4]
        predictions.append((uncond + scale * (cond - uncond))[None])
        latest = predictions[-len(ROWS[step]) :]
        slope = sum(weight * prediction for weight, prediction in zip(ROWS[step], latest))
        ahead = grid[step + 1] - time
        after = time + ahead * sum(ROWS[step])
        state = latents[:1] * (1 + time**2).sqrt() + ahead * slope
        expected = state / (1 + (grid[4] if step == 3 else after) ** 2).sqrt()
        torch.testing.assert_close(states[step + 1], expected.float(), rtol=1e-4, atol=1e-5)
        time = after


@pytest.mark.parametrize("kind", ["flux", "dit_ddim"])
def test_the_latest_prediction_alone_is_the_plain_solver(kind):
    one = case(kind)
    plain, _ = one.run(fewer_steps(4, T))
    euler = dyweight(4, T, weights=[[1.0]] * 4, scales=[1.0] * 4)
    torch.testing.assert_close(one.run(euler)[0], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["flux", "dit_ddim"])
def test_gradients_lead_through_the_pipeline_and_its_guidance(kind):
    """Against differences of two runs."""
    one = case(kind)
    pipe, aim = one.pipe, one.latents(which=(0,))
    before, flags = state_of(pipe.transformer), [p.requires_grad for p in pipe.transformer.parameters()]

    def loss(weights, scales):
        reached = student(pipe, (weights, scales, 2), one.family.prompts[:1], [0], **one.family.call)
        return (reached.double() - aim).square().mean()  # differences of two runs are small

    weights = torch.tensor([[1.0, 0, 0], [-0.1, 1, 0], [0, -0.1, 1]], dtype=torch.float64, requires_grad=True)
    scales = torch.tensor([0.97, 0.9, 0.95], dtype=torch.float64, requires_grad=True)
    with with_gradients(pipe):
        loss(weights, scales).backward()
    assert [p.requires_grad for p in pipe.transformer.parameters()] == flags
    assert state_of(pipe.transformer) == before and all(p.grad is None for p in pipe.transformer.parameters())
    for part, place in ((weights, (1, 0)), (weights, (2, 2)), (scales, 1)):
        values = []
        for move in (1e-4, -1e-4):
            moved = [weights.detach().clone(), scales.detach().clone()]
            moved[part is scales][place] += move
            values.append(float(loss(*moved)))
        slope = (values[0] - values[1]) / 2e-4
        assert float(part.grad[place]) == pytest.approx(slope, rel=0.05, abs=1e-4)


def test_training_comes_closer_to_the_t_step_run_and_says_what_it_took():
    one = case("flux")
    recipe = DyWeight(3, T, updates=4, rate=0.05)
    calibration = dpcache.calibrate(one.pipe, one.family.prompts[:1], T, recipe.statistics, **one.family.call)
    method = recipe.build(None, calibration)
    aim, plain = one.latents(which=(0,)), one.run(fewer_steps(3, T), which=(0,))[0]
    trained, report = one.run(method, which=(0,))
    assert (trained - aim).norm() < 0.95 * (plain - aim).norm()
    assert report.spent == {"cond": [3]}
    assert calibration.took(recipe.statistics) == 1 + 4 * 4 * 3 / T  # a way back counts as two, and one more way there
    again = dyweight(3, T, weights=method.decided["weights"], scales=method.decided["scales"])
    assert np.array_equal(again.weights, method.weights) and torch.equal(one.run(again, which=(0,))[0], trained)


def test_a_saved_solver_is_the_same(tmp_path):
    GIVEN.save(tmp_path / "method.safetensors")
    loaded = dpcache.Method.load(tmp_path / "method.safetensors")
    one = case("flux")
    assert isinstance(loaded, WeightedSteps)
    assert torch.equal(one.run(loaded, which=(0,))[0], one.run(GIVEN, which=(0,))[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dyweight(9, T), "budget=9 must be between"),
        (lambda: dyweight(4, T, window=0), "window=0"),
        (lambda: dyweight(4, T, start="heun"), "start=heun is not one of euler, adams"),
        (lambda: dyweight(3, T, weights=ROWS, scales=SCALES), "scales of 4: give both for budget=3"),
        (lambda: dyweight(4, T, weights=ROWS), "weights of 4 steps, scales of 0: give both"),
        (lambda: dyweight(4, T, weights=[[1.0, 1.0], *ROWS[1:]], scales=SCALES), "at step k up to k . 1 weights"),
        (lambda: dpcache.enable(case("flux").pipe.transformer, GIVEN), "needs a pipeline, whose scheduler it replaces"),
        (lambda: generate_with(case("flux"), steps=5), "the pipeline asks for 5 steps, but the weights are for 4"),
        (lambda: case("dit_ddpm").run(GIVEN), "DDPMScheduler, as it is configured, is not one of the schedulers"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(SettingError, match=message):
        make()


def generate_with(one, steps: int):
    with dpcache.cached(one.pipe, GIVEN):
        generate(one.pipe, one.family.prompts[:1], [0], steps, decode=False, **one.family.call)


# HarmoniCa


def router(one, scores: torch.Tensor, threshold: float = 0.5) -> Router:
    return Router(one.pipe.transformer, modules_of(one.pipe.transformer), scores, threshold)


def routed(one, scores: torch.Tensor):
    """States and predictions of one sample with outputs that are mixed."""
    mixing = router(one, scores)
    with mixing.at_work(), watching(one.pipe.scheduler, EndOfSteps(mixing.end_step)):
        return recorded(one.pipe, one.family.prompts[:1], [0], len(scores), **one.family.call)


def random_scores(one, steps: int = T) -> torch.Tensor:
    scores = torch.rand(steps, len(modules_of(one.pipe.transformer)), generator=torch.Generator().manual_seed(0))
    scores[0] = 1
    return scores


@pytest.mark.parametrize("kind", ["flux_true_cfg", "dit_ddim"])
def test_scores_of_zero_and_one_mix_what_a_list_of_steps_computes(kind):
    one = case(kind)
    plain = one.latents(which=(0,))
    names, before = modules_of(one.pipe.transformer), state_of(one.pipe.transformer)
    chosen = random_scores(one) > 0.4
    mixed = routed(one, chosen.float()).states[-1]
    assert state_of(one.pipe.transformer) == before
    lists = {name: chosen[:, place].nonzero().flatten().tolist() for place, name in enumerate(names)}
    expected, report = one.run(harmonica(K, T, steps=lists), which=(0,))
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(expected, plain) and torch.equal(one.latents(which=(0,)), plain)
    assert all(0 < spent < T for (spent,) in report.spent.values())


def test_the_gradient_of_the_last_steps_scores_is_that_of_two_runs():
    """They alone move no later state."""
    one, steps = case("dit_ddim"), 4
    batch, scores = (one.family.prompts[:1], [0]), random_scores(one, 4)
    proxies = torch.tensor([0.0, 1.0, 2.0, 30.0])
    found = gradient(one.pipe, partial(router_of, one), scores, proxies, batch, one.family.call)
    states = routed(one, scores).states
    wanted = answers(one.pipe, states[:-1], *batch, **one.family.call)[-1]

    def loss(place, move):
        moved = scores.clone()
        moved[-1, place] += move
        return float(30 * (routed(one, moved).slopes[-1].double() - wanted).square().mean())

    for place in (0, 3):
        slope = (loss(place, 1e-2) - loss(place, -1e-2)) / 2e-2
        assert float(found[steps - 1, place]) == pytest.approx(slope, rel=0.02)
    assert (found[0] == 0).all() and (found[1:] != 0).all()


def router_of(one, scores, threshold=0.5):
    return router(one, scores, threshold)


def test_the_images_error_of_a_step_is_what_mixing_it_moves_after_those_before():
    one = case("dit_ddim")
    batch, scores = (one.family.prompts[:1], [0]), random_scores(one, 4)
    found = image_errors(one.pipe, partial(router_of, one), scores, batch, one.family.call)
    some = [torch.cat([scores[: step + 1], torch.ones_like(scores[step + 1 :])]) for step in (1, 2)]
    one_step, two_steps = (routed(one, mixed).states[-1] for mixed in some)
    assert found[0] == 0
    assert float(found[2]) == pytest.approx(float((two_steps - one_step).square().mean()), rel=1e-4)


def test_the_highest_scores_are_computed_and_all_of_the_first_step():
    scores = np.array([[0.1, 0.1], [0.9, 0.2], [0.3, 0.8]])
    assert highest(scores, 2).tolist() == [[True, True], [False, False], [False, False]]
    assert highest(scores, 4).tolist() == [[True, True], [True, False], [False, True]]
    assert highest(scores, 6).all()


def test_a_threshold_and_a_price_of_ones_own_take_the_place_of_the_budgets():
    one, recipe = case("dit_ddim"), HarmoniCa(K, T, threshold=0.5, beta=1e9, updates=1, rate=20.0)
    method = one.build(recipe)  # so dear that everything is reused
    assert all(steps == [0] for steps in method.schedule.lists.values()) and len(method.schedule.lists) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: harmonica(9, T), "budget=9 must be between"),
        (lambda: harmonica(K, T, threshold=1.5), "threshold=1.5 must lie between 0 and 1"),
        (lambda: harmonica(K, T, updates=0), "updates=0"),
        (lambda: modules_of(torch.nn.Linear(1, 1)), "Linear has no transformer blocks"),
    ],
)
def test_what_harmonica_does_not_take_is_named(make, message):
    with pytest.raises(SettingError, match=message):
        make()
