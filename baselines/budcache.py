"""BudCache: Budget-Constrained Step-Level Diffusion Caching (Lei et al., arXiv 2606.13496), as in the authors' code."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from baselines.full import full
from dpcache.calibration import Calibration, finite_or_worst
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Schedule, check_budget, given

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Steps = tuple[int, ...]


@dataclass(frozen=True)
class BudCache(CalibratedRecipe):
    """The recipe: what all blocks add is reused between K computed steps. A search over whole runs chooses the steps
    whose final latents have the smallest mean squared error against those of the full-step run.

    This is stage 1 of the paper, on which its results are based unless they say otherwise. Stage 2, which then trains
    other sigmas for the sampler, is not here. The authors search on one prompt. For FLUX they take up to 200 runs of
    annealing and 20 rounds of about 50 neighbours. Each run computes K steps, so it counts as K / T full trajectories.

    Args:
        prompts: calibration prompts that are searched on, the first ones.
        restarts, annealing, hottest, coldest, climbing: see `search`; by default the authors' values for FLUX.
        seed: of the search.
    """

    budget: int
    num_inference_steps: int
    prompts: int = 1
    restarts: int = 1
    annealing: int = 200
    hottest: float = 0.05
    coldest: float = 1e-5
    climbing: int = 20
    seed: int = 0
    statistics: ClassVar[tuple] = ()

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps)
        if self.restarts < 1 or not self.hottest >= self.coldest > 0:
            raise SettingError(
                f"restarts={self.restarts}, hottest={self.hottest}, coldest={self.coldest}: must be at least 1, and "
                "above 0 and falling"
            )

    @property
    def example(self) -> Method:
        return Method(EvenlySpaced(self.budget, self.num_inference_steps), "residual", Reuse())

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        T = self.num_inference_steps
        wanted, _ = calibration.rerun(pipe, full(T), self.prompts)

        def error(steps: Steps) -> float:
            latents, _ = calibration.rerun(pipe, Method(Schedule(steps, T), "residual", Reuse()), self.prompts)
            return float(finite_or_worst(np.square(latents - wanted).mean()))

        steps, least = search(
            error,
            self.budget,
            T,
            random.Random(self.seed),
            self.restarts,
            self.annealing,
            self.hottest,
            self.coldest,
            self.climbing,
        )
        return Method(Schedule(steps, T), "residual", Reuse(), {"steps": list(steps), "error": least})


def budcache(budget: int, num_inference_steps: int, steps: list[int] | None = None, **settings) -> BudCache | Method:
    """Steps that annealing and hill climbing find, see `BudCache` for the other settings.

    Args:
        steps: a list to use as it is, without calibration.
    """
    if steps is None:
        return BudCache(budget, num_inference_steps, **settings)
    return Method(given(steps, budget, num_inference_steps), "residual", Reuse())


def search(
    error: Callable[[Steps], float],
    budget: int,
    num_inference_steps: int,
    rng: random.Random,
    restarts: int = 1,
    annealing: int = 200,
    hottest: float = 0.05,
    coldest: float = 1e-5,
    climbing: int = 20,
) -> tuple[Steps, float]:
    """K of T steps with a small error, and the error. Simulated annealing starts from random steps; then the best of
    all neighbours is taken as long as it is better. A quarter of the K steps are always the first steps.

    Args:
        error: the error of K increasing steps; called once for each candidate.
        restarts: how often to begin anew.
        annealing: candidates of the annealing.
        hottest, coldest: first and last temperature, in units of the error; it falls geometrically.
        climbing: maximal number of rounds of neighbours.
    """
    T, error, first = num_inference_steps, cache(error), max(1, budget // 4)
    best: tuple[float, Steps] = (math.inf, ())
    if budget == T:
        return tuple(range(T)), 0.0
    for _ in range(restarts):
        steps = tuple(sorted([*range(first), *rng.sample(range(first, T), budget - first)]))
        now = error(steps)
        best = min(best, (now, steps))
        for turn in range(annealing):
            temperature = hottest * (coldest / hottest) ** (turn / annealing)
            candidate = mutated(steps, T, first, rng)
            found = error(candidate)
            if found < now or rng.random() < math.exp((now - found) / temperature):
                steps, now = candidate, found
                best = min(best, (now, steps))
        for _ in range(climbing):
            found, candidate = min(((error(c), c) for c in neighbours(steps, T, first, rng)), default=(math.inf, ()))
            if found >= now:
                break
            steps, now = candidate, found
            best = min(best, (now, steps))
    return best[1], best[0]


def mutated(steps: Steps, T: int, first: int, rng: random.Random) -> Steps:
    """A random candidate: one step is moved to a free place, with probability 0.7 to one at most three steps away; with
    probability 0.1 two steps are moved. The first steps stay."""
    movable = [step for step in steps if step >= first]
    free = [step for step in range(first, T) if step not in steps]
    if not movable or not free:
        return steps
    if rng.random() < 0.9 or len(movable) < 2 or len(free) < 2:
        moved = rng.choice(movable)
        near = [step for step in free if abs(step - moved) <= 3] if rng.random() < 0.7 else []
        moved, to = {moved}, {rng.choice(near or free)}
    else:
        moved, to = set(rng.sample(movable, 2)), set(rng.sample(free, 2))
    return tuple(sorted(set(steps) - moved | to))


def neighbours(steps: Steps, T: int, first: int, rng: random.Random, jumps: int = 2) -> list[Steps]:
    """All candidates in which one step beyond the first ones is moved by up to three steps, and `jumps` candidates for
    each step with a random place."""
    movable = [step for step in steps if step >= first]
    moves = [(step, to) for step in movable for to in range(max(first, step - 3), min(T - 1, step + 3) + 1)]
    moves += [(step, rng.choice(range(first, T))) for step in movable for _ in range(jumps)]
    found = [tuple(sorted({*steps, to} - {step})) for step, to in moves if to not in steps]
    return list(dict.fromkeys(found))
