"""Path-aware cost tensors (PACT) from the features of one full trajectory (DPCache, arXiv 2602.22654)."""

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from dpcache.errors import SettingError
from dpcache.predictors import Predictor

_ROWS = 4096  # residuals formed at a time: enough to hide the call, few enough to stay in cache


@torch.no_grad()
def l1_cost(
    features: torch.Tensor,
    predictor: Predictor,
    max_lookback: int | None = None,
    chunk: int | None = None,
    cumulative: bool = True,
    path_aware: bool = True,
    warmup: int = 1,
    device: torch.device | str | None = None,
) -> np.ndarray:
    """L1 cost of every move between key steps, as the authors calibrate it.

    Entry [i, j, k] is the sum over steps j+1..k of mean|predicted - true|, in units of the features. The prediction
    uses keys i and j; for the keys before i it takes the steps just before i. The true feature of the end k = T is
    taken as 0.8 x (the prediction from the last ``predictor.history`` steps) + 0.2 x (their mean). The authors' code
    differs in a factor 1/2 on every entry, which keeps float16 from overflowing, and in 1e-8 of noise on the end.

    Near the start there are fewer steps before i. Then the predictor gets only these, down to the single key 0 for [0,
    0, k]. Moves with i >= j > 0, k <= j or j - i > max_lookback are infinite.

    Args:
        features: (T, ...) float tensor, the features of one sample in sampling order, any precision and device.
        predictor: has ``history``, the number of keys it uses, and ``weights(keys, step)``, its weight for each key,
            newest last. ``Taylor(2)`` is the paper's.
        max_lookback: largest j - i, in steps; None for no limit. The authors use int(0.3 T).
        chunk: feature elements taken at a time. None: 256 on a CPU, so that (T+1, chunk) float32 stays in the L2 cache;
            16384 elsewhere, where every call costs more than its work. The memory needed beyond the features is about
            4096 x chunk float32.
        cumulative: False for the error at k alone.
        path_aware: False ignores i and predicts from j and the steps just before it (the paper's 2D ablation).
        warmup: steps 0..warmup-1 are computed anyway, so moves between them cost nothing. With the Taylor order + 1,
            every entry that is finite in the authors' tensor equals theirs.
        device: where to compute; None: where the features are.

    Returns:
        float64 array, (T, T+1, T+1).

    Raises:
        SettingError: for features that are not finite floats of at least two steps, or a setting out of range.
    """
    steps = len(features)
    if steps < 2 or not features.is_floating_point():
        raise SettingError(f"features of shape {tuple(features.shape)}, {features.dtype}: must be floats (T >= 2, ...)")
    for name, value, top in (("max_lookback", max_lookback, None), ("chunk", chunk, None), ("warmup", warmup, steps)):
        if value is not None and not 1 <= value <= (top or value):
            raise SettingError(f"{name}={value}: must be at least 1" + (f" and at most {top}" if top else ""))

    device = torch.device(device or features.device)
    chunk = chunk or (256 if device.type == "cpu" else 1 << 14)
    gap = np.arange(steps) - np.arange(steps)[:, None]
    allowed = (gap >= 1) & (gap <= (max_lookback or steps))
    allowed[0, 0] = True
    allowed[:, : warmup - 1] = False
    i, j = allowed.nonzero()
    histories, row = np.unique([i if path_aware else np.maximum(j - 1, 0), j], axis=1, return_inverse=True)

    errors = np.zeros((histories.shape[1], steps + 1))
    ahead = np.arange(steps + 1) > histories[1][:, None]
    errors[ahead] = _errors(features.reshape(steps, -1), predictor, histories.T.tolist(), chunk, device)
    if cumulative:
        errors = errors.cumsum(1)
    errors[~ahead] = np.inf

    cost = np.full((steps, steps + 1, steps + 1), np.inf)
    cost[i, j] = errors[row.ravel()]
    for forced in range(warmup - 1):
        cost[: forced + 1, forced, forced + 1] = 0
    return cost


def _errors(
    features: torch.Tensor, predictor: Predictor, histories: list[list[int]], chunk: int, device: torch.device
) -> np.ndarray:
    """mean|predicted - true| over elements, for each history (i, j) and each step j+1..T in turn."""
    steps, size = features.shape
    index, weight = (part.to(device) for part in residuals(predictor, histories, steps))
    bags = torch.arange(0, _ROWS * index.shape[1], index.shape[1], dtype=index.dtype, device=device)
    end = end_weights(predictor, steps).to(device)

    totals = torch.zeros(len(index), dtype=torch.float64, device=device)
    blocks = [
        (rows.flatten(), weights.flatten(), bags[: len(rows)], total)
        for rows, weights, total in zip(*(part.split(_ROWS) for part in (index, weight, totals)), strict=True)
    ]
    for start in range(0, size, chunk):
        x = features[:, start : start + chunk].to(device, torch.float32)
        x = torch.cat([x, end[None] @ x[-len(end) :]])
        for rows, weights, offsets, total in blocks:
            total += embedding_bag(rows, x, offsets, mode="sum", per_sample_weights=weights).abs_().sum(1)
    if not totals.isfinite().all():
        raise SettingError("features: must be finite")
    return totals.cpu().numpy() / size


def end_weights(predictor: Predictor, steps: int) -> torch.Tensor:
    """Weights of the last `history` features, (n,). The sum with these weights is taken as the true feature of the
    end."""
    last = list(range(max(0, steps - predictor.history), steps))
    end = torch.full((len(last),), 0.2 / len(last))
    used = predictor.weights(last, steps)
    end[-len(used) :] += 0.8 * torch.tensor(used)
    return end


def residuals(predictor: Predictor, histories: list[list[int]], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """predicted - true as a weighted sum of the true steps and the end: their indices and weights, (E, history + 1).

    One row for each history (i, j) and each step j+1..T in turn. An index may occur twice in a row.
    """
    index, weight = [], []
    for i, j in histories:
        keys = [*range(max(0, i + 2 - predictor.history), i + 1), j] if j else [0]
        index += [[k, *[0] * (predictor.history - len(keys)), *keys] for k in range(j + 1, steps + 1)]
        used = [predictor.weights(keys, k) for k in range(j + 1, steps + 1)]  # may leave out the oldest keys
        weight += [[-1.0, *[0.0] * (predictor.history - len(w)), *w] for w in used]
    return torch.tensor(index, dtype=torch.int32), torch.tensor(weight)
