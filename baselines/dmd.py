"""Dynamic mode decomposition as a forecast, as in cache-dit's calibrator of that name (vipshop/cache-dit)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from dpcache._diffusers import Hook, leave_uncompiled
from dpcache.errors import SettingError
from dpcache.hooks import BlockHook
from dpcache.method import Method
from dpcache.predictors import Predictor, Taylor
from dpcache.schedules import Schedule, check_budget
from dpcache.session import Branch, History, Session
from dpcache.sites import Residual, transformer_blocks

FEWEST = 4  # snapshots that tell an oscillation


def dmd(budget: int, num_inference_steps: int, snapshots: int = 6, warmup: int = 3) -> Method:
    """What all blocks add is extrapolated as a sum of exponentials in the step, fitted to the last computed steps of
    each sample.

    In cache-dit an online cache decides which steps are computed; here the steps are fixed. The fit needs equal gaps,
    so all gaps after the warm-up are equal. Until there are four computed steps with equal gaps, the forecast is linear
    through the last two. cache-dit's forecast is linear there too, but it divides the difference over two gaps by one
    of them, which its Taylor forecast does not.

    Args:
        snapshots: number of last computed steps in the fit, at least 4.
        warmup: steps that are computed first, at least.
    """
    if snapshots < FEWEST:
        raise SettingError(f"snapshots={snapshots} must be at least {FEWEST}")
    schedule = Schedule(equal_gaps(budget, num_inference_steps, warmup), num_inference_steps)
    return Method(schedule, Modes(), Line(snapshots))


def equal_gaps(budget: int, num_inference_steps: int, warmup: int) -> list[int]:
    """K steps: at least the first `warmup` ones, then steps at equal gaps up to the end of the run. The gap between the
    two parts differs from these as little as possible."""
    check_budget(budget, num_inference_steps, warmup)
    T, found = num_inference_steps, []
    for first in range(warmup, budget):
        even = (T - first + 1) / (budget - first + 1)
        for gap in {math.floor(even), math.ceil(even)}:
            begin = T - gap * (budget - first)
            if begin >= first:
                found.append((abs(begin - (first - 1) - gap), first, [*range(first), *range(begin, T, gap)]))
    return min(found)[2] if found else list(range(budget))


@dataclass(frozen=True)
class Line(Predictor):
    """The straight line through the last two computed steps. `history`: the number of steps that are kept."""

    history: int

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        return Taylor(1).weights(keys, step)


@dataclass(frozen=True)
class Modes(Residual):
    """What all blocks add. The weights of the last features are fitted to each sample."""

    name = "modes"

    def hooks(self, session: Session, transformer: torch.nn.Module) -> list[tuple[torch.nn.Module, Hook]]:
        pairs, last = super().hooks(session, transformer), transformer_blocks(transformer)[-1]
        return [(module, ModeHook(session, last, hook.index) if module is last else hook) for module, hook in pairs]


class ModeHook(BlockHook):
    """On the last block: sets the weights of a skipped step from modes, which are fitted once after each computed
    step."""

    def __init__(self, session: Session, block: torch.nn.Module, index: int):
        super().__init__(session, block, index, last=True, probe=0, residual=True)
        self.fits: dict[str, list[Modal]] = {}  # by branch; of each sample

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        branch = self.session.current
        if not branch.skip:
            self.fits.pop(branch.name, None)
            return super().new_forward(module, *args, **kwargs)
        keys = branch.keys[-self.session.method.predictor.history :]
        if branch.name not in self.fits:
            self.fits[branch.name] = self.fit(branch, equal_tail(keys))
        if fits := self.fits[branch.name]:
            gaps = (branch.step - keys[-1]) / (keys[-1] - keys[-2])
            branch.weights = np.array([fit.weights(gaps) for fit in fits]).T[:, :, None, None]  # (n, B, 1, 1)
        return super().new_forward(module, *args, **kwargs)

    def fit(self, branch: Branch, count: int) -> "list[Modal]":
        """The modes of each sample; an empty list if too few features have equal gaps."""
        if count < FEWEST:
            return []
        return [modal_fit(G) for G in sample_grams(branch.histories["stack"], count)]


def equal_tail(keys: Sequence[int]) -> int:
    """How many of the last keys follow each other at the last gap."""
    gaps = np.diff(keys)[::-1]
    return 1 + int(np.append(gaps == gaps[:1], False).argmin())


def sample_grams(histories: Sequence[History], count: int, chunk: int = 1 << 16) -> np.ndarray:
    """Scalar products of each sample's last `count` features, oldest first, (B, count, count), float64."""
    total = 0.0
    for history in histories:
        newest = [history.buffers[history.newest - age].flatten(1) for age in range(count - 1, -1, -1)]
        for columns in zip(*(feature.split(chunk, 1) for feature in newest), strict=True):
            x = torch.stack(columns, 1).double()
            total = total + x @ x.mT
    return total.cpu().numpy()


class Modal(NamedTuple):
    """A sample's features, one gap after another, as a sum of modes that grow by complex factors.

    Attributes:
        made_of: the modes as weighted sums of the features, (n, r), complex.
        factors, amounts: (r,), for each mode its growth over one gap, and its coefficient in the newest feature.
    """

    made_of: np.ndarray
    factors: np.ndarray
    amounts: np.ndarray

    def weights(self, gaps: float) -> np.ndarray:
        """The weights of the features for a prediction `gaps` gaps after the newest one, (n,)."""
        weights = (self.made_of @ (self.factors**gaps * self.amounts)).real
        return weights if np.isfinite(weights).all() else newest_alone(len(weights))


def newest_alone(count: int) -> np.ndarray:
    """The weights of reuse."""
    return np.append(np.zeros(count - 1), 1.0)


def modal_fit(gram: np.ndarray, smallest: float = 1e-4, ridge: float = 1e-8) -> Modal:
    """The linear map from each feature to the next with the least squared error, on the features' own space, and its
    eigenvectors. cache-dit decomposes the features themselves. Only their lengths and angles matter, so here vectors of
    few dimensions with the same Gram matrix are decomposed.

    Args:
        gram: of features of equal gaps, (n, n), oldest first.
        smallest: singular values below this share of the largest are dropped.
        ridge: added to the singular values before dividing by them.
    """
    lengths, axes = np.linalg.eigh(gram)
    features = np.sqrt(lengths.clip(0))[:, None] * axes.T
    before, after = features[:, :-1], features[:, 1:]
    U, S, Vh = np.linalg.svd(before, full_matrices=False)
    rank = max(int(np.greater(S, smallest * S[0]).sum()), 1)
    U, V, inverse = U[:, :rank], Vh[:rank].T, 1 / (S[:rank] + ridge)
    made_of = V * inverse  # of `after`
    try:
        factors, vectors = np.linalg.eig(U.T @ after @ made_of)
        made_of = made_of @ vectors.astype(complex)
        amounts = np.linalg.lstsq(after @ made_of, features[:, -1].astype(complex), rcond=None)[0]
    except np.linalg.LinAlgError:  # features that are not finite, or all zero
        count = len(gram)
        return Modal(newest_alone(count)[:, None] + 0j, np.ones(1, complex), np.ones(1, complex))
    return Modal(np.vstack([np.zeros((1, rank)), made_of]), factors.astype(complex), amounts)
