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
    """What all blocks add goes on as a sum of exponentials in the step, fitted to each sample's own last computed
    steps.

    cache-dit lets it forecast between the steps that its online cache computes; here the steps are fixed. The fit takes
    equal gaps, so they are equal from the first one after the warm-up on, and until there are four such steps a line
    through the last two is the forecast. cache-dit takes a line there, too, but divides the difference of two gaps by
    one of them, which its forecast of Taylor's does not.

    Args:
        snapshots: computed steps that are fitted at most, at least 4.
        warmup: steps that are computed first, at least.
    """
    if snapshots < FEWEST:
        raise SettingError(f"snapshots={snapshots} must be at least {FEWEST}")
    schedule = Schedule(equal_gaps(budget, num_inference_steps, warmup), num_inference_steps)
    return Method(schedule, Modes(), Line(snapshots))


def equal_gaps(budget: int, num_inference_steps: int, warmup: int) -> list[int]:
    """K steps: at least `warmup` first ones, and then equal gaps, to the end too, of which the one before them differs
    as little as it can."""
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
    """A line through the last two computed steps, of the `history` that are kept."""

    history: int

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        return Taylor(1).weights(keys, step)


@dataclass(frozen=True)
class Modes(Residual):
    """What all blocks add, where each sample's own last features decide on their weights."""

    name = "modes"

    def hooks(self, session: Session, transformer: torch.nn.Module) -> list[tuple[torch.nn.Module, Hook]]:
        pairs, last = super().hooks(session, transformer), transformer_blocks(transformer)[-1]
        return [(module, ModeHook(session, last, hook.index) if module is last else hook) for module, hook in pairs]


class ModeHook(BlockHook):
    """On the last block: weighs a skipped step's features by their modes, fitted once after each computed step."""

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
        """Each sample's modes; none where too few features have equal gaps."""
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
        made_of: the modes as sums of the features, (n, r), complex.
        factors, amounts: of each mode, (r,), its growth in a gap, and how much of it the newest feature has.
    """

    made_of: np.ndarray
    factors: np.ndarray
    amounts: np.ndarray

    def weights(self, gaps: float) -> np.ndarray:
        """Of the features, so many gaps after the newest: (n,)."""
        weights = (self.made_of @ (self.factors**gaps * self.amounts)).real
        return weights if np.isfinite(weights).all() else newest_alone(len(weights))


def newest_alone(count: int) -> np.ndarray:
    """The weights of reuse."""
    return np.append(np.zeros(count - 1), 1.0)


def modal_fit(gram: np.ndarray, smallest: float = 1e-4, ridge: float = 1e-8) -> Modal:
    """The linear map from each feature to the next with the least squared error, on the features' own space, and its
    eigenvectors. cache-dit decomposes the features themselves; lengths and angles are all that it takes, so here are
    others with the same Gram matrix in as few dimensions.

    Args:
        gram: of features of equal gaps, (n, n), oldest first.
        smallest: singular values below this share of the largest count for nothing.
        ridge: added to the singular values that are divided by.
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
