"""How a skipped step is filled in: the feature as a weighted sum of the last few computed ones.

A predictor is a pure function of step indices, `weights(keys, step)`: `keys` are the computed steps so far, oldest
first, `step` is the skipped one, and the result has one weight per key used, newest last. With fewer keys than
`history` the order is lowered to what they carry; one key alone is reused.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class Predictor(ABC):
    """Base of all predictors. `history` is the number of latest keys that `weights` looks at."""

    history: int

    @abstractmethod
    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        """Weights of the last `len(result) <= history` keys, newest last."""


def _check_order(order: int, lowest: int, highest: int) -> None:
    if not lowest <= order <= highest:
        raise ValueError(f"predictor order={order} is not one of {lowest}..{highest}")


@dataclass(frozen=True)
class Reuse(Predictor):
    """The latest computed feature as it is (FORA, arXiv 2407.01425)."""

    history = 1

    def weights(self, keys, step):
        return (1.0,)


@dataclass(frozen=True)
class Taylor(Predictor):
    """Taylor expansion with backward differences (TaylorSeer, arXiv 2503.06923, Eq. 4-6).

    The i-th factor at a key is the difference of the (i-1)-th factors at this key and the one before over their
    distance, so it is incremental: exact for linear features at any spacing, and a backward difference beyond.

    Args:
        order: 0 (reuse) to 3.
        since: keys before this step are left out, because the authors' code starts its factors one step before the
            last warm-up step (`since = warmup - 2`).
    """

    order: int = 2
    since: int = 0

    def __post_init__(self):
        _check_order(self.order, 0, 3)

    @property
    def history(self) -> int:
        return self.order + 1

    def weights(self, keys, step):
        used = ([key for key in keys if key >= self.since] or keys[-1:])[-self.history :]
        n, distance = len(used), step - used[-1]
        # Plain floats: cost tensors ask for tens of thousands of weights. Row a: the factor at key a, over the keys.
        factors = [[float(a == b) for b in range(n)] for a in range(n)]
        total, scale = list(factors[-1]), 1.0
        for i in range(1, n):
            gaps = [used[a] - used[a - 1] for a in range(i, n)]
            factors = [[(y - x) / gap for x, y in zip(*rows)] for gap, *rows in zip(gaps, factors, factors[1:])]
            scale *= distance / i
            total = [t + scale * f for t, f in zip(total, factors[-1])]
        return tuple(total)


@dataclass(frozen=True)
class Lagrange(Predictor):
    """The polynomial through the last `order + 1` keys, evaluated at the skipped step: exact to its degree."""

    order: int = 2

    def __post_init__(self):
        _check_order(self.order, 0, 3)

    @property
    def history(self) -> int:
        return self.order + 1

    def weights(self, keys, step):
        return tuple(float(np.polyval(basis, step - keys[-1])) for basis in _lagrange_basis(keys[-self.history :]))


@dataclass(frozen=True)
class AdamsBashforth(Predictor):
    """The mean over the solver's step [k, k+1] of the polynomial through the last `order` keys.

    The feature is taken for a time derivative that the sampler integrates, as in the Adams-Bashforth methods, whose
    textbook weights come out right after a key ((3/2, -1/2) for order 2). Cf. AB-Cache (arXiv 2504.10540).
    """

    order: int = 2

    def __post_init__(self):
        _check_order(self.order, 1, 4)

    @property
    def history(self) -> int:
        return self.order

    def weights(self, keys, step):
        start = step - keys[-1]
        integrals = [np.polyint(basis) for basis in _lagrange_basis(keys[-self.history :])]
        return tuple(float(np.polyval(p, start + 1) - np.polyval(p, start)) for p in integrals)


def _lagrange_basis(keys: Sequence[int]) -> list[np.ndarray]:
    """Coefficients, highest power first, of the basis polynomials in the distance to the newest key."""
    nodes = np.array(keys, dtype=float) - keys[-1]
    basis = []
    for a, node in enumerate(nodes):
        others = np.delete(nodes, a)
        basis.append(np.atleast_1d(np.poly(others)) / np.prod(node - others))
    return basis
