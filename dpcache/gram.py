"""Path-aware costs of linear predictors from the Gram matrix of a trajectory's features.

With G[a, b] = <h_a, h_b> of features h_0 .. h_{T-1}, predicting step s from keys S with weights w has squared error
|h_s - sum_a w_a h_a|^2 = w' G_SS w - 2 w' G_Ss + G_ss. The error is linear in G. So the mean of Gram matrices over
samples and guidance branches gives the mean error, and one T x T matrix determines the cost of every path.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch

from dpcache.errors import SettingError
from dpcache.predictors import LeastSquares, Predictor


@torch.no_grad()
def gram(
    features: torch.Tensor | Sequence[torch.Tensor], chunk: int = 1 << 14, device: torch.device | str | None = None
) -> np.ndarray:
    """Gram matrix of one trajectory's features: entry [a, b] is the mean over elements of features[a] * features[b].

    It is the mean and not the sum, so that errors are per element and can be compared between resolutions. Products and
    sums are float64, because errors are small differences of large entries (float32 on Apple's MPS, which has no
    float64).

    Args:
        features: (T, ...) float tensor, in sampling order, any precision and device; or several (T1, ...), (T2, ...)
            of the same trailing shape, whose rows then follow each other in the result.
        chunk: elements taken at a time; the memory needed beyond the features is T x chunk float64.
        device: the device that multiplies; None: that of the features.

    Returns:
        float64 array, (T, T), symmetric.

    Raises:
        SettingError: for features that are not finite floats, or that are empty.
    """
    parts = [features] if isinstance(features, torch.Tensor) else list(features)
    for part in parts:
        if not part.numel() or not part.is_floating_point() or part.shape[1:] != parts[0].shape[1:]:
            raise SettingError(
                f"features of shape {tuple(part.shape)}, {part.dtype}: must be floats (T, ...) of one shape"
            )
    flat = [part.reshape(len(part), -1) for part in parts]
    device = torch.device(device or flat[0].device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    # Summed where it is multiplied, since every copy to the CPU would wait for the GPU.
    total = torch.zeros(
        [sum(map(len, flat))] * 2, dtype=torch.float64, device="cpu" if device.type == "mps" else device
    )
    for columns in zip(*(part.split(chunk, dim=1) for part in flat), strict=True):
        x = torch.cat([part.to(device, dtype) for part in columns])
        total += (x @ x.T).to(total.device)
    total = total.cpu()
    if not total.isfinite().all():
        raise SettingError("features: must be finite")
    return ((total + total.T) / (2 * flat[0].shape[1])).numpy()


def key_axes(predictor: Predictor, steps: int) -> int:
    """The number of key axes to plan with, for `predictor` and T = `steps`: as many as the keys that it looks at, but
    at least the planner's two, and at most as many as fit into a gigabyte: three up to T = 106, two above."""
    return min(max(predictor.history, 2), 3 if steps**4 * 8 <= 2**30 else 2)


def path_costs(
    gram: np.ndarray,
    predictor: Predictor,
    keys: int = 3,
    step_weights: np.ndarray | None = None,
    coherent: bool = False,
) -> np.ndarray:
    """Squared error of every move between key steps, given the last `keys` keys: axes as `dpcache.planner` takes them.

    With three keys, entry [h, i, j, k] is the sum over steps s = j+1..k-1 of step_weights[s] times the squared error of
    the prediction of s from keys h, i and j, where k = T is the end; a computed step has no error. A path's cost is
    then its open-loop error, exactly so if the predictor looks at no more than `keys` keys (else earlier ones are left
    out). If there is no earlier key, key 0 fills the axis, and the predictor gets each key once: [0, 0, j, k] is
    predicted from 0 and j, [0, 0, 0, k] from 0. Moves with k <= j or keys that do not increase are infinite.

    Args:
        gram: (T, T), from `gram`, or a mean of such; (2T, 2T), features and inputs, if the predictor sees the input.
        predictor: see `dpcache.predictors`.
        keys: number of key axes, at least 1; the planner takes 2 and more. The result holds about T^(keys + 1)
            float64: 50 MB for 3 keys and T = 50, 2.5 GB for 4.
        step_weights: (T,), the weight of an error at each step; None: 1 everywhere.
        coherent: take the squared length of the sum of a move's errors, each times the root of its step weight, in
            place of the sum of their squares. So errors with the same direction, as one extrapolation makes them, count
            more than errors that cancel.

    Returns:
        float64 array, (T, ..., T, T+1).

    Raises:
        SettingError: for a setting of the wrong shape or out of range.
    """
    gram = np.asarray(gram, np.float64)
    steps = (len(gram) if gram.ndim else 0) // (2 if predictor.sees_input else 1)
    step_weights = np.ones(steps) if step_weights is None else np.asarray(step_weights, np.float64)
    if gram.ndim != 2 or len(gram) != gram.shape[1] or not steps or not np.isfinite(gram).all():
        raise SettingError(f"gram of shape {gram.shape}: must be (T, T) and finite")
    if step_weights.shape != (steps,) or not (np.isfinite(step_weights) & (step_weights >= 0)).all():
        raise SettingError(f"step_weights of shape {step_weights.shape}: must be {steps} finite numbers, none negative")
    if keys < 1:
        raise SettingError(f"keys={keys}: must be at least 1")

    cost = np.full((*[steps] * keys, steps + 1), np.inf)
    for count in range(1, min(keys, steps) + 1):
        paths = np.array([c for c in combinations(range(steps), count) if count == keys or c[0] == 0])
        used, row = np.unique(paths[:, -predictor.history :], axis=0, return_inverse=True)
        last = used[:, -1:]
        weights, counted = weight_tables(predictor, used, steps), step_weights * (np.arange(steps) > last)
        errors = _summed(gram, used, weights, counted) if coherent else _errors(gram, used, weights) * counted
        moves = np.zeros((len(used), steps + 1))
        errors.cumsum(1, out=moves[:, 1:])
        moves.clip(0, out=moves)
        moves[np.arange(steps + 1) <= last] = np.inf
        cost[(0,) * (keys - count) + tuple(paths.T)] = moves[row.ravel()]
    return cost


def _errors(gram: np.ndarray, keys: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Squared error at every step for each row of keys, (n, T); values that rounding makes negative are set to zero."""
    steps = weights.shape[2]
    target, diagonal = gram[keys], gram.diagonal()
    among = np.take_along_axis(target, keys[:, None], axis=2)
    own, weights = weights[:, keys.shape[1] :], weights[:, : keys.shape[1]]
    errors = (weights * (among @ weights - 2 * target[..., :steps])).sum(1) + diagonal[:steps]
    if own.size:  # of the model's input
        own, crossed = own[:, 0], (weights * target[..., steps:]).sum(1)
        errors += own * (own * diagonal[steps:] + 2 * crossed - 2 * gram.diagonal(steps))
    return errors.clip(0)  # exact errors are squares, but terms of the size of G cancel to within 1e-16 of it


def _summed(
    gram: np.ndarray, keys: np.ndarray, weights: np.ndarray, step_weights: np.ndarray, chunk: int = 1024
) -> np.ndarray:
    """By how much the error of each step increases the squared length of the sum of the errors so far, for each row of
    keys, (n, T)."""
    steps, result = weights.shape[2], np.empty((len(keys), weights.shape[2]))
    for part in (slice(start, start + chunk) for start in range(0, len(keys), chunk)):
        own, w = weights[part, keys.shape[1] :], weights[part, : keys.shape[1]]
        target, scale = gram[keys[part]], np.sqrt(step_weights[part])
        among = np.take_along_axis(target, keys[part, None], axis=2)
        crossed = w.swapaxes(1, 2) @ target  # of the prediction at one step with the features (and inputs) at another
        products = gram[:steps, :steps] + w.swapaxes(1, 2) @ among @ w
        products = products - crossed[..., :steps] - crossed[..., :steps].swapaxes(1, 2)
        if own.size:  # of the model's input
            own = own.swapaxes(1, 2)  # (n, T, 1)
            half = own * (gram[steps:, steps:] * own.swapaxes(1, 2) / 2 - gram[steps:, :steps])
            half += own * crossed[..., steps:].swapaxes(1, 2)
            products += half + half.swapaxes(1, 2)
        products *= scale[:, :, None] * scale[:, None]
        diagonal = np.arange(steps)
        result[part] = 2 * np.triu(products, 1).sum(1) + products[:, diagonal, diagonal]
    return result


def weight_tables(predictor: Predictor, keys: np.ndarray, steps: int) -> np.ndarray:
    """Weights of each row of keys for every step after the row's last key, zero before, (n, keys, T), computed in as
    few calls as possible. If the model's input is seen, its weights are one more row at the end."""
    if isinstance(predictor, LeastSquares):
        if predictor.steps != steps:
            raise SettingError(f"{predictor} is for {predictor.steps} steps, this Gram matrix has {steps}")
        return predictor.solve(keys)
    shift = np.zeros(len(keys), int)
    if predictor.by_distance:
        shift = np.maximum(keys[:, 0] - getattr(predictor, "since", 0), 0)
    patterns, row = np.unique(keys - shift[:, None], axis=0, return_inverse=True)
    weights = np.zeros((len(patterns), steps, keys.shape[1]))
    for pattern, table in zip(map(tuple, patterns.tolist()), weights):
        for step in range(pattern[-1] + 1, steps):
            used = predictor.weights(pattern, step)  # may leave out the oldest keys
            table[step, keys.shape[1] - len(used) :] = used
    at = np.maximum(np.arange(steps) - shift[:, None], 0)
    return weights[row.reshape(-1, 1), at].transpose(0, 2, 1)
