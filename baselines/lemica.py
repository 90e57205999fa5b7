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
    """The error of an edge from step i (row) to step j (column), (T, T): the mean absolute change of the final latents
    if step i is reused up to step j and all other steps are computed; infinite beyond `max_jump`. Mean over the first
    `prompts` prompts."""

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
    """The recipe: what all blocks add is reused between K steps. These are the steps of the path whose largest edge is
    as small as possible, then its second largest edge, and so on.

    The weight of an edge from step i to step j is the change of the final latents in a run that reuses step i's
    residual at the steps between, and computes all others. A path leads from the first step to the last, as in all
    lists that the authors have published.

    The authors have published lists, but not the code that finds them. Our choices are the number of prompts in the
    mean, and how far an edge may reach (see `longest_edge`). Each edge takes a run. So for every further step that an
    edge may reach, a prompt takes nearly T more full trajectories: 329 edges for T = 50 and 8 steps.

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
    """How far an edge of a path over K of T steps may reach: `max_jump`, if it is given; else 8 steps, which is the
    longest edge in the lists of the authors of LeMiCa and MeanCache, or 1.25 times the mean edge if that is more.
    Raises SettingError if no path could reach the end."""
    if budget < min(2, num_inference_steps):
        raise SettingError(f"budget={budget} must be at least 2: a path takes the first step and the last")
    mean = (num_inference_steps - 1) / max(budget - 1, 1)
    if max_jump is None:
        return max(8, math.ceil(1.25 * mean))
    if max_jump < mean:
        raise SettingError(f"max_jump={max_jump}: budget={budget} takes jumps of at least {math.ceil(mean)}")
    return max_jump


def minimax_path(errors: np.ndarray, budget: int) -> list[int]:
    """The path over K of T steps, from the first to the last, whose edges, sorted from the largest down, are the
    smallest in lexicographic order.

    If one path is before another in this order, it stays so when both get the same further edge. So dynamic programming
    keeps the best path to every step for every number of steps.

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
