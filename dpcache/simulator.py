"""Simulates accelerated runs without the model: how far from the full-step run will a plan's run end?

Full-step runs are recorded once: the latents x_0 .. x_T and the predictions m_0 .. m_{T-1} that the scheduler is given
(after guidance). An accelerated run is then simulated:

    computed step   q_s = m_s + lambda_s dx_s                  the model answers an error of its latents with another
    skipped step    q_s = sum_a w_a q_a + u (x_s + dx_s)       the predictor's weights of earlier keys a (and the input)
    the sampler     dx_{s+1} = sum_j carry[s, j] dx_{s-j} + drive[s, j] (q_{s-j} - v_{s-j})       (`linear_sampler`)

from dx_0 = 0 to dx_T, the error of the final latents. Here v_s is the prediction that takes the sampler from x_s to
x_{s+1}, which is m_s. All q, m, x and dx are combinations of the recorded predictions and latents. So each is a vector
of coefficients c, and its length is sqrt(c' G c), with G the Gram matrix of the recorded predictions and latents. The
model is run only to learn G and lambda.

The weights may also be found in the simulation itself (`Simulator.closed_loop`). A predictor that is fitted on
full-step trajectories aims at v_s. In an accelerated run it is better to aim at the prediction that brings the latents
back to the full-step ones, dx_{s+1} = 0. Then later skipped steps correct the errors of earlier steps, as far as these
errors are alike for all prompts.

The recorded runs may also be those of a finer grid, at the times of the T steps. Then v_s differs from m_s: it also
contains the error of one coarse step against several finer ones, which skipped steps then correct.

The response lambda_s is measured at the computed steps of accelerated runs, where both dx_s and the model's answer q_s
- m_s are known. In units of 1 / (distance to the end) it is a smooth curve. It is about 1 where the model takes an
error for noise, which it removes (a perfect denoiser of one image has lambda = 1 / sigma), and 0 where the model takes
an error for a part of the image. With guidance, the answer also has another direction than the error. As far as both
lie in the directions of the recorded runs, a matrix for each step describes this (`fit_mixing`).

Answers outside of these directions are not simulated, but their effect on the final error is: a guided model may make
an early error several times larger. The squared final error is

    |dx_T|^2 + sum over skipped steps of growth_s response[T, s]^2 |e_s|^2

where e_s is the error of the prediction at step s, against what the model would predict at the same latents (plus v_s -
m_s, for a finer run); response[T, s] is how far the sampler alone carries this error; and growth is a curve that is
fitted to the final errors of the accelerated runs (`fit_growth`).

The simulator leaves out answers that are not proportional to their errors.

At site=stack a skipped step still runs the output layers, which change with time. What they make of features of other
steps is measured (`output_layers`). An answer q_a - m_a is used at step s as it was at step a:

    skipped step    q_s = b_s + sum_a u_a (f_s(h_a) - b_s + q_a - m_a)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dpcache.errors import SettingError
from dpcache.gram import weight_tables
from dpcache.linear_sampler import LinearSampler
from dpcache.method import Method
from dpcache.output_layers import OutputLayers, normed
from dpcache.predictors import Predictor
from dpcache.recorded import Answers, Probe, Recorded
from dpcache.schedules import OnlineSchedule

KNOTS = 12  # values of the response curve


def fit_response(answers: Answers, recorded: Recorded, knots: int = KNOTS, smooth: float = 1e-3) -> np.ndarray:
    """lambda, (T,): a curve c(s) / remaining, with c linear between evenly spaced steps. It is fitted to the answers by
    least squares: it minimises the sum over observations of remaining |dv - lambda dx|^2 / (|dv| |dx|).

    Args:
        knots: how many values the curve has.
        smooth: the weight of the curve's squared second differences, relative to the weight of one observation.
    """
    heard, remaining, hats = answers.heard, recorded.remaining.mean(0), _hats(recorded.steps, knots)
    pairs = ((heard.error, heard.error), (heard.error, heard.answer), (heard.answer, heard.answer))
    error, product, answer = ((a * b).sum(1) for a, b in pairs)
    each, unit = hats[heard.step], remaining[heard.step]
    normal = each.T @ (each * (np.sqrt(error / answer) / unit)[:, None])
    bend = np.diff(np.eye(knots), 2, axis=0)
    right = each.T @ (product / np.sqrt(error * answer))
    return hats @ np.linalg.solve(normal + smooth * len(error) * bend.T @ bend, right) / remaining


def fit_mixing(
    answers: Answers, recorded: Recorded, response: np.ndarray, knots: int = 6, ridge: float = 1e-3
) -> np.ndarray:
    """The part of the answers beside lambda dx, (T, r, r): to an error with coordinates c in the r leading directions
    of the recorded runs, the model's answer contains c @ mixing[s] in these directions. In units of 1 / remaining,
    mixing is linear between evenly spaced steps. It is fitted by least squares, with every observation in units of its
    error.

    Args:
        response: lambda.
        knots: the number of steps at which it is fitted.
        ridge: in units of the number of observations.
    """
    heard, remaining, hats = answers.heard, recorded.remaining.mean(0), _hats(recorded.steps, knots)
    error, answer = (recorded.along(part, heard.prompt) for part in (heard.error, heard.answer))
    size = np.linalg.norm(heard.error, axis=1)[:, None]
    left = (answer - response[heard.step, None] * error) * remaining[heard.step, None] / size
    seen = (hats[heard.step, :, None] * (error / size)[:, None]).reshape(len(size), -1)  # (n, knots r)
    among = seen.T @ seen + ridge * max(len(size), 1) * np.eye(seen.shape[1])
    found = np.linalg.solve(among, seen.T @ left).reshape(knots, error.shape[1], -1)
    return np.tensordot(hats / remaining[:, None], found, 1)


def fit_growth(probes: Sequence[Probe], simulator: "Simulator", knots: int = 6, smooth: float = 0.3) -> np.ndarray:
    """How much errors grow in ways that are not simulated, (T,), in units of the squared error that the sampler alone
    would carry to the end. The curve is linear between evenly spaced steps. It minimises the sum of squares of
    log(squared final error as simulated / as measured) over the probes' runs.

    Args:
        simulator: without growth.
        knots: how many values the curve has.
        smooth: the weight of differences between the logarithms of neighbouring values, relative to the weight of one
            run.
    """
    hats, known, made, real = _hats(simulator.recorded.steps, knots), [], [], []
    for probe in probes:
        squares, own = simulator.run(Weights(probe.predictor, simulator.recorded.steps).fill([probe.plan]))
        known.append(np.maximum(squares[0, probe.prompts], 1e-20))
        made.append(np.tile(own[0] @ hats, (len(probe.prompts), 1)))
        real.append(np.maximum(probe.errors, 1e-10) ** 2)
    known, made, real = (np.concatenate(parts) for parts in (known, made, real))
    # Where no run errs, the curve would be free but for these.
    held = np.concatenate([smooth * np.diff(np.eye(knots), axis=0), 0.01 * np.eye(knots)])

    def misses(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The residuals of the least squares, and their derivatives."""
        parts = made * np.exp(logs)
        total = known + parts.sum(1)
        return np.append(np.log(total / real), held @ logs), np.concatenate([parts / total[:, None], held])

    logs, damping = np.zeros(knots), 1.0
    for _ in range(200):  # Levenberg-Marquardt
        miss, slope = misses(logs)
        further = logs - np.linalg.solve(slope.T @ slope + damping * np.eye(knots), slope.T @ miss)
        better = np.square(misses(further)[0]).sum() < np.square(miss).sum()
        logs, damping = (further, damping / 3) if better else (logs, damping * 3)
    return hats @ np.exp(logs)


def _hats(steps: int, knots: int) -> np.ndarray:
    """(T, knots): weights for linear interpolation between values at evenly spaced steps."""
    at = np.linspace(0, knots - 1, steps)[:, None]
    return np.maximum(1 - np.abs(at - np.arange(knots)), 0)


@dataclass(frozen=True, eq=False)
class Fill:
    """The steps and weights of N plans, as arrays.

    Attributes:
        computed: (N, T), bool: which steps are computed; step 0 always is.
        weights: (N, T, h), for a skipped step the weights of the last h computed steps before it, the oldest one first;
            0 at the end if there are fewer than h, and 0 at computed steps.
        own: (N, T), the weight of the input; None if the predictor does not see the input.
    """

    computed: np.ndarray
    weights: np.ndarray
    own: np.ndarray | None

    @classmethod
    def unweighted(cls, plans: Sequence[Sequence[int]], history: int, sees_input: bool, steps: int) -> "Fill":
        """For plans that begin with step 0, with all weights 0. Each skipped step is predicted from the last `history`
        keys."""
        computed = np.zeros((len(plans), steps), bool)
        for row, plan in zip(computed, plans):
            row[list(plan)] = True
        weights = np.zeros((len(plans), steps, min(history, max(map(len, plans)))))
        return cls(computed, weights, np.zeros(computed.shape) if sees_input else None)

    @classmethod
    def of(cls, method: Method) -> "Fill":
        """For a method with fixed steps, the first of which is step 0."""
        predictor, plan, T = method.predictor, method.schedule.steps, method.num_inference_steps
        fill = cls.unweighted([plan], predictor.history, predictor.sees_input, T)
        for step in sorted(set(range(T)) - set(plan)):
            keys = fill.keys(0, step)
            weights = list(predictor.weights(keys, step))
            if fill.own is not None:
                fill.own[0, step] = weights.pop()
            fill.weights[0, step, len(keys) - len(weights) : len(keys)] = weights
        return fill

    def keys(self, number: int, step: int) -> list[int]:
        """The computed steps that a skipped step of one plan is predicted from."""
        return np.flatnonzero(self.computed[number, :step])[-self.weights.shape[2] :].tolist()

    def table(self, number: int) -> dict[int, tuple[float, ...]]:
        """For each skipped step of one plan, the weights of its keys, followed by the weight of the input if it is
        seen."""
        weights = {}
        for step in np.flatnonzero(~self.computed[number]).tolist():
            row = self.weights[number, step, : len(self.keys(number, step))].tolist()
            weights[step] = tuple(row if self.own is None else [*row, self.own[number, step].item()])
        return weights


class Weights:
    """The weights of a predictor over T steps. They are computed once for each set of latest keys."""

    def __init__(self, predictor: Predictor, steps: int):
        self.predictor, self.steps, self.known = predictor, steps, {}

    def fill(self, plans: Sequence[Sequence[int]]) -> Fill:
        """Of plans that begin with step 0."""
        history, T = self.predictor.history, self.steps
        tails = [[tuple(plan[max(i - history + 1, 0) : i + 1]) for i in range(len(plan))] for plan in plans]
        self._learn({tail for plan in tails for tail in plan} - self.known.keys())
        fill = Fill.unweighted(plans, history, self.predictor.sees_input, T)
        for n, plan in enumerate(plans):
            for tail, end in zip(tails[n], [*plan[1:], T]):
                begin, table = tail[-1] + 1, self.known[tail]
                fill.weights[n, begin:end, : len(tail)] = table[: len(tail), begin:end].T
                if fill.own is not None:
                    fill.own[n, begin:end] = table[-1, begin:end]
        return fill

    def _learn(self, tails: set[tuple[int, ...]]) -> None:
        for length in {len(tail) for tail in tails}:
            rows = [tail for tail in tails if len(tail) == length]
            self.known.update(zip(rows, weight_tables(self.predictor, np.array(rows), self.steps)))


class _Prefixes:
    """Groups of N plans that are identical up to each step. A search moves few keys of a plan at a time, so many plans
    begin alike; their common beginning is simulated once.

    Attributes:
        group: (T, N), for every plan the number of its group after each step.
    """

    def __init__(self, fill: Fill):
        self.order = np.lexsort(fill.computed.T[::-1])  # by their first step that differs
        parts = [fill.computed, *np.moveaxis(fill.weights, 2, 0)]
        parts = [part.T[:, self.order] for part in (parts if fill.own is None else [*parts, fill.own])]
        differ = np.logical_or.reduce([part[:, 1:] != part[:, :-1] for part in parts])
        # (T, N): whether a plan is the first of its group, in this order.
        self.first = np.pad(np.logical_or.accumulate(differ), ((0, 0), (1, 0)), constant_values=True)
        self.group = np.empty(self.first.shape, int)
        self.group[:, self.order] = self.first.cumsum(1) - 1

    def plans(self, step: int) -> np.ndarray:
        """One plan of each group, (G,)."""
        return self.order[self.first[step]]

    def parts(self, step: int) -> np.ndarray | None:
        """For each group of this step, the group of the step before that contains it, (G,); None if the groups have not
        changed."""
        if not step or self.first[step].sum() == self.first[step - 1].sum():
            return None
        return self.group[step - 1, self.plans(step)]


class _Latest:
    """Arrays about the last h computed steps of each of G groups of plans."""

    kept: tuple[str, ...]  # the names of these arrays

    def __init__(self, history: int):
        self.count, self.history = np.zeros(1, int), history

    def split(self, groups: np.ndarray) -> None:
        """Replace the groups by parts of them. `groups`: for each part, the group that contains it."""
        for name in ("count", *self.kept):
            setattr(self, name, getattr(self, name)[groups])

    def make_room(self, groups: np.ndarray, *kept: np.ndarray) -> np.ndarray:
        """The place of these groups' next computed step in arrays (G, h, ...), (n,). If all h places are taken, the
        oldest entry is dropped."""
        full = groups[self.count[groups] >= self.history]
        for array in kept:
            array[full, :-1] = array[full, 1:]
        place = np.minimum(self.count[groups], self.history - 1)
        self.count[groups] += 1
        return place


class _Keys(_Latest):
    """The last h predictions that each of G groups of plans has computed, and least squares over them.

    Attributes:
        values: (G, h, r), the oldest prediction first; 0 at the end if there are fewer than h.
        products: (G, h, h), inner products of the values. They change only at a computed step.
    """

    kept = ("values", "products")

    def __init__(self, history: int, width: int):
        super().__init__(history)
        self.values, self.products = np.zeros((1, history, width)), np.zeros((1, history, history))

    def add(self, groups: np.ndarray, step: int, prediction: np.ndarray) -> None:
        """What these groups have computed at a step, (n, r)."""
        place = self.make_room(groups, self.values, self.products, self.products.swapaxes(1, 2))
        self.values[groups, place] = prediction
        new = np.einsum("nhr,nr->nh", self.values[groups], prediction)
        self.products[groups, place] = self.products[groups, :, place] = new

    def predict(self, step: int, weights: np.ndarray) -> np.ndarray:
        """The predictions for skipped steps, (G, r), from weights (G, h)."""
        return (weights[:, None] @ self.values)[:, 0]

    def weights(self, aim: np.ndarray, seen: np.ndarray | None, ridge: float) -> np.ndarray:
        """The weights with which the sum of the values, and of `seen` if it is given, comes nearest to the aim: (G, h)
        or (G, h + 1). `dpcache.predictors.ridge_regression` does the same, but is slower, because it also works for
        values that coincide.

        Args:
            aim, seen: (G, r).
            ridge: above 0, in units of the mean squared length of what is predicted from.
        """
        G, h = self.values.shape[:2]
        known = h + (seen is not None)
        among, towards = np.empty((G, known, known)), np.empty((G, known, 1))
        among[:, :h, :h], towards[:, :h, 0] = self.products, np.einsum("nhr,nr->nh", self.values, aim)
        if seen is not None:
            among[:, :h, h] = among[:, h, :h] = np.einsum("nhr,nr->nh", self.values, seen)
            among[:, h, h], towards[:, h, 0] = np.einsum("nr,nr->n", seen, seen), np.einsum("nr,nr->n", seen, aim)
        noise = ridge * np.trace(among, axis1=1, axis2=2) / known
        return np.linalg.solve(among + noise[:, None, None] * np.eye(known), towards)[..., 0]


class _Features(_Latest):
    """The last h features that each of G groups of plans has computed: their steps, (G, h), the oldest one first, and
    the errors of the model's predictions from them, (G, h, r).

    Args:
        own: (T, r), the predictions of the recorded runs.
        layers: what other steps' output layers make of the features.
    """

    kept = ("steps", "errors")

    def __init__(self, history: int, own: np.ndarray, layers: OutputLayers):
        super().__init__(history)
        self.own, self.layers = own, layers
        self.steps, self.errors = np.zeros((1, history), int), np.zeros((1, history, own.shape[1]))

    def add(self, groups: np.ndarray, step: int, prediction: np.ndarray) -> None:
        """What these groups have computed at a step, (n, r)."""
        place = self.make_room(groups, self.steps, self.errors)
        self.steps[groups, place], self.errors[groups, place] = step, prediction - self.own[step]

    def predict(self, step: int, weights: np.ndarray) -> np.ndarray:
        """What the output layers make of weighted features (G, h) at a skipped step, (G, r)."""
        shares = normed(self.layers.lengths, weights, self.steps)
        made = self.layers.at(step)[self.steps] + self.errors
        return self.layers.empty[step] + (shares[:, None] @ made)[:, 0]


@dataclass(frozen=True, eq=False)
class Simulator:
    """Accelerated runs of the recorded prompts, simulated.

    Attributes:
        recorded: the reference runs.
        response: (T,), lambda.
        mixing: (T, r, r), the further part of the answers, see `fit_mixing`; None: there is none.
        growth: (T,), the further growth of the errors of skipped steps, see `fit_growth`; None: there is none.
        layers: the model's output layers, for site=stack; None: only site=output is simulated.
    """

    recorded: Recorded
    response: np.ndarray
    mixing: np.ndarray | None = None
    growth: np.ndarray | None = None
    layers: OutputLayers | None = None

    def predict_error(self, method: Method) -> float:
        """The relative error that `method` will leave in the final latents, |x - full-step x| / |full-step x|: the
        geometric mean over the recorded prompts, so that its value in decibels is the mean of the prompts' values.

        Raises SettingError for a method whose steps are not fixed, or that keeps something else than the prediction or
        the last block's output.
        """
        T = self.recorded.steps
        if isinstance(method.schedule, OnlineSchedule):
            raise SettingError(f"{type(method.schedule).__name__} decides online: the simulator takes fixed steps")
        if method.num_inference_steps != T:
            raise SettingError(f"num_inference_steps={method.num_inference_steps}: the simulator was made for {T}")
        at_stack = method.site.name == "stack"
        if method.site.name != "output" and not (at_stack and self.layers is not None):
            sites = "output" if self.layers is None else "output or stack"
            raise SettingError(f"site={method.site.name}: this simulator takes site={sites}")
        errors = self.errors(Fill.of(method), at_stack=at_stack)
        return float(10 ** (-decibels(errors)[0] / 20))

    def pack(self) -> np.ndarray:
        """As one array, for a calibration's file."""
        known, sampler, T = self.recorded, self.recorded.sampler, self.recorded.steps
        mixing = np.zeros((T, 0, 0)) if self.mixing is None else self.mixing
        sizes = [known.directions.shape[1], mixing.shape[1], sampler.drive.shape[1]]
        head = [T, *known.states.shape[::2], *sizes, sampler.noisy, known.input_fits, known.finer]
        growth = np.zeros(T) if self.growth is None else self.growth
        parts = [known.predictions, known.states, known.directions, self.response, mixing, growth]
        parts += [sampler.response, sampler.start, sampler.carry, sampler.drive]
        layers = [] if self.layers is None else [self.layers.pack()]
        return np.concatenate([head, *(part.ravel() for part in parts), *layers])

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "Simulator":
        """Of what `pack` made."""
        T, P, E, r, mixed, memory, noisy, fits, finer = packed[:9].astype(int)
        shapes = [(P, T, E), (P, T + 1, E), (2 * T + 1, r), (T,), (T, mixed, mixed), (T,)]
        shapes += [(T + 1, T), (T + 1,), (T, memory), (T, memory)]
        *each, layers = np.split(packed[9:], np.cumsum([math.prod(shape) for shape in shapes]))
        parts = [part.reshape(shape) for part, shape in zip(each, shapes)]
        paths = (part.astype(np.float32) for part in parts[:2])
        recorded = Recorded(*paths, LinearSampler(*parts[6:], bool(noisy)), bool(fits), bool(finer))
        vars(recorded)["directions"] = parts[2]  # another machine might find them with other signs
        layers = OutputLayers.unpack(layers) if len(layers) else None
        return cls(recorded, parts[3], parts[4] if mixed else None, parts[5], layers)

    @cached_property
    def _space(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates of m_0 .. m_{T-1}, of v_0 .. v_{T-1} and of x_0 .. x_T, (T, r) and (T+1, r), and every prompt's
        Gram matrix of the r axes, whose mean over prompts is the identity. The last of these are `directions`."""
        each, dual, T = self.recorded.gram, self.recorded.directions, self.recorded.steps
        m, x = np.split(each.mean(0) @ dual, [T])
        v = self.recorded.sampler.predictions_between(x, m) if self.recorded.finer else m
        if self.layers is None:
            return m, v, x, dual.T @ each @ dual
        metrics = self.layers.metrics
        m, v, x = (np.pad(part, ((0, 0), (metrics.shape[1] - part.shape[1], 0))) for part in (m, v, x))
        return m, v, x, metrics

    @property
    def moved(self) -> np.ndarray:
        """(T,): the squared distance by which a unit error at step s moves the final latents: what the sampler carries,
        and growth."""
        carried = self.recorded.sampler.response[-1] ** 2
        return carried if self.growth is None else carried * (1 + self.growth)

    def errors(self, fill: Fill, ridge: float | None = None, at_stack: bool = False) -> np.ndarray:
        """Relative errors of the final latents, (N, P). If a ridge is given, the weights are fitted and written into
        `fill`. `at_stack`: see `run`."""
        squares, made = self.run(fill, ridge, self.growth is not None, at_stack)
        if self.growth is not None:
            squares += (made @ self.growth)[:, None]
        return np.sqrt(np.maximum(squares, 1e-20))

    def closed_loop(
        self, plans: Sequence[Sequence[int]], history: int, sees_input: bool = False, ridge: float = 1e-6
    ) -> tuple[np.ndarray, Fill]:
        """The errors (N, P) of plans with fitted weights, and the `Fill` with these weights. At each skipped step the
        weights of the last `history` computed predictions (and of the input) bring the next latents as close as
        possible to the full-step ones, in the mean over prompts.

        Args:
            plans: each beginning with step 0.
            ridge: above 0, in units of the mean squared length of what is predicted from, as of `LeastSquares`.

        Raises SettingError as `Recorded.check_inputs` does, for weights of the input.
        """
        if sees_input:
            self.recorded.check_inputs()
        fill = Fill.unweighted(plans, history, sees_input, self.recorded.steps)
        return self.errors(fill, ridge), fill

    def run(
        self, fill: Fill, ridge: float | None = None, follow: bool = True, at_stack: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """|dx_T|^2, (N, P), and response[T, s]^2 |e_s|^2 of the skipped steps, (N, T), the mean over prompts.

        Args:
            ridge: if given, the weights are fitted and written into `fill`.
            follow: whether to compute the second result, which needs the model's answers at skipped steps; else it is
                None.
            at_stack: whether the weights are of features at site=stack; needs `layers`, given weights, and no weight of
            the input.
        """
        sampler, (m, v, x, metrics) = self.recorded.sampler, self._space
        T, (N, _, h), r = self.recorded.steps, fill.weights.shape, v.shape[1]
        keys, memory = _Features(h, m, self.layers) if at_stack else _Keys(h, r), sampler.drive.shape[1]
        dv, dx, made = [], [np.zeros((1, r))], np.zeros((N, T)) if follow else None
        alike = _Prefixes(fill)
        for s in range(T):
            plans, group, parts = alike.plans(s), alike.group[s], alike.parts(s)
            if parts is not None:
                keys.split(parts)
                for values in (dx, dv):
                    lately = slice(max(s - memory + 1, 0), None)
                    values[lately] = [value[parts] for value in values[lately]]
            moved, drive, computed = sampler.carried(s, dx, dv), sampler.drive[s, 0], fill.computed[plans, s]
            which = np.flatnonzero(computed)
            if len(which) == len(plans):
                q = self._answers(s, dx[s])
            else:
                seen = None if fill.own is None else x[s] + dx[s]
                if ridge is not None:
                    found = keys.weights(v[s] - (moved / drive if drive else 0), seen, ridge)
                    found[computed] = 0
                    fill.weights[:, s] = found[group, :h]
                    if seen is not None:
                        fill.own[:, s] = found[group, h]
                q = keys.predict(s, fill.weights[plans, s])
                if seen is not None:
                    q += fill.own[plans, s, None] * seen
                if follow:
                    answers = self._answers(s, dx[s])
                    off = q - answers
                    if self.recorded.finer:
                        off -= v[s] - m[s]
                    made[:, s] = np.where(computed, 0, np.einsum("nr,nr->n", off, off))[group]
                    q[which] = answers[which]
                else:
                    q[which] = self._answers(s, dx[s][which])
            keys.add(which, s, q[which])
            dv.append(q - v[s])
            dx.append(moved + drive * dv[s])
            if s >= memory:
                dv[s - memory] = dx[s - memory] = None  # nothing looks back at them
        if follow:
            made *= sampler.response[-1] ** 2
        squares = np.einsum("pnr,nr->np", dx[T] @ metrics, dx[T])
        return squares[group], made

    def _answers(self, step: int, error: np.ndarray) -> np.ndarray:
        """What the model predicts at latents with these errors, (n, r)."""
        answers = self.response[step] * error
        answers += self._space[0][step]
        if self.mixing is not None:
            mixed = self.mixing.shape[1]
            answers[:, -mixed:] += error[:, -mixed:] @ self.mixing[step]
        return answers


def fit_simulator(recorded: Recorded, answers: Answers, probes: Sequence[Probe]) -> Simulator:
    """A simulator with everything that can be learnt from the probes that `recorded.record` has run."""
    response = fit_response(answers, recorded)
    simulator = Simulator(recorded, response, fit_mixing(answers, recorded, response))
    return replace(simulator, growth=fit_growth(probes, simulator))


def decibels(errors: np.ndarray) -> np.ndarray:
    """The mean over prompts of -20 log10 of relative errors (..., P). Each prompt counts alike, as in a mean PSNR.
    Errors below 1e-10 count as 1e-10."""
    return -20 * np.log10(np.maximum(errors, 1e-10)).mean(-1)
