"""Steps in place of a scheduler's own: against that one's, an exact solution, and refused where they would be wrong."""

import diffusers
import pytest
import torch

import dpcache
from baselines.dyweight import dyweight
from baselines.fewer_steps import fewer_steps
from baselines.solver import SolversGrid, of_flow_matching, solver, variant
from dpcache.errors import SettingError
from dpcache.sampler import generate, sample
from helpers.cases import case
from helpers.embedded import CALL
from pipelines import PIPELINES, classes
from pipelines.oracle import difference
from pipelines.records import STEPS

SECOND_ORDER = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]


def test_solvers_take_the_schedulers_place_for_as_long_as_they_are_attached(pipe):
    own = pipe.scheduler
    exact = generate(pipe, ["dog"], [0], 100, decode=False, **CALL).latents
    errors = []
    for method in (fewer_steps(20, 50), *(solver(20, 50, scheduler) for scheduler in SECOND_ORDER)):
        made = sample(pipe, method, ["dog"], [0], decode=False, **CALL)
        assert made.report.computed == {"cond": list(range(20))} and pipe.scheduler is own
        errors.append((made.latents - exact).norm())
    assert max(errors[1:]) < errors[0]


EULERS = {
    "solver": solver(STEPS, STEPS, "DPMSolverMultistepScheduler", order=1),
    "dyweight": dyweight(STEPS, STEPS, weights=[[1.0]] * STEPS, scales=[1.0] * STEPS),
}
KINDS = {
    "FluxPipeline": [],  # a shift that follows from the size
    "FluxInpaintPipeline": [],  # a given image is made as noisy as the latents
    "CogView4Pipeline": ["dyweight"],  # times of the model that do not follow from the noise levels
    "MochiPipeline": [],  # from 0 to 1
    "StableDiffusion3Pipeline": [],  # leaves the noise levels to the scheduler
    "BriaPipeline": [],  # asks for the very class of the scheduler
    "LTX2Pipeline": [],  # a copy for the sound
    "LTXConditionPipeline": ["dyweight", "solver"],  # times for each token
    "Cosmos2TextToImagePipeline": ["dyweight", "solver"],  # noise levels up to 80
    "PixArtSigmaPipeline": ["dyweight", "solver"],  # clipped
}


class EulerSteps(SolversGrid):
    def advance(self, prediction, timestep, latents):
        ahead = self.sigmas[self.step_index + 1] - self.sigmas[self.step_index]
        return latents + ahead * prediction


def wrong(record, pipe, method):
    """How far a step of the method, of first order, is from Euler's, or None where it is refused. On the own
    scheduler's noise levels, if the pipeline gives them; else `solver` has others."""
    one = next(iter(record.cases))
    own, expected = pipe.scheduler, record.call(pipe, one)
    try:
        if method == "solver" and of_flow_matching(own):
            pipe.scheduler = variant(own, EulerSteps)
            found = record.call(pipe, one)
            if own.sigmas.tolist() == pipe.scheduler.sigmas.tolist():
                assert difference(expected, found) < 1e-5
            expected, pipe.scheduler = found, own
        with dpcache.cached(pipe, EULERS[method]):
            return difference(expected, record.call(pipe, one))
    except SettingError:
        return None


@pytest.mark.parametrize("method", EULERS)
@pytest.mark.parametrize("name", KINDS)
def test_a_step_of_first_order_is_eulers(name, method):
    record = PIPELINES[name]
    found = wrong(record, record.build(), method)
    assert found is None if method in KINDS[name] else found < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", EULERS)
@pytest.mark.parametrize("name", [name for name in PIPELINES if PIPELINES[name].kind in classes()])
def test_a_step_of_first_order_is_right_or_refused_on_all_pipelines(name, method):
    record = PIPELINES[name]
    pipe = record.build()
    if type(pipe.scheduler) is not diffusers.FlowMatchEulerDiscreteScheduler:
        pytest.skip("the own scheduler's steps are not Euler's")
    found = wrong(record, pipe, method)
    assert found is None or found < 1e-5


TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
NOISE_PROCESSES = [
    diffusers.DDIMScheduler(clip_sample=False),
    diffusers.DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2"),
    diffusers.DDIMScheduler(clip_sample=False, **ZERO_SNR),
    diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0, **TRAINED, **ZERO_SNR),
    diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0, **TRAINED, **ZERO_SNR),
    diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **TRAINED),
    diffusers.PNDMScheduler(skip_prk_steps=True, **TRAINED),
]


@pytest.mark.parametrize("scheduler", SECOND_ORDER)
@pytest.mark.parametrize("own", NOISE_PROCESSES, ids=lambda own: type(own).__name__)
def test_an_exact_solution_is_reached(own, scheduler):
    """Data of one normal distribution, with mean m and deviation s, move along x(t) = sqrt(a) m + z sqrt(a s^2 + 1 - a)
    with a = alphas_cumprod of t."""
    mean, variance = 0.7, 0.04
    twin = solver(400, 400, scheduler).scheduler_for(own)
    twin.set_timesteps(400)
    alphas = own.alphas_cumprod.double()
    first = alphas[int(twin.timesteps[0])]
    noise = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (noise - first.sqrt() * mean) / (first * variance + 1 - first).sqrt()
    latents = noise * twin.init_noise_sigma
    for time in twin.timesteps:
        alpha, at = alphas[int(time)], twin.scale_model_input(latents, time)
        off = (at - alpha.sqrt() * mean) / (alpha * variance + 1 - alpha)
        epsilon, image = (1 - alpha).sqrt() * off, mean + alpha.sqrt() * variance * off
        velocity = alpha.sqrt() * epsilon - (1 - alpha).sqrt() * image
        told = {"epsilon": epsilon, "v_prediction": velocity}[own.config.prediction_type]
        latents = twin.step(told, time, latents, return_dict=False)[0]
    torch.testing.assert_close(latents.double(), mean + variance**0.5 * z, rtol=0, atol=0.04)


@pytest.mark.parametrize("scheduler", SECOND_ORDER)
def test_solvers_start_from_an_image_at_the_noise_level_of_the_first_step(scheduler):
    """Flow matching: (1 - sigma) image + sigma noise, and the timestep is 1000 sigma."""
    twin = solver(4, 8, scheduler).scheduler_for(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    twin.set_timesteps(10)
    twin.set_begin_index(6)
    image, noise, time = torch.randn(2, 5, 4), torch.randn(2, 5, 4), twin.timesteps[6:7]
    sigma = float(time) / 1000
    assert 0.4 < sigma < 0.8
    assert torch.allclose(twin.scale_noise(image, time, noise), (1 - sigma) * image + sigma * noise, atol=1e-5)


def test_what_would_be_wrong_is_refused():
    one = solver(4, 8, "UniPCMultistepScheduler")
    with pytest.raises(SettingError, match="UniPCMultistepScheduler cannot take the place of this model's EDMEuler"):
        one.scheduler_for(diffusers.EDMEulerScheduler())
    with pytest.raises(SettingError, match="this model's DDIMScheduler: clip_sample=True"):
        one.scheduler_for(diffusers.DDIMScheduler())


@pytest.mark.parametrize("name", EULERS)
def test_a_scheduler_put_in_place_of_the_methods_own_is_refused_and_stays(name):
    """The run would be the plain sampler's, under the method's name."""
    family = case("flux")
    pipe = family.pipe
    own = pipe.scheduler
    other = type(own).from_config(own.config)
    with dpcache.cached(pipe, EULERS[name]):
        pipe.scheduler = other
        with pytest.raises(SettingError, match=r"has been replaced while .* a scheduler of its own"):
            family.latents(steps=STEPS)
    assert pipe.scheduler is other
    pipe.scheduler = own
    assert torch.equal(family.latents(), family.reference)


@pytest.mark.parametrize("scheduler", SECOND_ORDER)
def test_a_solver_fills_in_a_picture(scheduler):
    latents, report = case("flux_fill").run(solver(4, 8, scheduler))
    assert latents.isfinite().all() and report.computed == {"default": [0, 1, 2, 3]}


@pytest.mark.parametrize("scheduler", SECOND_ORDER)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_few_steps_of_second_order_end_nearer_to_the_exact_solution_than_eulers(shift, scheduler):
    """Flow matching: data of one normal distribution move along (1 - sigma) m + z sqrt((1 - sigma)^2 s^2 + sigma^2)."""
    own, mean, variance = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), 0.7, 0.5
    noise = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def error(taken):
        taken.set_timesteps(17)
        latents = noise
        for time in taken.timesteps:
            sigma = float(time) / 1000
            off = (latents - (1 - sigma) * mean) / ((1 - sigma) ** 2 * variance + sigma**2)
            slope = sigma * off - mean - (1 - sigma) * variance * off
            latents = taken.step(slope, time, latents, return_dict=False)[0].double()
        return (latents - mean - variance**0.5 * noise).abs().mean()

    assert error(solver(17, 17, scheduler).scheduler_for(own)) < error(own) / 2
