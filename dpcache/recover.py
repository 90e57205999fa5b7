"""Recovers a trajectory of features from its cost tensor, so that it can be studied without the model.

Every increment of a path-aware cost (`dpcache.pact`) is the size of one prediction error, e[i, j, s] =
|sum_a w_a h_a - h_s|, and the weights w are known. Tens of thousands of such distances determine the features h_t up to
a rotation and a constant, as distances between towns determine a map. The map needs few dimensions, and its Gram
matrix gives the errors of other predictors on other paths (`dpcache.gram.path_costs`).

The constant is lost because a predictor's weights sum to one. A Taylor expansion also reproduces straight lines. So a
linear function of the step would be lost as well, except for the end: as the true feature of the end, `l1_cost` takes a
mixture with the mean of the last features, which lies behind them on the line. This determines the slope only weakly.
On the embedded models, errors of Taylor, Lagrange and FoCa, which reproduce straight lines, are recovered to a few per
cent; errors of reuse come out a third to a half too large.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dpcache.errors import SettingError
from dpcache.pact import end_weights, residuals
from dpcache.predictors import Predictor, Taylor


@dataclass(frozen=True, eq=False)
class Recovered:
    """A recovered trajectory.

    Attributes:
        points: (T, D) float64, the first at the origin. Distances between them are Euclidean, in the units of the
            tensor, whose entries are mean absolute values averaged over samples.
        fitted: number of increments in the fit.
        error: their root mean squared log error; 0.01 is about one per cent.
        held_out: this error for increments of histories (i, j) that were left out of the fit; NaN if there are none.
        held_out_end: this error for the left-out increments at the end, which determine the slope of the straight line.
    """

    points: np.ndarray
    fitted: int
    error: float
    held_out: float
    held_out_end: float

    @property
    def gram(self) -> np.ndarray:
        """(T, T): the points' inner products."""
        return self.points @ self.points.T


def recover(
    cost: np.ndarray,
    predictor: Predictor | None = None,
    ceiling: float = np.inf,
    dimensions: int = 24,
    held_out: float = 0.1,
    iterations: int = 2000,
    seed: int = 0,
) -> Recovered:
    """The trajectory on which a path-aware cost was measured, up to a rotation and a constant.

    The unknowns are the first difference and the second differences of the points, because errors of extrapolation are
    about as large as second differences, whatever the size of the features. They start with random directions, and with
    sizes estimated from the errors one step after the keys. L-BFGS reduces the squared log error of the increments, so
    that each increment counts by its relative error. This takes seconds to a minute on a CPU at T = 50.

    Args:
        cost: (T, T+1, T+1), from `l1_cost` with its defaults or from the authors' code; infinite or NaN where unknown.
        predictor: the predictor whose errors the tensor holds; None: Taylor(2), the paper's.
        ceiling: costs above it are not used, because tensors that were summed in half precision overflow, first for
            some of the samples.
        dimensions: D, of the points.
        held_out: share of the histories (i, j) that are left out of the fit, to measure its error.
        iterations: of L-BFGS, at most.
        seed: of the starting point and of the choice of left-out histories.

    Raises:
        SettingError: for a setting of the wrong shape or out of range, or a tensor with too few usable entries.
    """
    predictor = predictor or Taylor(2)
    cost = np.asarray(cost, np.float64)
    steps = cost.shape[-1] - 1 if cost.ndim else 0
    if cost.ndim != 3 or steps < 4 or min(cost.shape) < steps or not 1 <= dimensions <= steps or iterations < 1:
        raise SettingError(
            f"cost of shape {cost.shape}, dimensions={dimensions}, iterations={iterations}: must be (T, T+1, T+1) with "
            "T >= 4, 1..T dimensions and at least one iteration"
        )
    if not 0 <= held_out < 1:
        raise SettingError(f"held_out={held_out}: must be at least 0 and below 1")

    history, at, increments = _increments(cost, ceiling)
    if len(increments) < steps * 4:
        raise SettingError(
            f"cost has {len(increments)} usable increments (finite, positive, costs up to ceiling={ceiling:g}): needs "
            f"at least {4 * steps} for T = {steps}"
        )
    rng = np.random.default_rng(seed)
    histories, row = np.unique(history, axis=0, return_inverse=True)
    out = (rng.random(len(histories)) < held_out)[row.ravel()]
    # Columns: the first difference, then the second ones.
    design = torch.from_numpy(_errors_of_features(predictor, histories, steps)[row.ravel(), at] @ _summed_twice(steps))
    target = torch.from_numpy(np.log(increments))

    start = rng.normal(size=(steps - 1, dimensions)) / np.sqrt(dimensions)
    start *= _sizes(history, at, increments, steps)[:, None]
    differences = _fit(design[~out], target[~out], torch.from_numpy(start), iterations)

    squared = _log_error(design, target, differences).square().numpy()
    parts = (~out, out, out & (at == steps))
    errors = [float(np.sqrt(squared[part].mean())) if part.any() else np.nan for part in parts]
    return Recovered(_summed_twice(steps) @ differences.numpy(), int((~out).sum()), *errors)


def _increments(cost: np.ndarray, ceiling: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The histories (i, j), (n, 2), the steps s, (n,), and the errors e[i, j, s], (n,), that the tensor tells."""
    steps = cost.shape[-1] - 1
    cost = cost[:steps, :steps]
    i, j, s = np.indices(cost.shape)
    known = np.where(np.isfinite(cost) & (cost <= ceiling), cost, np.nan)
    before = np.where(s == j + 1, 0, np.roll(known, 1, axis=2))
    increments = np.where((s > j) & ((i < j) | (j == 0) & (i == 0)), known - before, np.nan)
    used = increments > 0  # zeros are moves within the warm-up, which cost nothing by definition
    return np.stack([i[used], j[used]], axis=1), s[used], increments[used]


def _errors_of_features(predictor: Predictor, histories: np.ndarray, steps: int) -> np.ndarray:
    """(n, T+1, T): of each history and each step, the weights of the features in the prediction's error."""
    result = np.zeros((len(histories), steps + 1, steps + 1))
    index, weight = (part.double().numpy() for part in residuals(predictor, histories.tolist(), steps))
    rows = np.concatenate([n * (steps + 1) + np.arange(j + 1, steps + 1) for n, j in enumerate(histories[:, 1])])
    flat = result.reshape(-1, steps + 1)
    np.add.at(flat, (rows[:, None], index.astype(int)), weight)
    end = end_weights(predictor, steps).double().numpy()
    result[..., steps - len(end) : steps] += result[..., steps:] * end
    return result[..., :steps]


def _summed_twice(steps: int) -> np.ndarray:
    """(T, T-1): points that start at the origin, from their first difference and their second ones."""
    t, u = np.arange(steps)[:, None], np.arange(steps - 1)
    return np.where(u == 0, t, np.maximum(t - u, 0)).astype(float)


def _sizes(history: np.ndarray, at: np.ndarray, increments: np.ndarray, steps: int) -> np.ndarray:
    """A guess of the sizes of the differences, (T-1,): the smallest error at each step, interpolated where unknown."""
    smallest = np.full(steps + 1, np.inf)
    np.minimum.at(smallest, at, increments)
    known = np.flatnonzero(np.isfinite(smallest[:steps]))
    return np.exp(np.interp(np.arange(1, steps), known, np.log(smallest[known])))


def _log_error(design: torch.Tensor, target: torch.Tensor, differences: torch.Tensor) -> torch.Tensor:
    return (design @ differences).square().sum(1).clamp_min(1e-300).log() / 2 - target


def _fit(design: torch.Tensor, target: torch.Tensor, start: torch.Tensor, iterations: int) -> torch.Tensor:
    """The differences, (T-1, D), with the least squared log error."""
    # In units of the guessed size, so that one step of the search suits large and small differences.
    size = start.norm(dim=1, keepdim=True)
    unknown = (start / size).requires_grad_()
    search = torch.optim.LBFGS(
        [unknown],
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=50,
        tolerance_grad=1e-9,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure():
        search.zero_grad()
        loss = _log_error(design, target, unknown * size).square().mean()
        loss.backward()
        return loss

    search.step(closure)
    return (unknown * size).detach()
