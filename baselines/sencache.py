"""SenCache: Accelerating Diffusion Model Inference via Sensitivity-Aware Caching (Haghighi and Alahi, arXiv
2602.24208), as in the authors' code for Wan2.1."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from baselines.easycache import whole
from baselines.search import Search
from baselines.trajectory import answers, recorded
from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Reuse
from dpcache.schedules import OnlineSchedule, check_budget
from dpcache.sites import Residual
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dpcache.session import Branch, Session


@dataclass(frozen=True)
class Sensitivities(Rerun):
    """How much the prediction changes at each step per unit change of the latents, and per unit of the timestep; and
    the timesteps: (3, T). Root mean squares over elements, means over the first `prompts` prompts.

    Each sensitivity is a difference quotient to the next step's latents or timestep. The first step's latents cannot be
    changed, and the last step has no next timestep; these two take the value of the neighbouring step.
    """

    prompts: int

    def measure(self, pipe: "DiffusionPipeline", calibration: Calibration) -> np.ndarray:
        T, found, call = calibration.num_inference_steps, [], calibration.made_from["call"]
        for prompts, seeds in calibration.batches(self.prompts):
            run = recorded(pipe, prompts, seeds, T, **call)
            first, v = run.states[:1], run.slopes
            with_next_latents = answers(pipe, torch.cat([first, run.states[2:]]), prompts, seeds, **call)
            with_last_latents = answers(pipe, torch.cat([first, run.states[: T - 1]]), prompts, seeds, **call)
            by_latents = rms(with_next_latents[1:] - v[1:]) / rms(run.states[2:] - run.states[1:-1])
            by_time = rms(with_last_latents[1:] - v[:-1]) / torch.tensor(run.timesteps).diff().abs()[:, None]
            by_latents, by_time = torch.cat([by_latents[:1], by_latents]), torch.cat([by_time, by_time[-1:]])
            found.append(torch.stack([by_latents, by_time]))
            calibration.reran += 3 * len(prompts)
        return np.concatenate([torch.cat(found, -1).mean(-1).double().numpy(), [run.timesteps]])


def rms(values: torch.Tensor) -> torch.Tensor:
    """Of (T, B, ...) the root mean square over all but the first two axes, (T, B)."""
    return values.flatten(2).square().mean(-1).sqrt()


@dataclass
class SensitivityState:
    """The state of one guidance branch in one generation; only that of the first branch is used.

    Attributes:
        latents: the model's input at this step.
        computed: its input at the last computed step.
        step: the last computed step.
        skipped: steps since.
    """

    latents: torch.Tensor | None = None
    computed: torch.Tensor | None = None
    step: int = 0
    skipped: int = 0


@dataclass(frozen=True, eq=False)
class SensitivityBound(OnlineSchedule):
    """A step is skipped while the changes of latents and timestep since the last computed step, times that step's
    sensitivities, stay below the threshold, and at most `max_skip` times in a row. The first guidance branch decides
    for all.

    Args:
        table: see `Sensitivities`.
        threshold: for the expected change of the prediction, as a root mean square.
        early: share of it that counts in the first fifth of the steps.
        max_skip: steps in a row.
    """

    table: np.ndarray
    threshold: float
    early: float
    max_skip: int

    def start(self) -> SensitivityState:
        return SensitivityState()

    def decide(self, context: "Branch", block: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
        if context.leader is not context:
            return not context.leader.skip
        state, step, latents, compute = context.state, context.step, whole(context.state.latents, context), True
        if state.computed is not None:
            by_latents, by_time, times = self.table
            moved = (latents - state.computed).float().square().mean().sqrt().item()
            change = by_latents[state.step] * moved + by_time[state.step] * abs(times[step] - times[state.step])
            threshold = self.threshold * (self.early if step < 0.2 * self.num_inference_steps else 1)
            compute = not change < threshold or state.skipped >= self.max_skip
        if compute:
            state.computed, state.step, state.skipped = latents.clone(), step, 0
        else:
            state.skipped += 1
        return compute


@dataclass(frozen=True)
class LatentsBeside(Residual):
    """As `Residual`; it also puts the model's input into the schedule's state."""

    def call(self, session: "Session", branch: "Branch", forward: Callable, args: tuple, kwargs: dict) -> Any:
        branch.state.latents = branch.part.input(args, kwargs)
        return forward(*args, **kwargs)


@dataclass(frozen=True)
class SenCache(CalibratedRecipe):
    """The recipe: what all blocks add is reused while a bound on the change of the prediction allows.

    The authors measure the sensitivities of the conditional prediction on videos of a data set. Here they are those of
    the prediction after guidance, on the sampler's own trajectories, for three full trajectories per prompt. The
    authors' thresholds are for the norm of the whole latents; divided by the root of the number of elements they are
    root mean squares, as here. Their command for Wan2.1 has a threshold of 2, of which a share of 0.0225 counts in
    early steps, and skips at most three steps in a row. Here up to twice the mean gap may be skipped, so that any
    budget can be reached.

    Args:
        threshold: of the expected change; None: the one that spends the budget.
        early: share of it that counts in the first fifth of the steps.
        max_skip: steps in a row that may be skipped; None: 3, or twice the mean gap.
        prompts: calibration prompts that the sensitivities are measured on, the first ones.
    """

    budget: int
    num_inference_steps: int
    threshold: float | None = None
    early: float = 0.0225
    max_skip: int | None = None
    prompts: int = 4

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps)
        if self.num_inference_steps < 3:
            raise SettingError(f"num_inference_steps={self.num_inference_steps} must be at least 3")

    @property
    def statistics(self) -> tuple[Sensitivities]:
        return (Sensitivities(self.prompts),)

    @property
    def example(self) -> Method:
        return self._method(np.ones((3, self.num_inference_steps)), 1.0)

    def _method(self, table: np.ndarray, threshold: float) -> Method:
        max_skip = max(3, 2 * self.num_inference_steps // self.budget) if self.max_skip is None else self.max_skip
        return Method(
            SensitivityBound(self.num_inference_steps, table, threshold, self.early, max_skip), LatentsBeside(), Reuse()
        )

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        (sensitivities,) = self.statistics
        table = calibration[sensitivities]
        if self.threshold is not None:
            return self._method(table, self.threshold)
        search = Search(lambda value: self._method(table, value), self.budget, self.num_inference_steps, first=0.5)
        return search.fit(pipe, calibration)
