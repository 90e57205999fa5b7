"""LeMiCa: Lexicographic Minimax Path Caching for Efficient Diffusion-Based Video Generation (Gao et al., arXiv
2511.00090)."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from baselines.full import full
from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Schedule, check_budget, given
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class EdgeErrors(Rerun):
    """What reuse between steps i and j, and nowhere else, changes of the final latents: the mean absolute difference,
    (T, T), from row to column; infinite beyond `max_jump`. Of the first `prompts` prompts."""

    max_jump: int
    prompts: int

    def measure(self, pipe: "DiffusionPipeline", calibration: Calibration) -> np.ndarray:
        T = calibration.num_inference_steps
        wanted, _ = calibration.rerun(pipe, full(T), self.prompts)
        errors = np.full((T, T), np.inf)
        errors[np.arange(T - 1), np.arange(1, T)] = 0  # nothing is reused
        edges = [(i, j) for i in range(T) for j in range(i + 2, min(i + self.max_jump, T - 1) + 1)]
        for i, j in tqdm(edges, desc="measuring edges", unit="run", leave=False):
            method = Method(Schedule([*range(i + 1), *range(j, T)], T), "residual", Reuse())
            errors[i, j] = np.abs(calibration.rerun(pipe, method, self.prompts)[0] - wanted).mean()
        return errors


@dataclass(frozen=True)
class LeMiCa(CalibratedRecipe):
    """The recipe: what all blocks add is reused between K steps: those of the path through all steps whose largest edge
    is the smallest, then the second largest, and so on.

    An edge from step i to step j weighs what a run that reuses step i's residual in the steps between, and computes all
    others, changes of the final latents. A path leads from the first step to the last, as all lists do that the authors
    have published.

    The authors have published these lists and not what finds them. Open, and chosen here: how many prompts are
    averaged, and how far an edge may reach (see `longest_edge`). Each edge takes a run, so a prompt takes nearly T full
    trajectories for every step that an edge may reach beyond the next: 329 edges for T = 50 and 8 steps.

    Args:
        prompts: calibration prompts whose errors are averaged, the first ones.
        max_jump: how far an edge may reach; None: see `longest_edge`.
    """

    budget: int
    num_inference_steps: int
    prompts: int = 1
    max_jump: int | None = None

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps)
        longest_edge(self.budget, self.num_inference_steps, self.max_jump)

    @property
    def statistics(self) -> tuple[EdgeErrors]:
        return (EdgeErrors(longest_edge(self.budget, self.num_inference_steps, self.max_jump), self.prompts),)

    @property
    def example(self) -> Method:
        return Method(EvenlySpaced(self.budget, self.num_inference_steps), "residual", Reuse())

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        """The method with its steps. `pipe` is not run and may be None."""
        (edges,) = self.statistics
        steps = minimax_path(calibration[edges], self.budget)
        largest = max((float(calibration[edges][edge]) for edge in pairwise(steps)), default=0.0)
        decided = {"steps": steps, "largest_error": largest}
        return Method(Schedule(steps, self.num_inference_steps), "residual", Reuse(), decided)


def lemica(
    budget: int,
    num_inference_steps: int,
    prompts: int = 1,
    max_jump: int | None = None,
    steps: list[int] | None = None,
) -> LeMiCa | Method:
    """Steps on the path whose largest errors are the smallest, see `LeMiCa`.

    Args:
        steps: a list to use as it is, without calibration (for one, the authors').
    """
    if steps is None:
        return LeMiCa(budget, num_inference_steps, prompts, max_jump)
    return Method(given(steps, budget, num_inference_steps), "residual", Reuse())


def longest_edge(budget: int, num_inference_steps: int, max_jump: int | None) -> int:
    """How far an edge of a path over K of T steps may reach: `max_jump`, where it is given, else 8 steps, of which the
    lists of the authors of LeMiCa and MeanCache have many and none that is longer, or a quarter more than the mean edge
    where that is more. Raises SettingError if no path could reach the end."""
    if budget < min(2, num_inference_steps):
        raise SettingError(f"budget={budget} must be at least 2: a path takes the first step and the last")
    mean = (num_inference_steps - 1) / max(budget - 1, 1)
    if max_jump is None:
        return max(8, math.ceil(1.25 * mean))
    if max_jump < mean:
        raise SettingError(f"max_jump={max_jump}: budget={budget} takes jumps of at least {math.ceil(mean)}")
    return max_jump


def minimax_path(errors: np.ndarray, budget: int) -> list[int]:
    """The path from the first to the last of T steps over K of them, whose edges, the largest first, come first in the
    order of words.

    What comes first does so with any further edge, too, so the best path to every step and count is all there is to
    know.

    Args:
        errors: (T, T), of the edge from row to column; infinite where there is none.
    """
    T = len(errors)
    best: dict[int, tuple[tuple[float, ...], list[int]]] = {0: ((), [0])}  # by last step: its edges, and the path
    for _ in range(budget - 1):
        reached = {}
        for j in range(1, T):
            found = [
                (tuple(sorted((*edges, errors[i, j]), reverse=True)), [*path, j])
                for i, (edges, path) in best.items()
                if i < j and np.isfinite(errors[i, j])
            ]
            if found:
                reached[j] = min(found)
        best = reached
    return best[T - 1][1]
