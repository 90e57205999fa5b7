"""How a skipped step is filled in: its feature is predicted as a weighted sum of the last few computed features.

A predictor is a pure function of step indices, `weights(keys, step)`: `keys` are the computed steps so far, oldest
first, `step` is the skipped one, and the result has one weight per key used, newest last. With fewer keys than
`history`, a predictor takes the highest order that they allow; a single key is reused.
"""

import functools
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dpcache.errors import SettingError


class Predictor(ABC):
    """Base of all predictors.

    Attributes:
        history: the number of latest keys that `weights` looks at.
        sees_input: whether it also uses the model's input at the skipped step (the current latents x_t), which needs
            site=output.
        short_name: its name in settings, followed by one of `orders` where it has orders; None: it cannot be made from
            an order alone.
        by_distance: whether the weights depend only on the distances between steps (after `since`, if it has one). Then
            weights for equal distances are computed once.
    """

    history: int
    sees_input = False
    short_name: ClassVar[str | None] = None
    orders: ClassVar[Sequence[int]] = ()
    by_distance: ClassVar[bool] = False

    @abstractmethod
    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...] | np.ndarray:
        """Weights of the last `len(result) <= history` keys, newest last, followed by the weight of the input if it is
        seen. An array (n, D) has different weights along the features' last dimension.
        """


def short_names() -> dict[str, Callable[[], Predictor]]:
    """The constructors of all predictors that have a short name: "taylor2", "foca", ..."""
    found, kinds = {}, list(Predictor.__subclasses__())
    while kinds:
        kind = kinds.pop(0)
        kinds += kind.__subclasses__()
        if "short_name" in vars(kind):
            orders = {f"{kind.short_name}{order}": functools.partial(kind, order) for order in kind.orders}
            found |= orders or {kind.short_name: kind}
    return found


def _check_order(predictor: Predictor) -> None:
    if predictor.order not in predictor.orders:
        lowest, highest = min(predictor.orders), max(predictor.orders)
        raise SettingError(f"predictor order={predictor.order} is not one of {lowest}..{highest}")


@dataclass(frozen=True)
class Reuse(Predictor):
    """The latest computed feature as it is (FORA, arXiv 2407.01425)."""

    history, by_distance = 1, True

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        return (1.0,)


@dataclass(frozen=True)
class Taylor(Predictor):
    """Taylor expansion with backward differences (TaylorSeer, arXiv 2503.06923, Eq. 4-6).

    The i-th factor at a key is the difference of the (i-1)-th factors at this key and at the key before, divided by the
    distance of the two keys. The prediction is exact for linear features at any spacing.

    Args:
        order: 0 (reuse) to 3.
        since: keys before this step are not used. The authors' code starts its factors one step before the last warm-up
            step (`since = warmup - 2`).
    """

    order: int = 2
    since: int = 0
    short_name, orders, by_distance = "taylor", range(4), True

    def __post_init__(self):
        _check_order(self)

    @property
    def history(self) -> int:
        return self.order + 1

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        used = ([key for key in keys if key >= self.since] or keys[-1:])[-self.history :]
        n, distance = len(used), step - used[-1]
        # Plain floats, because cost tensors need tens of thousands of weights. Row a: weights of the factor at key a.
        factors = [[float(a == b) for b in range(n)] for a in range(n)]
        total = list(factors[-1])
        for i in range(1, n):
            gaps = [used[a] - used[a - 1] for a in range(i, n)]
            factors = [[(y - x) / gap for x, y in zip(*rows)] for gap, *rows in zip(gaps, factors, factors[1:])]
            scale = self.basis(distance, i)
            total = [t + scale * f for t, f in zip(total, factors[-1])]
        return tuple(total)

    def basis(self, distance: int, power: int) -> float:
        """The coefficient of the factor of this order."""
        return distance**power / math.factorial(power)


@dataclass(frozen=True)
class Hermite(Taylor):
    """Taylor's factors on scaled Hermite polynomials: HiCache (arXiv 2508.16984), and its authors' code.

    Instead of x^n / n! the n-th factor takes s^n H_n(s x) / n!, with the physicists' H_n.

    Args:
        order, since: as of `Taylor`.
        scale: s, between 0 and 1; 0.5 is the authors' default.
    """

    scale: float = 0.5
    short_name = "hermite"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.scale <= 1:
            raise SettingError(f"scale={self.scale} must be above 0 and at most 1")

    def basis(self, distance: int, power: int) -> float:
        value = np.polynomial.hermite.hermval(self.scale * distance, [0] * power + [1])
        return float(self.scale**power * value / math.factorial(power))


@dataclass(frozen=True)
class Lagrange(Predictor):
    """The polynomial through the last `order + 1` keys, evaluated at the skipped step: exact to its degree."""

    order: int = 2
    short_name, orders, by_distance = "lagrange", range(4), True

    def __post_init__(self):
        _check_order(self)

    @property
    def history(self) -> int:
        return self.order + 1

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        return tuple(_through(keys[-self.history :], step))


@dataclass(frozen=True)
class AdamsBashforth(Predictor):
    """The mean over the solver's step [k, k+1] of the polynomial through the last `order` keys.

    The feature is treated as a time derivative that the sampler integrates, as in Adams-Bashforth methods. For the step
    directly after a key the weights are the textbook ones ((3/2, -1/2) for order 2). Cf. AB-Cache (arXiv 2504.10540).
    """

    order: int = 2
    short_name, orders, by_distance = "ab", range(1, 5), True

    def __post_init__(self):
        _check_order(self)

    @property
    def history(self) -> int:
        return self.order

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        # Gauss' rule of two points: exact to degree three.
        one, two = (_through(keys[-self.history :], step + 0.5 + offset) for offset in (-(12**-0.5), 12**-0.5))
        return tuple((a + b) / 2 for a, b in zip(one, two))


@dataclass(frozen=True, eq=False)
class Multistep(Predictor):
    """The last key and its last two slopes, F_k + h (a F'_k + b F'_k-1): explicit linear multistep solvers.

    F' are slopes between neighbouring keys, h is the distance to the step. With two keys the prediction is the straight
    line.

    Args:
        latest, before: a and b; arrays (D,) where they differ along the features' last dimension.
    """

    latest: float | np.ndarray
    before: float | np.ndarray
    history = 3

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...] | np.ndarray:
        if len(keys) == 1:
            return (1.0,)
        latest = (step - keys[-1]) / (keys[-1] - keys[-2])
        if len(keys) == 2:
            return (-latest, 1 + latest)
        latest, before = latest * self.latest, (step - keys[-1]) / (keys[-2] - keys[-3]) * self.before
        weights = (-before, before - latest, 1 + latest)
        return weights if np.isscalar(latest) else np.stack(weights)


@dataclass(frozen=True)
class FoCa(Multistep):
    """A BDF2 forecast and a Heun calibration: Forecast then Calibrate (FoCa, arXiv 2508.16211, Eq. 6-8).

        forecast  P = 4/3 F_k - 1/3 F_k-1 + 2/3 h F'_k,  whose slope is P' = (3 P - 4 F_k + F_k-1) / 2h
        result    F_k + h/2 (F'_k-1 + P')

    There is no public code of the authors, and the paper does not define the slopes. Here they are difference quotients
    of computed features. So P' equals F'_k, and at unit gaps this is the RK2 solver of the same authors' HyCa.
    """

    latest: float = 0.5
    before: float = 0.5
    short_name, by_distance = "foca", True


@dataclass(frozen=True)
class Zeus(Predictor):
    """Linear extrapolation and reuse, in turns: ZEUS (arXiv 2604.01552), as in its authors' code.

    The first, third, ... step after a key is 2 F_k - F_k-1, whatever the distances; the second, fourth, ... is F_k. So
    no two extrapolations follow each other.
    """

    history = 2
    short_name, by_distance = "zeus", True

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        return (-1.0, 2.0) if len(keys) > 1 and (step - keys[-1]) % 2 else (1.0,)


@dataclass(frozen=True)
class Chebyshev(Predictor):
    """A ridge-regressed polynomial through all keys, mixed with a line: Spectrum (arXiv 2603.01623), its authors' code.

    With time scaled from [0, T] to [-1, 1], X the Chebyshev polynomials 0 to `degree` at the keys, (n, degree + 1), and
    x those at the step, the fit of the features H is x (X'X + ridge)^-1 X'H. The line goes through the last two keys.
    The ridge also applies to the constant, so the weights do not exactly sum to one.

    Args:
        num_inference_steps: T.
        degree, ridge: M and lambda.
        mix: w, the fit's share: 1 in the paper, between 0.5 and 1 by the authors' later advice.
        history: number of keys in the fit; in the authors' code all keys, up to 100.
    """

    num_inference_steps: int
    degree: int = 4
    ridge: float = 0.1
    mix: float = 0.5
    history: int = 100

    def __post_init__(self):
        if self.degree < 0 or not 0 < self.ridge < math.inf or not 0 <= self.mix <= 1:
            raise SettingError(
                f"degree={self.degree}, ridge={self.ridge}, mix={self.mix}: must be at least 0, above 0 and from 0 to 1"
            )

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        used = np.array([*keys[-self.history :], step])
        basis = np.polynomial.chebyshev.chebvander(2 * used / self.num_inference_steps - 1, self.degree)
        X, x = basis[:-1], basis[-1]
        weights = self.mix * x @ np.linalg.solve(X.T @ X + self.ridge * np.eye(len(x)), X.T)
        line = Taylor(1).weights(keys[-self.history :], step)
        weights[-len(line) :] += (1 - self.mix) * np.array(line)
        return tuple(weights.tolist())


def _through(keys: Sequence[int], time: float) -> list[float]:
    """Weights of the keys in the interpolating polynomial at `time`, as plain floats, because searches call this very
    often."""
    return [math.prod((time - other) / (key - other) for other in keys if other != key) for key in keys]


@dataclass(frozen=True, eq=False, repr=False)
class LeastSquares(Predictor):
    """The best linear prediction from the last keys S over a calibration's features: (G_SS + ridge)^-1 G_Ss.

    G is the Gram matrix of the features. No other weights of the same keys have a smaller mean squared error on that
    calibration. The weights need not sum to one, and they differ from step to step even at equal distances. With fewer
    keys than `history` they are the best weights for these keys: a single key is scaled, not reused.

    Args:
        gram: (T, T), the mean Gram matrix of the calibration's trajectories, see `dpcache.gram`. To see the input
            (2T, 2T): the T features followed by the model's T inputs.
        history: 1 to 4 keys.
        ridge: in units of the mean diagonal of G_SS, so that the scale of the features does not matter. It has the
            effect of independent noise of that relative variance on the keys: 1e-6 is noise of one in a thousand, about
            the rounding of bfloat16, which large weights of opposite signs would otherwise amplify. With ridge 0,
            linearly dependent keys get the weights of least norm.
        sees_input: predict from the model's input at the skipped step as well. A prediction of noise, velocity or data
            is a weighted sum of the input and either of the other two. So all three forms are covered.
    """

    gram: np.ndarray
    history: int = 3
    ridge: float = 1e-6
    sees_input: bool = False

    def __post_init__(self):
        gram = np.array(self.gram, np.float64)
        if gram.ndim != 2 or len(gram) != gram.shape[1] or not gram.size or not np.isfinite(gram).all():
            raise SettingError(f"gram of shape {gram.shape}: must be (T, T) and finite")
        if self.sees_input and len(gram) % 2:
            raise SettingError(f"gram of shape {gram.shape}: must be (2T, 2T), features and inputs, to see the input")
        if not 1 <= self.history <= 4:
            raise SettingError(f"history={self.history} is not one of 1..4")
        if not 0 <= self.ridge < math.inf:
            raise SettingError(f"ridge={self.ridge} must be finite and not negative")
        gram.setflags(write=False)
        object.__setattr__(self, "gram", gram)

    def __repr__(self):
        digest = hashlib.sha256(self.gram.tobytes()).hexdigest()[:8]
        seen = ", sees_input=True" if self.sees_input else ""
        return f"LeastSquares(gram={digest}, history={self.history}, ridge={self.ridge:g}{seen})"

    @property
    def steps(self) -> int:
        """T."""
        return len(self.gram) // (2 if self.sees_input else 1)

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        if not keys[-1] < step < self.steps:
            raise SettingError(f"step={step} must lie between key {keys[-1]} and the {self.steps} steps of the gram")
        return tuple(self.solve(np.array(keys[-self.history :]))[:, step].tolist())

    def solve(self, keys: np.ndarray) -> np.ndarray:
        """Weights for all T steps at once, (..., n, T), from the n keys in each row of `keys`, (..., n).

        With `sees_input` (..., n + 1, T): the input's weights come last.
        """
        target, T = self.gram[keys], self.steps
        among = np.take_along_axis(target, keys[..., None, :], axis=-1)
        weights = ridge_regression(among, target, self.ridge)
        if not self.sees_input:
            return weights
        # Block elimination: what the keys do not predict of the input is regressed on what they leave of the step.
        weights, of_input, with_input = weights[..., :T], weights[..., T:], target[..., T:]
        size = self.gram.diagonal()[T:]
        rest = (1 + self.ridge) * size - (with_input * of_input).sum(-2)
        together = self.gram.diagonal(T) - (with_input * weights).sum(-2)
        own = np.divide(together, rest, out=np.zeros_like(rest), where=rest > 1e-14 * size)[..., None, :]
        return np.concatenate([weights - of_input * own, own], axis=-2)


def ridge_regression(among: np.ndarray, target: np.ndarray, ridge: float) -> np.ndarray:
    """(G_SS + ridge)^-1 G_Ss for G_SS = `among`, (..., n, n), the ridge in units of its mean diagonal."""
    n = among.shape[-1]
    noise = ridge * np.trace(among, axis1=-2, axis2=-1) / n
    # Symmetric, so by eigenvalues: as fast as solving, and finite where keys coincide.
    inverse = np.linalg.pinv(among + noise[..., None, None] * np.eye(n), rcond=1e-14, hermitian=True)
    return inverse @ target
