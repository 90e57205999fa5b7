"""DyWeight: Dynamic Gradient Weighting for Few-Step Diffusion Sampling (Zhao et al., arXiv 2603.11607), as in the
authors' code for FLUX."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from baselines.fewer_steps import fewer_steps
from baselines.full import full
from baselines.search import with_decided
from baselines.solver import OtherScheduler, OtherSteps, of_flow_matching, variant
from baselines.trajectory import calling
from dpcache._diffusers import with_gradients
from dpcache.calibration import Calibration
from dpcache.denoisers import denoisers
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.sampler import generate
from dpcache.schedules import check_budget
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

SCALES = 0.5, 1.5  # the lowest and the highest that a step scale can be
DIFFERENTIATED = 4  # what such a call of the model costs, in calls: itself, once more, and two for the way back


@dataclass(frozen=True)
class DyWeight(CalibratedRecipe):
    """The recipe: no cache, and the scheduler's own grid t_0 > ... > t_K of K steps, on which every step follows a
    weighted sum of the last predictions. With t'_0 = t_0, step k is

        v_k = model(x_k, s_k t'_k),  x_{k+1} = x_k + (t_{k+1} - t'_k) d_k  with  d_k = sum_j w_kj v_j,
        t'_{k+1} = t'_k + (t_{k+1} - t'_k) sum_j w_kj.

    The weights need not sum to 1, so t'_k is the time that the states have reached, and the step scales s_k change the
    time that the model gets. Weights and scales are trained by gradients through the whole sampler, to minimise the
    mean squared error of the final latents against the T-step run. Times are those of flow matching, or of noise
    predictions sqrt(1 / alpha_bar - 1), with states x / sqrt(alpha_bar) (see `baselines.trajectory.Trajectory`).

    The authors train FLUX once, on 5,000 prompts with one noise each, in 313 updates at a learning rate of 0.001. Here
    the calibration prompts with their seeds are one batch, and there are 64 updates at a rate of 0.005; the authors'
    rates for other models go up to 0.03. With n prompts, this takes n trajectories of T steps for the targets, and 256
    n K / T for the updates, where a backward pass counts as two forward passes and each call runs twice. The authors'
    code for noise predictions differs, with settings for every model: its scales have no bounds and also scale the
    model's input and prediction, and its losses are on Inception features.

    Args:
        window: how many predictions a step weighs.
        start: the initial weights: "euler", or "adams", the Adams-Bashforth weights of up to four steps.
        updates, rate, decay: of AdamW; the rate falls along a cosine.
    """

    budget: int
    teacher_steps: int
    window: int = 2
    start: str = "euler"
    updates: int = 64
    rate: float = 0.005
    decay: float = 0.05

    def __post_init__(self):
        check_budget(self.budget, self.teacher_steps)
        if self.start not in STARTS:
            raise SettingError(f"start={self.start} is not one of {', '.join(STARTS)}")
        if self.window < 1 or self.updates < 1 or not self.rate > 0 or self.decay < 0:
            raise SettingError(
                f"window={self.window}, updates={self.updates}, rate={self.rate}, decay={self.decay}: must be at least "
                "1, at least 1, above 0 and at least 0"
            )

    @property
    def num_inference_steps(self) -> int:
        return self.budget

    @property
    def calibrated_steps(self) -> int:
        return self.teacher_steps

    @property
    def statistics(self) -> "tuple[TrainedSteps]":
        return (TrainedSteps(self.budget, self.window, self.start, self.updates, self.rate, self.decay),)

    @property
    def example(self) -> Method:
        return fewer_steps(self.budget, self.teacher_steps)

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        """The method with its weights. `pipe` is not run and may be None."""
        (trained,) = self.statistics
        found = calibration[trained]
        rows = [row[max(0, step + 1 - self.window) : step + 1].tolist() for step, row in enumerate(found[:, :-1])]
        return with_decided(made(rows, found[:, -1].tolist()), {"weights": rows, "scales": found[:, -1].tolist()})


def dyweight(
    budget: int,
    num_inference_steps: int,
    weights: Sequence[Sequence[float]] | None = None,
    scales: Sequence[float] | None = None,
    **settings,
) -> "DyWeight | WeightedSteps":
    """Trained weights and time scales for a K-step solver, see `DyWeight` for the other settings.

    Args:
        weights, scales: use these, without calibration: for every step the weights of its last predictions, newest
            last, and its scale.
    """
    if weights is None and scales is None:
        return DyWeight(budget, num_inference_steps, **settings)
    lengths = [len(part) if part is not None else 0 for part in (weights, scales)]
    if lengths != [budget, budget] or any(not 0 < len(row) <= step for step, row in enumerate(weights, 1)):
        raise SettingError(
            f"weights of {lengths[0]} steps, scales of {lengths[1]}: give both for budget={budget} steps, and at step "
            "k up to k + 1 weights"
        )
    return made(weights, scales)


def made(rows: Sequence[Sequence[float]], scales: Sequence[float]) -> "WeightedSteps":
    """The method of these weights, see `dyweight`."""
    weights, plain = np.zeros((len(rows), len(rows))), fewer_steps(len(rows), len(rows))
    for step, row in enumerate(rows):
        weights[step, step + 1 - len(row) : step + 1] = row
    return WeightedSteps(
        plain.schedule, plain.site, plain.predictor, weights=weights, scales=np.array(scales, np.float64)
    )


@dataclass(frozen=True, eq=False)
class WeightedSteps(OtherScheduler):
    """The pipeline's scheduler, but with steps as `DyWeight` describes them.

    Args:
        weights: (K, K), lower-triangular.
        scales: (K,).
    """

    weights: np.ndarray = field(kw_only=True)
    scales: np.ndarray = field(kw_only=True)

    def scheduler_for(self, own: "SchedulerMixin") -> "SchedulerMixin":
        steps, predictions = self.weights.nonzero()
        window = int((steps - predictions).max(initial=0)) + 1
        return weighted(own, torch.from_numpy(self.weights), torch.from_numpy(self.scales), window)


def weighted(scheduler: "SchedulerMixin", weights: torch.Tensor, scales: torch.Tensor, window: int) -> "SchedulerMixin":
    """A copy of `scheduler` that takes steps as `DyWeight` describes them. Its class derives from the scheduler's
    class. Its attribute `final` has the last latents; with gradients on, their graph leads to the weights.

    Args:
        weights, scales: see `WeightedSteps`.
        window: how many predictions a step weighs.

    Raises SettingError for a scheduler of another kind than `DyWeight` takes.
    """
    time_of(scheduler)
    twin = variant(scheduler, _WeightedSteps)
    twin.weights, twin.scales, twin.window, twin.final = weights, scales, window, None
    return twin


class _WeightedSteps(OtherSteps):
    """What `weighted` puts before a scheduler's class."""

    def __deepcopy__(self, memo):
        """As LTX-2 takes one for the sound. Tensors are shared: no step changes one, and a graph has no copy."""
        return copy.copy(self)

    def set_timesteps(self, *args, **kwargs) -> None:
        if kwargs.get("timesteps") is not None:
            raise SettingError("the times that this pipeline tells its model need not follow from its noise levels")
        super().set_timesteps(*args, **kwargs)
        count = len(self.weights)
        if len(self.timesteps) != count:
            raise SettingError(f"the pipeline asks for {len(self.timesteps)} steps, but the weights are for {count}")
        self.grid, self.norm, told = time_of(self)
        times = [self.grid[0]]
        for time, row in zip(self.grid[1:], self.weights):
            times.append(times[-1] + (time - times[-1]) * row.sum())
        self.times, self.taken, self.predictions = times, 0, []
        scaled = torch.stack(times[:-1]) * self.scales
        self.timesteps = told(scaled).to(self.timesteps.device, torch.float32)
        if of_flow_matching(self):
            self.sigmas = torch.stack(times).detach().to(self.sigmas)  # pipelines make a given image as noisy

    def advance(self, prediction: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        step, count = self.taken, len(self.weights)
        self.predictions = [*self.predictions, prediction][-self.window :]
        row = self.weights[step, step + 1 - len(self.predictions) : step + 1]
        slope = sum(weight * prediction.float() for weight, prediction in zip(row, self.predictions))
        state = latents.float() * self.norm(self.times[step])
        state = state + (self.grid[step + 1] - self.times[step]) * slope
        self.taken = step + 1
        last = self.taken == count
        latents = (state / self.norm(self.grid[count] if last else self.times[step + 1])).to(latents.dtype)
        if last:
            self.predictions = []
            self.final = latents
            latents = latents.detach()
        return latents


def time_of(scheduler: "SchedulerMixin") -> tuple[torch.Tensor | None, Callable, Callable]:
    """Three things: the grid of K + 1 times, float64 (None before `set_timesteps`); a function from a time to the
    factor with which the latents become a state that is stepped by Euler's method; and a function from times to the
    model's timesteps.

    Raises SettingError for other schedulers than those of flow matching, and DDIM with noise predictions that are not
    clipped.
    """
    config, set_already = scheduler.config, scheduler.timesteps is not None
    if of_flow_matching(scheduler):
        grid = scheduler.sigmas.double().cpu() if set_already else None
        return grid, lambda time: 1.0, lambda times: times * config.num_train_timesteps
    if not isinstance(scheduler, DDIMScheduler) or config.prediction_type != "epsilon" or config.clip_sample:
        raise SettingError(
            f"{type(scheduler).__name__}, as it is configured, is not one of the schedulers that weights are trained "
            "for: of flow matching, or DDIM with noise predictions that are not clipped"
        )
    table = scheduler.alphas_cumprod.double()
    levels, last = (1 / table - 1).sqrt(), (1 / scheduler.final_alpha_cumprod.double() - 1).sqrt()
    grid = torch.cat([levels[scheduler.timesteps.long().cpu()], last[None]]) if set_already else None
    return grid, lambda time: (1 + time**2).sqrt(), partial(_timesteps, levels.log())


def _timesteps(logarithms: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Timesteps for times, by linear interpolation. `logarithms`: of the times at the timesteps 0, 1, ... Beyond the
    table the nearest end is taken."""
    wanted = times.abs().clamp(min=1e-12).log()
    after = torch.searchsorted(logarithms, wanted.detach()).clamp(1, len(logarithms) - 1)
    before, gap = logarithms[after - 1], logarithms[after] - logarithms[after - 1]
    return (after - 1 + (wanted - before) / gap).clamp(0, len(logarithms) - 1)


@dataclass(frozen=True)
class TrainedSteps(Rerun):
    """The trained weights and, in the last column, the scales: (K, K + 1), see `DyWeight`."""

    budget: int
    window: int
    start: str
    updates: int
    rate: float
    decay: float

    def measure(self, pipe: "DiffusionPipeline", calibration: Calibration) -> np.ndarray:
        weighted(pipe.scheduler, torch.eye(1), torch.ones(1), 1)  # refuses before anything is run
        K, T, call = self.budget, calibration.num_inference_steps, calibration.made_from["call"]
        wanted, _ = calibration.rerun(pipe, full(T))
        wanted, batches = torch.from_numpy(wanted), calibration.batches()
        band = torch.ones(K, K).tril().triu(1 - self.window)
        weights = (STARTS[self.start](K, self.window) * band).requires_grad_()
        logits = torch.zeros(K, requires_grad=True)  # of the scales
        optimizer = torch.optim.AdamW([weights, logits], lr=self.rate, weight_decay=self.decay)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.updates)
        with with_gradients(pipe), recomputed(pipe):
            for _ in tqdm(range(self.updates), desc="training", unit="update", leave=False):
                optimizer.zero_grad()
                done = 0
                for prompts, seeds in batches:
                    steps = weights * band, between(logits), self.window
                    reached = student(pipe, steps, prompts, seeds, **call)
                    aim = wanted[done : done + len(prompts)].to(reached.device)
                    loss = (reached - aim).square().mean() * len(prompts) / len(wanted)
                    if not loss.isfinite():
                        raise SettingError(f"the training diverges: choose a rate below {self.rate}")
                    loss.backward()
                    done += len(prompts)
                optimizer.step()
                falling.step()
        calibration.reran += self.updates * len(wanted) * DIFFERENTIATED * K / T
        with torch.no_grad():
            return torch.cat([weights * band, between(logits)[:, None]], 1).double().numpy()


def between(logits: torch.Tensor) -> torch.Tensor:
    """The scales from their logits, within `SCALES`; 1 where a logit is 0."""
    low, high = SCALES
    return low + (high - low) * logits.sigmoid()


def euler(budget: int, window: int) -> torch.Tensor:
    """Weights (K, K) that take the latest prediction alone."""
    return torch.eye(budget)


def adams(budget: int, window: int) -> torch.Tensor:
    """Adams-Bashforth weights (K, K) for equal gaps, of all predictions so far, up to four."""
    known = (1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)
    weights = torch.zeros(budget, budget)
    for step in range(budget):
        row = known[min(step + 1, window, 4) - 1]
        weights[step, step + 1 - len(row) : step + 1] = torch.tensor(row[::-1])
    return weights


STARTS = {"euler": euler, "adams": adams}


def student(
    pipe: "DiffusionPipeline", steps: tuple, prompts: Sequence[str], seeds: Sequence[int], **call
) -> torch.Tensor:
    """Final latents of the K-step solver, float32 (B, ...). With gradients on, their graph leads to the weights and
    scales. `steps`: weights, scales and window, see `weighted`."""
    own = pipe.scheduler
    pipe.scheduler = twin = weighted(own, *steps)
    try:
        generate(pipe, prompts, seeds, len(twin.weights), decode=False, **call)
    finally:
        pipe.scheduler = own
    return twin.final[: len(prompts)].float()


@contextmanager
def recomputed(pipe: "DiffusionPipeline") -> Iterator[None]:
    """Within it a differentiated call of the pipeline's models keeps its inputs alone, and runs once more on the way
    back."""
    with calling(dict.fromkeys(denoisers(pipe).values(), partial(checkpoint, use_reentrant=False))):
        yield
