"""DPCache: steps planned by dynamic programming, the last block's output, Taylor (arXiv 2602.22654)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.gram import key_axes, path_costs
from dpcache.method import CalibratedRecipe, Method
from dpcache.planner import plan, through
from dpcache.predictors import Taylor
from dpcache.schedules import EvenlySpaced, Schedule, check_budget, given
from dpcache.statistics import Gram, L1Cost

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Planned(CalibratedRecipe):
    """The recipe of a method whose K steps are planned over a path-aware cost of a Taylor predictor (3.3).

    Args:
        predictor: `Taylor`, whose errors the cost holds.
        budget, num_inference_steps, warmup: K, T and M, see `dpcache.schedules`.
        solver: "paper" or "exact", see `dpcache.planner`.
        max_jump: largest distance between computed steps; None: any.
        cost: "l1", the paper's tensor over two keys, which takes the steps just before them as earlier keys; or "gram",
            the squared error over all the keys that the predictor looks at (needs solver="exact").
        path_aware, cumulative: of the L1 tensor, see `dpcache.pact.l1_cost`.

    Raises SettingError for a budget out of range, and for a cost that the solver does not take.
    """

    predictor: Taylor
    budget: int
    num_inference_steps: int
    warmup: int = 3
    solver: str = "exact"
    max_jump: int | None = None
    cost: str = "l1"
    path_aware: bool = True
    cumulative: bool = True

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps, self.warmup)
        if self.cost not in ("l1", "gram"):
            raise SettingError(f"cost={self.cost} is not one of l1, gram")
        if self.cost == "gram" and self.solver == "paper":
            raise SettingError("cost=gram depends on more keys than solver=paper looks at: set solver=exact")

    @property
    def statistics(self) -> tuple[L1Cost] | tuple[Gram]:
        if self.cost == "gram":
            return (Gram("stack"),)
        # The authors' tensor knows nothing of the warm-up.
        return (L1Cost("stack", f"taylor{self.predictor.order}", self.path_aware, self.cumulative),)

    @property
    def example(self) -> Method:
        return Method(EvenlySpaced(self.budget, self.num_inference_steps, self.warmup), "stack", self.predictor)

    def costs(self, calibration: Calibration) -> np.ndarray:
        """The cost tensor that is planned over, of T + 1 along each axis but the first."""
        (statistic,) = self.statistics
        tensor = calibration[statistic]
        if self.cost == "gram":
            tensor = path_costs(tensor, self.predictor, key_axes(self.predictor, self.num_inference_steps))
        return through(tensor, calibration.switches)

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        """The method with its steps. `pipe` is not run and may be None."""
        steps = plan(self.costs(calibration), self.budget, self.warmup, self.solver, self.max_jump)
        return Method(Schedule(steps, self.num_inference_steps), "stack", self.predictor, {"steps": steps})


def dpcache(
    budget: int,
    num_inference_steps: int,
    warmup: int = 3,
    order: int = 2,
    solver: str = "paper",
    max_jump: int | None = None,
    cost: str = "l1",
    path_aware: bool = True,
    cumulative: bool = True,
    steps: list[int] | None = None,
) -> Planned | Method:
    """DPCache (Denoising as Path Planning): planned steps, the last block's output, Taylor.

    Args:
        solver, cost, path_aware, cumulative: see `Planned`.
        max_jump: largest distance between computed steps; the authors' code uses `int(0.3 * num_inference_steps)`.
        steps: a schedule to use as it is, without calibration (for one, a published schedule).
    """
    predictor = Taylor(order, since=max(warmup - 2, 0))
    if steps is None:
        return Planned(predictor, budget, num_inference_steps, warmup, solver, max_jump, cost, path_aware, cumulative)
    schedule = given(steps, budget, num_inference_steps)
    if list(steps[:warmup]) != list(range(warmup)):
        raise SettingError(f"steps={list(steps)} does not begin with the warmup={warmup} steps 0..{warmup - 1}")
    return Method(schedule, "stack", predictor)
