"""GITS: On the Trajectory Regularity of ODE-based Diffusion Sampling (Chen et al., arXiv 2405.11326), as in the
authors' code."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from baselines.trajectory import follow
from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Schedule, check_budget, given
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class LongStepCosts(Rerun):
    """`long_step_costs`, mean over prompts, (T + 1, T + 1)."""

    metric: str

    def measure(self, pipe: "DiffusionPipeline", calibration: Calibration) -> np.ndarray:
        costs = []
        for batch in calibration.batches():
            run = follow(pipe, *batch, calibration.num_inference_steps, **calibration.made_from["call"])
            costs.append(long_step_costs(run.states, run.slopes, run.times, self.metric))
            calibration.reran += len(batch[0])
        return np.concatenate(costs, -1).mean(-1)


@dataclass(frozen=True)
class GITS(CalibratedRecipe):
    """The recipe: no cache, and the K of T steps whose long Euler steps deviate least in sum from the trajectory of the
    T-step run.

    To hold a prediction over skipped steps is the same as such a long step (see `Trajectory`). So the grid is run as a
    list of computed steps. Calibration takes one full trajectory per prompt.

    The authors' coordinates are x / sqrt(alpha_bar) over sigma / sqrt(alpha_bar). They are used here for noise
    predictions under DDIM; for flow matching, which the authors do not treat, the coordinates are x over sigma. The
    authors' teacher is a solver of order 4 (iPNDM), and so is the student that they recommend. A long step of a
    multistep solver does not equal a held prediction, so here teacher and student are the pipeline's own solver of
    order 1.

    Args:
        metric: for the end of a long step: "dev", how much farther it is from the straight line between noise and image
            than the T-step run is; or "l1" or "l2", its distance to the T-step run.
        coefficient: the weight of each step's cost relative to the step before (the authors' 1.15).
    """

    budget: int
    num_inference_steps: int
    metric: str = "dev"
    coefficient: float = 1.15

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps)
        if self.metric not in ("dev", "l1", "l2"):
            raise SettingError(f"metric={self.metric} is not one of dev, l1, l2")

    @property
    def statistics(self) -> tuple[LongStepCosts]:
        return (LongStepCosts(self.metric),)

    @property
    def example(self) -> Method:
        return Method(EvenlySpaced(self.budget, self.num_inference_steps), "output", Reuse())

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        """The method with its steps. `pipe` is not run and may be None."""
        (costs,) = self.statistics
        steps = cheapest(calibration[costs], self.budget, self.coefficient)
        return Method(Schedule(steps, self.num_inference_steps), "output", Reuse(), {"steps": steps})


def gits(
    budget: int,
    num_inference_steps: int,
    metric: str = "dev",
    coefficient: float = 1.15,
    steps: list[int] | None = None,
) -> GITS | Method:
    """The trajectory's regularity plans the plain solver's steps, see `GITS`.

    Args:
        steps: a grid to use as it is, without calibration.
    """
    if steps is None:
        return GITS(budget, num_inference_steps, metric, coefficient)
    return Method(given(steps, budget, num_inference_steps), "output", Reuse())


def long_step_costs(states: torch.Tensor, slopes: torch.Tensor, times: torch.Tensor, metric: str) -> np.ndarray:
    """The cost of an Euler step from each point i of a trajectory to each later point j, (T + 1, T + 1, B), float64.

    Args:
        states, slopes, times: see `Trajectory`, (T + 1, B, ...), (T, B, ...) and (T + 1,).
        metric: see `GITS`.
    """
    states, slopes = states.flatten(2).double(), slopes.flatten(2).double()
    T, cost = len(slopes), np.zeros((len(states), len(states), states.shape[1]))
    own = deviation(states, states[0], states[-1])
    own[-1] = 0  # as in the authors' code, where the end does not count
    for i in range(T):
        reached = states[i] + (times[i + 1 :] - times[i])[:, None, None] * slopes[i]
        if metric == "dev":
            steps = deviation(reached, states[0], states[-1]) - own[i + 1 :]
        else:
            steps = (reached - states[i + 1 :]).norm(p=int(metric[1]), dim=-1)
        cost[i, i + 1 :] = steps.numpy()
    return cost


def deviation(points: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Distance of points (n, B, D) to the straight line through `first` and `last`, (B, D). (n, B)."""
    direction = (last - first) / (last - first).norm(dim=-1, keepdim=True)
    ahead = last - points
    return (ahead - (ahead * direction).sum(-1, keepdim=True) * direction).norm(dim=-1)


def cheapest(cost: np.ndarray, budget: int, coefficient: float = 1.0) -> list[int]:
    """The path from 0 to T in K moves with the least cost_1 + c (cost_2 + c (cost_3 + ...)) (Algorithm 1), without T.

    Args:
        cost: (T + 1, T + 1), of the move from row to column.
    """
    T = len(cost) - 1
    left = np.full((budget + 1, T + 1), np.inf)  # left[k, j]: least cost of k moves from j to T
    left[0, T], chosen = 0.0, np.zeros((budget + 1, T + 1), dtype=int)
    for k in range(1, budget + 1):
        for j in range(T):
            totals = cost[j, j + 1 :] + coefficient * left[k - 1, j + 1 :]
            chosen[k, j] = j + 1 + totals.argmin()
            left[k, j] = totals.min()
    steps = [0]
    for k in range(budget, 1, -1):
        steps.append(int(chosen[k, steps[-1]]))
    return steps
