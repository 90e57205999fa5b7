"""How far a plan's accelerated run will end from the full-step one, without running the model.

Full-step runs are recorded once: the predictions v_0 .. v_{T-1} that the scheduler is given (after guidance), the first
latents x_0, and how far the latents x_s still are from their end. An accelerated run is then simulated:

    computed step   q_s = v_s + lambda_s dx_s                  the model answers an error of its latents with another
    skipped step    q_s = sum_a w_a q_a + u (x_s + dx_s)       the predictor's weights of earlier keys a (and the input)
    the sampler     dx_{s+1} = sum_j carry[s, j] dx_{s-j} + drive[s, j] (q_{s-j} - v_{s-j})       (`linear_sampler`)

from dx_0 = 0 to dx_T, the error of the final latents. All q, v, x and dx are combinations of v_0 .. v_{T-1} and x_0, so
they are vectors of T + 1 coefficients c, and the length of what they stand for is sqrt(c' G c), with G the Gram matrix
of v_0 .. v_{T-1}, x_0. The model is only run to learn G and lambda.

The weights may also be found in the simulation itself (`Simulator.closed_loop`). A predictor that knows the full-step
trajectories alone aims at v_s. In an accelerated run it is better to aim at the prediction that brings the latents
back to the full-step ones, dx_{s+1} = 0. So errors that earlier steps have left, as far as they are alike for all
prompts, are taken back by later skipped steps.

The response lambda_s is measured where accelerated runs compute a step: there both dx_s and the model's answer
q_s - v_s are known. In units of 1 / distance to the end it is a smooth curve, about 1 where the latents are noise to
the model, which it takes out again (a perfect denoiser of one image has lambda = 1 / sigma), and 0 where it takes an
error for a part of the image.

What is left out: the part of an answer that does not point along its error. Real runs then end further off than
simulated ones, most of all with strong guidance and large errors. And only predictions are simulated (site=output): at
site=stack a skipped step still runs the output layers, which change with time, and plans rank otherwise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from dpcache._diffusers import StepListener, copy_of_scheduler, watch_steps
from dpcache.errors import SettingError
from dpcache.gram import gram, weight_tables
from dpcache.linear_sampler import LinearSampler, read_sampler
from dpcache.method import Method
from dpcache.predictors import AdamsBashforth, Lagrange, LeastSquares, Predictor, Reuse, Taylor
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced, OnlineSchedule, Schedule
from dpcache.session import Report

KNOTS = 12  # values of the response curve
Plan = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Recorded:
    """What is kept of the full-step runs of P prompts.

    Attributes:
        gram: (P, T+1, T+1), mean products of v_0 .. v_{T-1} and x_0 over the elements, divided by those of the final
            latents with themselves: errors come out relative, and loud prompts count no more than others.
        remaining: (P, T), |x_s - x_T| / |x_T|.
        latents: (P, ...), final, float32.
        sampler: the scheduler's arithmetic.
        input_fits: whether the model's input has the shape of its prediction, which it has not where the prediction
            has a learned variance or the input a further image.
    """

    gram: np.ndarray
    remaining: np.ndarray
    latents: np.ndarray
    sampler: LinearSampler
    input_fits: bool = True

    @property
    def steps(self) -> int:
        """T."""
        return self.sampler.steps

    @property
    def inputs_known(self) -> bool:
        """Whether predictors that see the input can be simulated and run."""
        return self.input_fits and not self.sampler.noisy

    @cached_property
    def inputs(self) -> np.ndarray:
        """(T, T+1): the latents x_s in terms of v_0 .. v_{T-1}, x_0."""
        return np.concatenate([self.sampler.response, self.sampler.start[:, None]], 1)[:-1]

    def check_inputs(self) -> None:
        """Raises SettingError where predictors cannot see the input."""
        if not self.inputs_known:
            why = "has another shape than the prediction" if not self.input_fits else "holds the scheduler's noise"
            raise SettingError(f"predictors that see the model's input cannot be simulated: it {why}")

    def least_squares(self, history: int, sees_input: bool = False, ridge: float = 1e-6) -> LeastSquares:
        """The predictor with the smallest mean error on these trajectories."""
        rows = np.eye(self.steps, self.steps + 1)
        if sees_input:
            self.check_inputs()
            rows = np.concatenate([rows, self.inputs])
        return LeastSquares(rows @ self.gram.mean(0) @ rows.T, history, ridge, sees_input)


@dataclass(frozen=True, eq=False)
class Answers:
    """How the model answered errors of its latents where accelerated runs computed a step, n observations.

    Attributes:
        step: (n,), which step.
        error, product, answer: (n,), <dx, dx>, <dx, dv> and <dv, dv>, in units of |x_T|^2.
    """

    step: np.ndarray
    error: np.ndarray
    product: np.ndarray
    answer: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Answers"]) -> "Answers":
        """All of their observations."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


class _Recorder(StepListener):
    """Keeps what the scheduler is given at every step of one batch, and a copy of it from before the first."""

    def __init__(self, prompts: int):
        self.prompts, self.scheduler = prompts, None
        self.calls, self.predictions, self.latents = [], [], []

    def given(self, scheduler, arguments):
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
        # Where guidance doubles the batch within the sampler, both halves are the same.
        self.predictions.append(prediction[: self.prompts].float().cpu())
        self.latents.append(latents[: self.prompts].float().cpu())


def _run(
    pipe, method: Method, prompts, seeds, call, observe: Callable | None = None
) -> tuple[_Recorder, torch.Tensor, torch.Tensor, Report]:
    """One batch: predictions (T, B, ...), latents (T+1, B, ...) and what the method did."""
    recorder = _Recorder(len(prompts))
    unwatch = watch_steps(pipe.scheduler, recorder)
    try:
        batch = sample(pipe, method, prompts, seeds, decode=False, observe=observe, **call)
    finally:
        unwatch()
    return recorder, torch.stack(recorder.predictions), torch.stack([*recorder.latents, batch.latents]), batch.report


def record(
    pipe,
    batches: Sequence[tuple[Sequence[str], Sequence[int]]],
    num_inference_steps: int,
    probes: Sequence[tuple[Plan, Predictor]],
    count: Callable[[Report, list[int]], None] = lambda report, prompts: None,
    **call,
) -> tuple[Recorded, Answers]:
    """Run prompts with every step computed, and some of them again with plans that are only to be learnt from.

    Predictions and latents of one batch are held at a time.

    Args:
        batches: prompts and their seeds.
        probes: plans and predictors, dealt out to the batches in turn, each to two of the batch's prompts.
        count: told of every run what it did, and of how many prompts.
        call: further arguments of the pipeline.

    Raises SettingError for a scheduler whose step is not linear, and for a pipeline of two models.
    """
    T, grams, remaining, finals, answers, sampler = num_inference_steps, [], [], [], [], None
    full, shapes = Method(EvenlySpaced(T, T), "output", Reuse()), {}

    def observe(branch, step, name, tensor):
        shapes[name] = tuple(tensor.shape)

    for number, (prompts, seeds) in enumerate(batches):
        recorder, v, x, report = _run(pipe, full, prompts, seeds, call, observe)
        count(report, [len(prompts)])
        if report.switches:
            raise SettingError("the simulator does not know pipelines in which a second model takes over")
        sampler = sampler or read_sampler(recorder.scheduler, recorder.calls)
        finals.append(x[-1])
        for one in range(len(prompts)):
            size = x[-1, one].double().square().mean().item()
            grams.append(gram([v[:, one], x[:1, one]]) / size)
            to_go = (x[:-1, one] - x[-1, one]).double().square().flatten(1).mean(1)
            remaining.append((to_go / size).sqrt().numpy())
        for turn, (plan, predictor) in enumerate(probes[number :: len(batches)]):
            some = sorted({(2 * turn + i) % len(prompts) for i in range(2)})
            method = Method(Schedule(plan, T), "output", predictor)
            _, q, y, report = _run(pipe, method, [prompts[i] for i in some], [seeds[i] for i in some], call)
            count(report, [len(some)])
            answers.append(_answers(plan, v[:, some], x[:, some], q, y))
    fits, latents = shapes["input"] == shapes["output"], torch.cat(finals).numpy()
    return Recorded(np.stack(grams), np.stack(remaining), latents, sampler, fits), Answers.join(answers)


def read_steps(pipe, prompt, seed: int, num_inference_steps: int, **call) -> tuple[np.ndarray, LinearSampler]:
    """The scheduler's times (T,) and arithmetic in a run of T steps, of which only the first runs the model."""
    once = Method(EvenlySpaced(1, num_inference_steps), "output", Reuse())
    recorder, *_ = _run(pipe, once, [prompt], [seed], call)
    times = np.array([float(arguments["timestep"]) for arguments in recorder.calls])
    return times, read_sampler(recorder.scheduler, recorder.calls)


def _answers(plan: Plan, v: torch.Tensor, x: torch.Tensor, q: torch.Tensor, y: torch.Tensor) -> Answers:
    """From predictions and latents of the full-step run (v, x) and of a plan's (q, y), (T, B, ...) each. Where nothing
    was skipped before, there is no error to answer."""
    skipped = next((step for step in range(len(v)) if step not in plan), len(v))
    keys = [step for step in plan if step > skipped]
    size = x[-1].double().square().flatten(1).sum(1)
    dx = (y[keys] - x[keys]).double().flatten(2)
    dv = (q[keys] - v[keys]).double().flatten(2)
    products = [(a * b).sum(2) / size for a, b in ((dx, dx), (dx, dv), (dv, dv))]
    return Answers(np.repeat(keys, len(size)).astype(int), *(part.flatten().numpy() for part in products))


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
    T, remaining = recorded.steps, recorded.remaining.mean(0)
    at = np.linspace(0, knots - 1, T)[:, None]
    hats = np.maximum(1 - np.abs(at - np.arange(knots)), 0)  # (T, knots)
    heard = (answers.error > 1e-12) & (answers.answer > 0)
    step, error, product, answer = (getattr(answers, name)[heard] for name in Answers.__dataclass_fields__)
    each, unit = hats[step], remaining[step]
    normal = each.T @ (each * (np.sqrt(error / answer) / unit)[:, None])
    bend = np.diff(np.eye(knots), 2, axis=0)
    right = each.T @ (product / np.sqrt(error * answer))
    return hats @ np.linalg.solve(normal + smooth * len(step) * bend.T @ bend, right) / remaining


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
        recorded: the full-step runs.
        response: (T,), lambda.
    """

    recorded: Recorded
    response: np.ndarray

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
        """All but the latents as one array, for a calibration's file."""
        known, sampler = self.recorded, self.recorded.sampler
        head = [known.steps, len(known.gram), sampler.drive.shape[1], sampler.noisy, known.input_fits]
        parts = (known.gram, known.remaining, sampler.response, sampler.start, sampler.carry, sampler.drive)
        return np.concatenate([head, *(part.ravel() for part in parts), self.response])

    @classmethod
    def unpack(cls, packed: np.ndarray, latents: np.ndarray) -> "Simulator":
        """Of what `pack` made, and the full-step runs' final latents (P, ...)."""
        T, P, memory, noisy, fits = packed[:5].astype(int)
        shapes = [(P, T + 1, T + 1), (P, T), (T + 1, T), (T + 1,), (T, memory), (T, memory), (T,)]
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        parts = [part.reshape(shape) for part, shape in zip(np.split(packed[5:], ends), shapes)]
        sampler = LinearSampler(*parts[2:6], bool(noisy))
        return cls(Recorded(*parts[:2], latents, sampler, bool(fits)), parts[6])

    @cached_property
    def _space(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates of v_0 .. v_{T-1} and of x_0 .. x_{T-1}, (T, r), and every prompt's Gram matrix of the r axes,
        whose mean over prompts is the identity.

        Recorded are smooth, so that r < T + 1 directions hold all but 1e-10 of their squared length.
        """
        each, T = self.recorded.gram, self.recorded.steps
        values, vectors = np.linalg.eigh(each.mean(0))
        held = values.clip(0).cumsum() > 1e-10 * values.sum()
        vectors, lengths = vectors[:, held], np.sqrt(values[held])
        axes, dual = vectors * lengths, vectors / lengths
        return axes[:T], self.recorded.inputs @ axes, dual.T @ each @ dual

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
        sampler, (v, x, metrics) = self.recorded.sampler, self._space
        T, shape = self.recorded.steps, (len(fill.computed), v.shape[1])
        q, dx = np.zeros((T, *shape)), np.zeros((T + 1, *shape))
        for s in range(T):
            for back in range(min(sampler.carry.shape[1], s + 1)):  # what earlier steps have left
                dx[s + 1] += sampler.carry[s, back] * dx[s - back]
                if back:
                    dx[s + 1] += sampler.drive[s, back] * (q[s - back] - v[s - back])
            drive = sampler.drive[s, 0]
            run, skip = np.flatnonzero(fill.computed[:, s]), np.flatnonzero(~fill.computed[:, s])
            q[s, run] = v[s] + self.response[s] * dx[s, run]
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
            dx[s + 1] += drive * (q[s] - v[s])
        squares = np.einsum("pnr,nr->np", dx[T] @ metrics, dx[T])
        return np.sqrt(np.maximum(squares, 1e-20))


def decibels(errors: np.ndarray) -> np.ndarray:
    """Of relative errors (..., P), the mean over prompts of -20 log10: each prompt counts alike, as in a mean PSNR. An
    error counts as 1e-10 at least."""
    return -20 * np.log10(np.maximum(errors, 1e-10)).mean(-1)
