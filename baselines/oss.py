"""OSS: Optimal Stepsize for Diffusion Sampling (Pei et al., arXiv 2503.21774), as in the authors' code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from baselines.trajectory import answers, follow
from dpcache.calibration import Calibration
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Schedule, check_budget, given
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Grids(Rerun):
    """The best grid of K of T steps for each of the (first `prompts`) prompts, (n, K), see `optimal_steps`."""

    budget: int
    prompts: int

    def measure(self, pipe: "DiffusionPipeline", calibration: Calibration) -> np.ndarray:
        grids, call = [], calibration.made_from["call"]
        for prompts, seeds in calibration.batches(self.prompts):
            run = follow(pipe, prompts, seeds, calibration.num_inference_steps, **call)

            scales = run.scales[:-1].float().view(-1, *[1] * (run.states.ndim - 1))

            def model(states, scales=scales, prompts=prompts, seeds=seeds):
                return answers(pipe, states[:-1] * scales, prompts, seeds, **call)

            grids.append(optimal_steps(run.states, run.slopes[0], run.times, model, self.budget))
            calibration.reran += self.budget * len(prompts)
        return np.concatenate(grids)


@dataclass(frozen=True)
class OSS(CalibratedRecipe):
    """The recipe: no cache, and the K of T steps from which the plain solver, stepping straight from each to the next,
    ends closest to the T-step run.

    To hold a prediction over skipped steps is the same as a long step of that solver (see `Trajectory`). So the grid is
    run as a list of computed steps. The grid is searched for each calibration prompt separately, which takes K full
    trajectories per prompt. From the grids of several prompts, each step is the median, as in the authors'
    `cal_medium`. The authors search on one image, or on every image that they sample.

    The authors let a grid begin later than at step 0, with the same noise; a pipeline begins at step 0.

    Args:
        prompts: calibration prompts that are searched on, the first ones.
    """

    budget: int
    num_inference_steps: int
    prompts: int = 4

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps)

    @property
    def statistics(self) -> tuple[Grids]:
        return (Grids(self.budget, self.prompts),)

    @property
    def example(self) -> Method:
        return Method(EvenlySpaced(self.budget, self.num_inference_steps), "output", Reuse())

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        """The method with its steps. `pipe` is not run and may be None."""
        (grids,) = self.statistics
        steps = median(calibration[grids], self.num_inference_steps)
        return Method(Schedule(steps, self.num_inference_steps), "output", Reuse(), {"steps": steps})


def oss(budget: int, num_inference_steps: int, prompts: int = 4, steps: list[int] | None = None) -> OSS | Method:
    """Optimal steps for the plain solver, see `OSS`.

    Args:
        steps: a grid to use as it is, without calibration.
    """
    if steps is None:
        return OSS(budget, num_inference_steps, prompts)
    return Method(given(steps, budget, num_inference_steps), "output", Reuse())


def optimal_steps(
    states: torch.Tensor,
    first: torch.Tensor,
    times: torch.Tensor,
    model: Callable[[torch.Tensor], torch.Tensor],
    budget: int,
) -> np.ndarray:
    """The authors' dynamic programming over the number of steps (Algorithm 1), for B samples at once.

    After k steps each grid point j has the state closest to the T-step run's own, among those that one step from any
    earlier point i reaches, started from the state that i has after k - 1 steps. So the states are computed anew, and
    the cost is the distance of a state, not a sum over the path.

    Args:
        states: of the T-step run, (T + 1, B, ...), see `Trajectory`.
        first: its prediction at step 0, (B, ...), from where every grid begins.
        times: (T + 1,).
        model: predictions (T, B, ...) at states (T + 1, B, ...), one of each step.

    Returns:
        The computed steps, (B, K), int. If fewer steps end closer, step 0 is repeated.
    """
    T, B = len(states) - 1, states.shape[1]
    flat, ahead = states.flatten(2), (times - times[:, None]).float()  # ahead[i, j] = t_j - t_i
    best = torch.full((T + 1, B), torch.inf)
    came = torch.zeros((budget, T + 1, B), dtype=torch.long)
    current = states[:1].expand_as(states).clone()
    for k in range(budget):
        slopes = (model(current) if k else first[None]).flatten(2)
        start, following = current.flatten(2), current.flatten(2).clone()
        came[k] = came[k - 1] if k else 0
        for i in range(T if k else 1):
            reached = start[i] + ahead[i, i + 1 :, None, None] * slopes[i]  # (T - i, B, ...)
            error = (reached - flat[i + 1 :]).square().mean(-1)
            better = error < best[i + 1 :]
            best[i + 1 :] = torch.where(better, error, best[i + 1 :])
            came[k, i + 1 :] = torch.where(better, i, came[k, i + 1 :])
            following[i + 1 :] = torch.where(better[..., None], reached, following[i + 1 :])
        current = following.view_as(states)
    grids = np.zeros((B, budget), dtype=int)
    for sample in range(B):
        point = T
        for k in range(budget - 1, -1, -1):
            point = grids[sample, k] = int(came[k, point, sample])
    return grids


def median(grids: np.ndarray, num_inference_steps: int) -> list[int]:
    """Of n grids (n, K), each step's median, that of an odd number of them towards the next later one; each step once.

    The authors count steps from the end, and round half of the sum of the middle two down.
    """
    left, middle = np.sort(num_inference_steps - grids, axis=0), len(grids) // 2
    return sorted({*(num_inference_steps - (left[middle] + left[middle - 1]) // 2).tolist()})
