"""L2P: learned linear prediction of the model's outputs (arXiv 2604.26365), as in the authors' code."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Predictor
from dpcache.schedules import EvenlySpaced, Schedule, check_budget, given
from dpcache.statistics import Gram

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# The authors' computed steps of 50, by their number: for FLUX.1-dev.
STEPS = {
    11: [0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44],
    10: [0, 1, 2, 4, 7, 14, 23, 31, 38, 45],
    9: [0, 1, 2, 4, 9, 17, 26, 35, 43],
    8: [0, 1, 2, 4, 10, 20, 31, 41],
    7: [0, 1, 2, 4, 12, 24, 38],
    6: [0, 1, 2, 4, 16, 32],
}


@dataclass(frozen=True)
class L2P(CalibratedRecipe):
    """The recipe: a skipped step is predicted as a weighted sum of the predictions at all steps before it, whether
    computed or predicted themselves. The weights are trained on full-step trajectories.

    The authors' weights are a lower-triangular T x T matrix. It starts as the identity and is trained with Adam to
    predict each step from all steps before it, with the mean squared error as loss. This loss depends only on the Gram
    matrix of the trajectories, so the weights are trained on the Gram matrix, with the same gradients.

    Args:
        steps: the computed steps; None: the authors' list of this length where T = 50, else evenly spaced after three.
        updates, rate: of Adam.
    """

    budget: int
    num_inference_steps: int
    steps: Sequence[int] | None = None
    updates: int = 201
    rate: float = 0.01
    statistics: ClassVar[tuple] = (Gram("output"),)

    def __post_init__(self):
        if self.updates < 1 or not self.rate > 0:
            raise SettingError(f"updates={self.updates}, rate={self.rate}: must be at least 1 and above 0")
        check_budget(self.budget, self.num_inference_steps)
        self._schedule()

    def _schedule(self) -> Schedule:
        steps, T = self.steps, self.num_inference_steps
        if steps is None and T == 50:
            steps = STEPS.get(self.budget)
        return EvenlySpaced(self.budget, T, min(3, self.budget)) if steps is None else given(steps, self.budget, T)

    @property
    def example(self) -> Method:
        T = self.num_inference_steps
        return Method(self._schedule(), "output", Unrolled(np.eye(T), self.budget))

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        """The method with its weights. `pipe` is not run and may be None."""
        T = self.num_inference_steps
        weights = train(calibration[Gram("output")][:T, :T], self.updates, self.rate, calibration.switches)
        return Method(self._schedule(), "output", Unrolled(weights, self.budget))


def train(gram: np.ndarray, updates: int = 201, rate: float = 0.01, switches: Sequence[int] = ()) -> np.ndarray:
    """Weights (T, T), lower-triangular: row i predicts step i + 1 from the steps 0..i. The last row stays as it begins.

    Args:
        gram: of the outputs, (T, T), mean over prompts and elements.
        switches: steps at which a pipeline's second model takes over, and before which it has nothing to weigh.
    """
    G = torch.from_numpy(gram)
    T = len(G)
    mask = torch.ones_like(G).tril()
    for first in switches:
        mask[first:, :first] = 0
    weights = torch.eye(T, dtype=G.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=rate)
    with torch.enable_grad():
        for _ in range(updates):
            used = (weights * mask)[:-1]
            # mean square of (used @ x - the next x), but for a constant
            loss = ((used @ G) * used - 2 * used * G[1:]).sum() / (T - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (weights.detach() * mask).numpy()


@dataclass(frozen=True, eq=False)
class Unrolled(Predictor):
    """Predictions from all earlier steps. Skipped steps among these are predictions themselves, so every prediction is
    a weighted sum of the computed steps.

    Args:
        table: (T, T); row i predicts step i + 1 from the steps 0..i.
        history: number of computed steps that are kept, which is all of them.
    """

    table: np.ndarray
    history: int

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        made_of = np.zeros((step + 1, len(keys)))  # of every step, its weights of the keys
        place, first = {key: index for index, key in enumerate(keys)}, keys[0]
        if self.table[first:step, :first].any():
            raise SettingError(
                f"step {step} weighs steps before {first}, where another model takes over: calibrate anew"
            )
        for s in range(first, step + 1):
            if s in place:
                made_of[s, place[s]] = 1
            else:
                made_of[s] = self.table[s - 1, :s] @ made_of[:s]
        return tuple(made_of[step].tolist())
