"""The sampler's own trajectory, for planners of plain grids: states, predictions, and the model's predictions at other
latents."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dpcache._diffusers import StepListener, copy_of_scheduler, watching
from dpcache.errors import SettingError
from dpcache.sampler import generate
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline, SchedulerMixin
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    from dpcache.calibration import Calibration


@dataclass(frozen=True)
class Trajectory:
    """What a sampler of the first order passed through in T steps, in coordinates in which its step is Euler's:
    y_{s+1} = y_s + (time_{s+1} - time_s) v_s, where y_s = x_s / scale_s.

    A prediction v_i that is held from step i to step j leads to y_i + (time_j - time_i) v_i: the scheduler's own step
    from i to j. For flow matching, y = x and time = sigma. For noise predictions under DDIM, y is x / sqrt(alpha_bar)
    and time is sqrt(1 / alpha_bar - 1), both times one constant.

    Attributes:
        states: y, float32 on the CPU, (T + 1, B, ...); the first is noise, the last the final latents.
        slopes: v, the model's predictions after guidance, (T, B, ...).
        times, scales: float64, (T + 1,).
    """

    states: torch.Tensor
    slopes: torch.Tensor
    times: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class Run:
    """What a sampler passed through in T steps.

    Attributes:
        states: its latents, float32 on the CPU, (T + 1, B, ...); the first is noise.
        slopes: the model's predictions after guidance, (T, B, ...).
        timesteps: the scheduler's, T numbers.
        factors: what each step of the scheduler multiplies the latents and the prediction with, see `_factors`.
        scheduler: name of its class.
    """

    states: torch.Tensor
    slopes: torch.Tensor
    timesteps: list[float]
    factors: list[tuple[float, float]]
    scheduler: str


class _Record(StepListener):
    """Keeps the arguments of the steps, for the first `count` samples, because guidance may double the batch."""

    def __init__(self, count: int):
        self.count, self.states, self.slopes, self.timesteps, self.factors = count, [], [], [], []

    def given(self, scheduler: "SchedulerMixin", arguments: dict) -> None:
        prediction, time, sample = (arguments[name] for name in ("model_output", "timestep", "sample"))
        self.timesteps.append(float(time))
        self.factors.append(_factors(scheduler, prediction, time, sample))
        self.states.append(sample[: self.count].float().cpu())
        self.slopes.append(prediction[: self.count, : sample.shape[1]].float().cpu())


class _Answers(StepListener):
    """Keeps the predictions, and replaces the result of every step by the next of the latents `wanted`, (T, B, ...)."""

    def __init__(self, wanted: torch.Tensor):
        self.wanted, self.slopes = wanted, []

    def given(self, scheduler: "SchedulerMixin", arguments: dict) -> None:
        channels = arguments["sample"].shape[1]
        self.slopes.append(arguments["model_output"][: self.wanted.shape[1], :channels].float().cpu())

    def after_step(self, scheduler: "SchedulerMixin", output: "SchedulerOutput | tuple") -> None:
        if len(self.slopes) < len(self.wanted):
            wanted, stepped = self.wanted[len(self.slopes)], _stepped(output)
            stepped.copy_(torch.cat([wanted] * (len(stepped) // len(wanted))))  # guidance may double the batch


@torch.no_grad()
def recorded(
    pipe: "DiffusionPipeline", prompts: Sequence[str], seeds: Sequence[int], num_inference_steps: int, **call
) -> Run:
    """Sample without a cache and record. Raises SettingError for a scheduler whose `step` has another argument before
    the time, as CogVideoX's DPM solver has."""
    _check_arguments(pipe.scheduler)
    record = _Record(len(seeds))
    with watching(pipe.scheduler, record):
        last = generate(pipe, prompts, seeds, num_inference_steps, decode=False, **call).latents
    name = type(pipe.scheduler).__name__
    return Run(torch.stack([*record.states, last]), torch.stack(record.slopes), record.timesteps, record.factors, name)


def follow(
    pipe: "DiffusionPipeline", prompts: Sequence[str], seeds: Sequence[int], num_inference_steps: int, **call
) -> Trajectory:
    """Sample without a cache and record. Raises SettingError if the scheduler's step is not of the first order: a
    linear function of its latest prediction and state alone."""
    run = recorded(pipe, prompts, seeds, num_inference_steps, **call)
    scales, times = [1.0], [0.0]
    for step, (of_state, of_slope) in enumerate(run.factors):
        straight = of_state * run.states[step] + of_slope * run.slopes[step]
        reached = run.states[step + 1]
        if not torch.allclose(reached, straight, rtol=1e-2, atol=1e-3 * float(reached.std())):
            raise SettingError(
                f"{run.scheduler}, as it is configured, looks at more than its latest prediction or draws noise: grids "
                "are planned for schedulers of the first order"
            )
        scales.append(scales[-1] * of_state)
        times.append(times[-1] + of_slope / scales[-1])
    shape = (-1, *[1] * (run.states.ndim - 1))
    scales, times = torch.tensor(scales, dtype=torch.float64), torch.tensor(times, dtype=torch.float64)
    return Trajectory(run.states / scales.float().view(shape), run.slopes, times, scales)


@dataclass(frozen=True)
class Times(Rerun):
    """The `times` of a `Trajectory`, (T + 1,), which are the same for all prompts."""

    def measure(self, pipe: "DiffusionPipeline", calibration: "Calibration") -> "np.ndarray":
        ((prompts, seeds),) = calibration.batches(1)
        calibration.reran += 1
        return follow(
            pipe, prompts, seeds, calibration.num_inference_steps, **calibration.made_from["call"]
        ).times.numpy()


@torch.no_grad()
def answers(
    pipe: "DiffusionPipeline", states: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int], **call
) -> torch.Tensor:
    """The model's predictions, (T, B, ...), at given latents (T, B, ...), one for each step, in one run of the
    pipeline.

    Args:
        states: the latents. The first is not used: at step 0 the pipeline has its own.
    """
    listener = _Answers(states)
    with watching(pipe.scheduler, listener):
        generate(pipe, prompts, seeds, len(states), decode=False, **call)
    return torch.stack(listener.slopes)


def _check_arguments(scheduler) -> None:
    names = list(inspect.signature(scheduler.step).parameters)[:3]
    if names != ["model_output", "timestep", "sample"]:
        raise SettingError(
            f"{type(scheduler).__name__}: its step takes {', '.join(names)}, and this method is for schedulers of the "
            "first order, whose steps take a prediction, a time and latents"
        )


def _stepped(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.prev_sample


def _factors(scheduler, prediction: torch.Tensor, time, sample: torch.Tensor) -> tuple[float, float]:
    """The factors of the state and of the prediction in this step of the scheduler, found by stepping with (1, 0) and
    (0, 1)."""
    sample, prediction = sample[:1].float(), prediction[:1].float()
    one, zero = (torch.ones_like(sample), torch.ones_like(prediction)), (sample * 0, prediction * 0)
    of_state = _stepped(copy_of_scheduler(scheduler).step(zero[1], time, one[0]))
    of_slope = _stepped(copy_of_scheduler(scheduler).step(one[1], time, zero[0]))
    return float(of_state.flatten()[0]), float(of_slope.flatten()[0])


@contextmanager
def calling(runs: Mapping[torch.nn.Module, Callable]) -> Iterator[None]:
    """Within the `with` block, the `forward` of each module is replaced by `runs[module](forward, *args, **kwargs)`."""
    before = {module: vars(module).get("forward") for module in runs}
    for module, run in runs.items():
        module.forward = functools.wraps(module.forward)(functools.partial(run, module.forward))
    try:
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward
