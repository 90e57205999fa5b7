"""How far a plan's accelerated run will end from the full-step one, without running the model.

Full-step runs are recorded once: the latents x_0 .. x_T and the predictions m_0 .. m_{T-1} that the scheduler is given
(after guidance). An accelerated run is then simulated:

    computed step   q_s = m_s + lambda_s dx_s                  the model answers an error of its latents with another
    skipped step    q_s = sum_a w_a q_a + u (x_s + dx_s)       the predictor's weights of earlier keys a (and the input)
    the sampler     dx_{s+1} = sum_j carry[s, j] dx_{s-j} + drive[s, j] (q_{s-j} - v_{s-j})       (`linear_sampler`)

from dx_0 = 0 to dx_T, the error of the final latents. Here v_s is the prediction that takes the sampler from x_s to
x_{s+1}, which is m_s. All q, m, x and dx are combinations of the recorded predictions and latents, so they are vectors
of coefficients c, and the length of what they stand for is sqrt(c' G c), with G the Gram matrix of all of these. The
model is only run to learn G and lambda.

The weights may also be found in the simulation itself (`Simulator.closed_loop`). A predictor that knows the full-step
trajectories alone aims at v_s. In an accelerated run it is better to aim at the prediction that brings the latents
back to the full-step ones, dx_{s+1} = 0. So errors that earlier steps have left, as far as they are alike for all
prompts, are taken back by later skipped steps.

The recorded runs may also be those of a finer grid, at the times of the T steps. Then v_s is not m_s: it holds what one
step of the T misses of several finer ones, and skipped steps make up for it.

The response lambda_s is measured where accelerated runs compute a step: there both dx_s and the model's answer
q_s - m_s are known. In units of 1 / distance to the end it is a smooth curve, about 1 where the latents are noise to
the model, which it takes out again (a perfect denoiser of one image has lambda = 1 / sigma), and 0 where it takes an
error for a part of the image. With guidance an answer also points elsewhere than its error. As far as both lie in the
recorded directions, a matrix for each step says where (`fit_mixing`).

What is left out: answers outside of these directions, and answers that do not grow in proportion to their errors. Real
runs then end further off than simulated ones, most of all with strong guidance. And only predictions are simulated
(site=output): at site=stack a skipped step still runs the output layers, which change with time, and plans rank
otherwise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from dpcache._diffusers import StepListener, copy_of_scheduler, watching
from dpcache.errors import SettingError
from dpcache.gram import weight_tables
from dpcache.linear_sampler import LinearSampler, read_sampler
from dpcache.method import Method
from dpcache.predictors import AdamsBashforth, Lagrange, LeastSquares, Predictor, Reuse, Taylor
from dpcache.sampler import Batch, sample
from dpcache.schedules import EvenlySpaced, OnlineSchedule, Schedule
from dpcache.session import Report

KNOTS = 12  # values of the response curve
ELEMENTS = 4096  # of the latents at most, by which runs are told; of FLUX.1-dev's at 1024 x 1024 one in 64
Plan = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Recorded:
    """What is kept of the reference runs of P prompts: of E elements of the latents, the same of all prompts.

    Attributes:
        predictions: (P, T, E), m_0 .. m_{T-1}, what the model predicts at the latents below, float32.
        states: (P, T+1, E), the latents x_0 .. x_T, float32.
        sampler: the scheduler's arithmetic.
        input_fits: whether the model's input has the shape of its prediction, which it has not where the prediction
            has a learned variance or the input a further image.
        finer: whether the runs have more than T steps, of which these are the T that accelerated runs have.
    """

    predictions: np.ndarray
    states: np.ndarray
    sampler: LinearSampler
    input_fits: bool = True
    finer: bool = False

    @property
    def steps(self) -> int:
        """T."""
        return self.sampler.steps

    @property
    def inputs_known(self) -> bool:
        """Whether predictors that see the input can be simulated and run."""
        return self.input_fits and not self.sampler.noisy

    @cached_property
    def sizes(self) -> np.ndarray:
        """(P,): |x_T|. In units of it errors are relative, and loud prompts count no more than others."""
        return np.linalg.norm(self.states[:, -1].astype(float), axis=1)

    @cached_property
    def aims(self) -> np.ndarray:
        """(P, T, E): v_0 .. v_{T-1}, the predictions that take the sampler from x_s to x_{s+1}."""
        if not self.finer:
            return self.predictions
        states, unmoved = (part.swapaxes(0, 1) for part in (self.states, self.predictions))
        return self.sampler.predictions_between(states, unmoved).swapaxes(0, 1)

    @cached_property
    def gram(self) -> np.ndarray:
        """(P, 2T+1, 2T+1): products of m_0 .. m_{T-1} and x_0 .. x_T in units of |x_T|^2."""
        rows = np.concatenate([self.predictions, self.states], 1).astype(float)
        return rows @ rows.swapaxes(1, 2) / self.sizes[:, None, None] ** 2

    @cached_property
    def remaining(self) -> np.ndarray:
        """(P, T): |x_s - x_T| / |x_T|."""
        to_go = (self.states[:, :-1] - self.states[:, -1:]).astype(float)
        return np.linalg.norm(to_go, axis=2) / self.sizes[:, None]

    @cached_property
    def directions(self) -> np.ndarray:
        """(2T+1, r): directions as sums of the recorded predictions and latents, by falling length of what lies along
        them from the last. Mean over prompts, they are of length 1 and at right angles. Trajectories are smooth, so
        that few directions hold all but 1e-10 of their squared length."""
        values, vectors = np.linalg.eigh(self.gram.mean(0))
        held = values.clip(0).cumsum() > 1e-10 * values.sum()
        return vectors[:, held] / np.sqrt(values[held])

    @cached_property
    def leading(self) -> int:
        """How many of the directions hold all but 1e-6."""
        lengths = np.square(self.gram.mean(0) @ self.directions).sum(0)
        return int((lengths.cumsum() > 1e-6 * lengths.sum()).sum())

    def along(self, values: np.ndarray, prompt: np.ndarray) -> np.ndarray:
        """Coordinates (n, r) of values (n, E), each of the prompt with that number, in the leading directions: of the
        nearest sum of these."""
        found, last = np.zeros((len(values), self.leading)), self.directions[:, -self.leading :]
        for number in np.unique(prompt):
            rows = np.concatenate([self.predictions[number], self.states[number]]) / self.sizes[number]
            axes, these = last.T @ rows, prompt == number
            found[these] = np.linalg.solve(axes @ axes.T, axes @ values[these].T).T
        return found

    def errors(self, latents: np.ndarray, start: int = 0) -> np.ndarray:
        """Relative distances (n,) of final latents (n, ...) to x_T, of the prompts from number `start` on."""
        kept, these = kept_elements(torch.as_tensor(latents)), slice(start, start + len(latents))
        return np.linalg.norm(kept - self.states[these, -1], axis=1) / self.sizes[these]

    def check_inputs(self) -> None:
        """Raises SettingError where predictors cannot see the input."""
        if not self.inputs_known:
            why = "has another shape than the prediction" if not self.input_fits else "holds the scheduler's noise"
            raise SettingError(f"predictors that see the model's input cannot be simulated: it {why}")

    def least_squares(self, history: int, sees_input: bool = False, ridge: float = 1e-6) -> LeastSquares:
        """The predictor with the smallest mean error on these trajectories."""
        if sees_input:
            self.check_inputs()
        rows = 2 * self.steps if sees_input else self.steps
        return LeastSquares(self.gram.mean(0)[:rows, :rows], history, ridge, sees_input)


@dataclass(frozen=True, eq=False)
class Answers:
    """How the model answered errors of its latents where accelerated runs computed a step, n observations.

    Attributes:
        step, prompt: (n,), which step of which prompt.
        error, answer: (n, E), dx and dv = q - m there, in units of |x_T|.
    """

    step: np.ndarray
    prompt: np.ndarray
    error: np.ndarray
    answer: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Answers"]) -> "Answers":
        """All of their observations."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    @property
    def heard(self) -> "Answers":
        """Those to an error."""
        some = ((self.error**2).sum(1) > 1e-12) & ((self.answer**2).sum(1) > 0)
        return type(self)(*(getattr(self, name)[some] for name in self.__dataclass_fields__))


def elements_of(size: int) -> np.ndarray:
    """Which elements of latents of `size` each are kept: all, or as many at random as bound the memory."""
    return np.sort(np.random.default_rng(0).permutation(size)[:ELEMENTS])


def kept_elements(latents: torch.Tensor, prompts: int | None = None) -> np.ndarray:
    """The kept elements (B, E) of the latents of that many prompts, float32. Where guidance doubles the batch within
    the sampler, both halves are the same."""
    flat = latents[:prompts].flatten(1)
    return flat[:, torch.as_tensor(elements_of(flat.shape[1]), device=flat.device)].float().cpu().numpy()


class _Recorder(StepListener):
    """Keeps what the scheduler is given at every step of one batch, and a copy of it from before the first."""

    def __init__(self, scheduler, prompts: int):
        self.watched, self.prompts, self.scheduler = scheduler, prompts, None
        self.calls, self.predictions, self.latents = [], [], []

    def given(self, scheduler, arguments):
        if scheduler is not self.watched:  # a copy, with which some pipelines step something else beside the image
            return
        if self.scheduler is None:
            self.scheduler = copy_of_scheduler(scheduler)
        prediction, latents = arguments["model_output"], arguments["sample"]
        if prediction.shape != latents.shape:
            raise SettingError(
                f"{type(scheduler).__name__} takes predictions {tuple(prediction.shape)} for latents "
                f"{tuple(latents.shape)}: the simulator takes one value for each"
            )
        rest = ("model_output", "sample", "return_dict")
        self.calls.append({name: value for name, value in arguments.items() if name not in rest})
        self.predictions.append(kept_elements(prediction, self.prompts))
        self.latents.append(kept_elements(latents, self.prompts))

    @property
    def times(self) -> np.ndarray:
        """The timestep of each step, (T,)."""
        return np.array([float(call["timestep"]) for call in self.calls])


def _run(
    pipe, method: Method, prompts, seeds, call, observe: Callable | None = None
) -> tuple[_Recorder, np.ndarray, np.ndarray, Batch]:
    """One batch: predictions (B, T, E), latents (B, T+1, E), and what the pipeline returned."""
    recorder = _Recorder(pipe.scheduler, len(prompts))
    with watching(pipe.scheduler, recorder):
        batch = sample(pipe, method, prompts, seeds, decode=False, observe=observe, **call)
    states = [*recorder.latents, kept_elements(batch.latents, len(prompts))]
    return recorder, np.stack(recorder.predictions, 1), np.stack(states, 1), batch


def record(
    pipe,
    batches: Sequence[tuple[Sequence[str], Sequence[int]]],
    num_inference_steps: int,
    probes: Sequence[tuple[Plan, Predictor]],
    count: Callable[[Report, list[int]], None] = lambda report, prompts: None,
    finer: int = 1,
    **call,
) -> tuple[Recorded, Answers | None, np.ndarray]:
    """Run prompts with every step computed, and some of them again with plans that are only to be learnt from.

    Args:
        batches: prompts and their seeds.
        num_inference_steps: T.
        probes: plans and predictors, dealt out to the batches in turn, each to two of the batch's prompts.
        count: told of every run what it did, and of how many prompts.
        finer: the recorded runs have so many times T steps, of which those at the times of the T are kept.
        call: further arguments of the pipeline.

    Returns the recorded runs, the model's answers (None without probes), and the runs' final latents, (P, ...).

    Raises SettingError for a scheduler whose step is not linear, for one that adds noise if `finer` is above 1, and for
    a pipeline of two models.
    """
    T, predictions, states, finals, probed, sampler = num_inference_steps, [], [], [], [], None
    steps, shapes = finer * T, {}
    full = Method(EvenlySpaced(steps, steps), "output", Reuse())

    def observe(branch, step, name, tensor):
        shapes[name] = tuple(tensor.shape)

    for number, (prompts, seeds) in enumerate(batches):
        recorder, m, x, batch = _run(pipe, full, prompts, seeds, call, observe)
        count(batch.report, [len(prompts)])
        finals.append(batch.latents)
        if batch.report.switches:
            raise SettingError("the simulator does not know pipelines in which a second model takes over")
        runs = []
        for turn, (plan, predictor) in enumerate(probes[number :: len(batches)]):
            some = sorted({(2 * turn + i) % len(prompts) for i in range(2)})
            method = Method(Schedule(plan, T), "output", predictor)
            runs.append((plan, some, *_run(pipe, method, [prompts[i] for i in some], [seeds[i] for i in some], call)))
            count(runs[-1][-1].report, [len(some)])
        if sampler is None:
            grid = runs[0][2] if runs else recorder
            sampler = read_sampler(grid.scheduler, grid.calls)
            if sampler.noisy and steps != T:
                name = type(grid.scheduler).__name__
                raise SettingError(f"finer={finer}: {name} adds noise, so that runs of more steps end elsewhere")
        if steps != T:
            m, x = at_times(m, x, recorder.times, grid.times)
        first = sum(map(len, states))
        probed += [(plan, [first + i for i in some], q, y) for plan, some, _, q, y, _ in runs]
        predictions.append(m)
        states.append(x)
    recorded = Recorded(
        np.concatenate(predictions),
        np.concatenate(states),
        sampler,
        input_fits=shapes["input"] == shapes["output"],
        finer=steps != T,
    )
    answers = [_answers(plan, some, recorded, q, y) for plan, some, q, y in probed]
    answers = Answers.join(answers) if answers else None
    return recorded, answers, torch.cat(finals).numpy()


def at_times(
    predictions: np.ndarray, states: np.ndarray, times: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and latents of a run of more steps at T of its `times`, or on the line between two of them. The first
    and the last latents stay as they are.

    Args:
        predictions, states: (B, T', E) and (B, T'+1, E).
        times, wanted: (T',) and (T,), falling.

    Returns (B, T, E) and (B, T+1, E).
    """
    place = np.interp(-wanted, -times, np.arange(len(times)))
    low = np.minimum(place.astype(int), len(times) - 2)
    part = (place - low)[:, None].astype(np.float32)

    def between(values: np.ndarray) -> np.ndarray:
        return (1 - part) * values[:, low] + part * values[:, low + 1]

    inner = between(states[:, :-1])[:, 1:]
    return between(predictions), np.concatenate([states[:, :1], inner, states[:, -1:]], 1)


def _answers(plan: Plan, prompts: Sequence[int], recorded: Recorded, q: np.ndarray, y: np.ndarray) -> Answers:
    """From predictions and latents of a plan's runs of these prompts, (B, T, E) and (B, T+1, E). Where nothing was
    skipped before, there is no error to answer."""
    T, prompts = recorded.steps, np.array(prompts)
    skipped = next((step for step in range(T) if step not in plan), T)
    keys = np.array([step for step in plan if step > skipped], int)
    these, size = np.ix_(prompts, keys), recorded.sizes[prompts, None, None]
    moved = [(y[:, keys] - recorded.states[these]) / size, (q[:, keys] - recorded.predictions[these]) / size]
    each = np.tile(keys, len(prompts)), np.repeat(prompts, len(keys))
    return Answers(*each, *(part.reshape(-1, part.shape[2]) for part in moved))


def random_probes(number: int, num_inference_steps: int, seed: int = 0) -> list[tuple[Plan, Predictor]]:
    """Plans of an eighth to four tenths of the steps, one at random in each of as many equal parts, with three
    predictors in turn: their errors are of several sizes, but not so large that the model answers in another way than
    it does to those of good plans."""
    random, T = np.random.default_rng(seed), num_inference_steps
    probes = []
    for turn in range(number):
        budget = max(round(T * float(np.exp(random.uniform(np.log(0.125), np.log(0.4))))), 2)
        edges = np.linspace(1, T, budget).round().astype(int)
        plan = (0, *(int(random.integers(low, high)) for low, high in pairwise(edges)))
        probes.append((plan, (Taylor(1), Lagrange(2), AdamsBashforth(2))[turn % 3]))
    return probes


def fit_response(answers: Answers, recorded: Recorded, knots: int = KNOTS, smooth: float = 1e-3) -> np.ndarray:
    """lambda, (T,): a curve c(s) / remaining, c linear between evenly spaced steps, that least squares fit to the
    answers: the least sum over observations of remaining |dv - lambda dx|^2 / (|dv| |dx|).

    Args:
        knots: how many values the curve has.
        smooth: the weight of the curve's squared second differences, against one observation's.
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
    """What an answer has beside lambda dx, (T, r, r): an error c in the r leading directions of the recorded runs is
    answered with c @ mixing[s] in these as well. In units of 1 / remaining it is linear between evenly spaced steps,
    and fitted by least squares, every observation in units of its error.

    Args:
        response: lambda.
        knots: at how many steps it is fitted.
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


def _hats(steps: int, knots: int) -> np.ndarray:
    """(T, knots): the weights of values at evenly spaced steps in a line from each to the next."""
    at = np.linspace(0, knots - 1, steps)[:, None]
    return np.maximum(1 - np.abs(at - np.arange(knots)), 0)


@dataclass(frozen=True, eq=False)
class Fill:
    """How N plans fill in their steps: the plans and the predictor's weights as arrays.

    Attributes:
        computed: (N, T), bool.
        sources, weights: (N, T, h), the steps that a skipped one is predicted from, and their weights; source -1 and
            weight 0 where there are fewer than h.
        own: (N, T), the weight of the input, where the predictor sees it.
    """

    computed: np.ndarray
    sources: np.ndarray
    weights: np.ndarray
    own: np.ndarray | None

    @classmethod
    def unweighted(cls, plans: Sequence[Sequence[int]], history: int, sees_input: bool, steps: int) -> "Fill":
        """Of plans that begin with step 0, each skipped step from the last `history` keys; all weights are 0."""
        computed = np.zeros((len(plans), steps), bool)
        sources = np.full((len(plans), steps, min(history, max(map(len, plans)))), -1)
        for n, plan in enumerate(plans):
            computed[n, list(plan)] = True
            for i, (key, end) in enumerate(zip(plan, [*plan[1:], steps])):
                tail = plan[max(i - history + 1, 0) : i + 1]
                sources[n, key + 1 : end, : len(tail)] = tail
        own = np.zeros(computed.shape) if sees_input else None
        return cls(computed, sources, np.zeros(sources.shape), own)

    @classmethod
    def of(cls, method: Method) -> "Fill":
        """Of a method with fixed steps, the first of which is step 0."""
        predictor, plan, T = method.predictor, method.schedule.steps, method.num_inference_steps
        fill = cls.unweighted([plan], predictor.history, predictor.sees_input, T)
        for step in sorted(set(range(T)) - set(plan)):
            keys = [key for key in fill.sources[0, step].tolist() if key >= 0]
            weights = list(predictor.weights(keys, step))
            if fill.own is not None:
                fill.own[0, step] = weights.pop()
            fill.weights[0, step, len(keys) - len(weights) : len(keys)] = weights
        return fill

    def table(self, number: int) -> dict[int, tuple[float, ...]]:
        """Of one plan's skipped steps the weights of their sources, and of the input where it is seen."""
        weights = {}
        for step in np.flatnonzero(~self.computed[number]).tolist():
            row = self.weights[number, step, self.sources[number, step] >= 0].tolist()
            weights[step] = tuple(row if self.own is None else [*row, self.own[number, step].item()])
        return weights

    @classmethod
    def join(cls, fills: Sequence["Fill"]) -> "Fill":
        """All of their plans."""
        if len(fills) == 1:
            return fills[0]
        longest = max(fill.weights.shape[2] for fill in fills)

        def pad(x: np.ndarray, value: int = 0) -> np.ndarray:
            return np.pad(x, ((0, 0), (0, 0), (0, longest - x.shape[2])), constant_values=value)

        own = [np.zeros(fill.computed.shape) if fill.own is None else fill.own for fill in fills]
        return cls(
            np.concatenate([fill.computed for fill in fills]),
            np.concatenate([pad(fill.sources, -1) for fill in fills]),
            np.concatenate([pad(fill.weights) for fill in fills]),
            np.concatenate(own) if any(fill.own is not None for fill in fills) else None,
        )


class Weights:
    """A predictor's weights over T steps, asked for once for each set of latest keys."""

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


@dataclass(frozen=True, eq=False)
class Simulator:
    """Accelerated runs of the recorded prompts, simulated.

    Attributes:
        recorded: the reference runs.
        response: (T,), lambda.
        mixing: (T, r, r), what else an answer holds, see `fit_mixing`; None: nothing.
    """

    recorded: Recorded
    response: np.ndarray
    mixing: np.ndarray | None = None

    def predict_error(self, method: Method) -> float:
        """The relative error that `method` will leave in the final latents, |x - full-step x| / |full-step x|: the
        geometric mean over the recorded prompts, so that its decibels are the mean of theirs.

        Raises SettingError for a method whose steps are not fixed, or that keeps something else than the prediction.
        """
        T = self.recorded.steps
        if isinstance(method.schedule, OnlineSchedule):
            raise SettingError(f"{type(method.schedule).__name__} decides online: the simulator takes fixed steps")
        if method.num_inference_steps != T:
            raise SettingError(f"num_inference_steps={method.num_inference_steps}: the simulator was made for {T}")
        if method.site.name != "output":
            raise SettingError(f"site={method.site.name}: the simulator takes site=output")
        errors = self.errors(Fill.of(method))
        return float(10 ** (-decibels(errors)[0] / 20))

    def pack(self) -> np.ndarray:
        """As one array, for a calibration's file."""
        known, sampler, T = self.recorded, self.recorded.sampler, self.recorded.steps
        mixing = np.zeros((T, 0, 0)) if self.mixing is None else self.mixing
        sizes = [known.directions.shape[1], mixing.shape[1], sampler.drive.shape[1]]
        head = [T, *known.states.shape[::2], *sizes, sampler.noisy, known.input_fits, known.finer]
        parts = [known.predictions, known.states, known.directions, self.response, mixing]
        parts += [sampler.response, sampler.start, sampler.carry, sampler.drive]
        return np.concatenate([head, *(part.ravel() for part in parts)])

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "Simulator":
        """Of what `pack` made."""
        T, P, E, r, mixed, memory, noisy, fits, finer = packed[:9].astype(int)
        shapes = [(P, T, E), (P, T + 1, E), (2 * T + 1, r), (T,), (T, mixed, mixed)]
        shapes += [(T + 1, T), (T + 1,), (T, memory), (T, memory)]
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        parts = [part.reshape(shape) for part, shape in zip(np.split(packed[9:], ends), shapes)]
        paths = (part.astype(np.float32) for part in parts[:2])
        recorded = Recorded(*paths, LinearSampler(*parts[5:], bool(noisy)), bool(fits), bool(finer))
        vars(recorded)["directions"] = parts[2]  # another machine might find them with other signs
        return cls(recorded, parts[3], parts[4])

    @cached_property
    def _space(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates of m_0 .. m_{T-1}, of v_0 .. v_{T-1} and of x_0 .. x_T, (T, r) and (T+1, r), and every prompt's
        Gram matrix of the r axes, whose mean over prompts is the identity."""
        each, dual, T = self.recorded.gram, self.recorded.directions, self.recorded.steps
        m, x = np.split(each.mean(0) @ dual, [T])
        v = self.recorded.sampler.predictions_between(x, m) if self.recorded.finer else m
        return m, v, x, dual.T @ each @ dual

    def errors(self, fill: Fill) -> np.ndarray:
        """Relative errors of the final latents, (N, P)."""
        return self._simulate(fill)

    def closed_loop(
        self, plans: Sequence[Sequence[int]], history: int, sees_input: bool = False, ridge: float = 1e-6
    ) -> tuple[np.ndarray, Fill]:
        """Errors as above, and with which weights: at each skipped step those that bring the latents after it as close
        to the full-step ones as the last `history` computed predictions (and the input) can, in the mean over prompts.

        Args:
            plans: each beginning with step 0.
            ridge: above 0, in units of the mean squared length of what is predicted from, as of `LeastSquares`.

        Raises SettingError as `Recorded.check_inputs` does, for weights of the input.
        """
        if sees_input:
            self.recorded.check_inputs()
        fill = Fill.unweighted(plans, history, sees_input, self.recorded.steps)
        return self._simulate(fill, ridge), fill

    def _simulate(self, fill: Fill, ridge: float | None = None) -> np.ndarray:
        """Relative errors of the final latents, (N, P). With a ridge, the weights are found and written into `fill`."""
        sampler, (m, v, x, metrics) = self.recorded.sampler, self._space
        T, shape = self.recorded.steps, (len(fill.computed), v.shape[1])
        mixed = 0 if self.mixing is None else self.mixing.shape[1]
        q, dv, dx = np.zeros((T, *shape)), np.zeros((T, *shape)), np.zeros((T + 1, *shape))
        for s in range(T):
            dx[s + 1] = sampler.carried(s, dx, dv)
            drive = sampler.drive[s, 0]
            run, skip = np.flatnonzero(fill.computed[:, s]), np.flatnonzero(~fill.computed[:, s])
            q[s, run] = m[s] + self.response[s] * dx[s, run]
            if mixed:
                q[s, run, -mixed:] += dx[s, run, -mixed:] @ self.mixing[s]
            if len(skip):
                sources = fill.sources[skip, s]
                seen = q[sources, skip[:, None]] * (sources >= 0)[..., None]  # (n, h, r)
                weights = fill.weights[skip, s]
                if fill.own is not None:
                    seen = np.concatenate([seen, (x[s] + dx[s, skip])[:, None]], 1)
                    weights = np.concatenate([weights, fill.own[skip, s, None]], 1)
                if ridge is not None:
                    aim = v[s] - (dx[s + 1, skip] / drive if drive else 0)
                    among = seen @ seen.swapaxes(1, 2)
                    noise = ridge * np.trace(among, axis1=1, axis2=2) / among.shape[1]
                    among += noise[:, None, None] * np.eye(among.shape[1])
                    weights = np.linalg.solve(among, seen @ aim[..., None])[..., 0]
                    fill.weights[skip, s] = weights[:, : sources.shape[1]]
                    if fill.own is not None:
                        fill.own[skip, s] = weights[:, -1]
                q[s, skip] = (weights[:, None] @ seen)[:, 0]
            dv[s] = q[s] - v[s]
            dx[s + 1] += drive * dv[s]
        squares = np.einsum("pnr,nr->np", dx[T] @ metrics, dx[T])
        return np.sqrt(np.maximum(squares, 1e-20))


def decibels(errors: np.ndarray) -> np.ndarray:
    """Of relative errors (..., P), the mean over prompts of -20 log10: each prompt counts alike, as in a mean PSNR. An
    error counts as 1e-10 at least."""
    return -20 * np.log10(np.maximum(errors, 1e-10)).mean(-1)
