"""Recorded runs: the latents and predictions of full-step runs, and the model's answers to the errors of a few
accelerated runs. The simulator (`dpcache.simulator`) is built from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from dpcache._diffusers import StepListener, copy_of_scheduler, watching
from dpcache.calibration import finite_or_worst
from dpcache.errors import SettingError
from dpcache.linear_sampler import HANDED_BACK, LinearSampler, read_sampler
from dpcache.method import Method
from dpcache.predictors import AdamsBashforth, Lagrange, LeastSquares, Predictor, Reuse, Taylor
from dpcache.sampler import Batch, sample
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.session import Report

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

DIRECTIONS = 128  # at most so many coordinates stand for simulated latents; with T < 128 they hold all that is recorded
ELEMENTS = 4096  # at most so many elements of each prompt's latents are kept; of FLUX.1-dev's at 1024 x 1024 one in 64
Plan = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Recorded:
    """The reference runs of P prompts, at E elements of the latents, the same elements for all prompts.

    Attributes:
        predictions: (P, T, E), m_0 .. m_{T-1}, what the model predicts at the latents below, float32.
        states: (P, T+1, E), the latents x_0 .. x_T, float32.
        sampler: the scheduler's arithmetic.
        input_fits: whether the model's input has the shape of its prediction. It does not if the prediction has a
            learned variance or the input a further image.
        finer: whether the runs have more than T steps; recorded are those at the times of the T steps.
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
        """(P,): |x_T|. Errors are divided by it, so that prompts with large latents count no more than others."""
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
        """(2T+1, r): the principal directions, as sums of the recorded predictions and latents; the last one holds most
        of the squared length. In the mean over prompts they are orthonormal. T + 1 of them hold all but 1e-10 of the
        squared length of the recorded vectors. At most the 128 that hold most are taken: on `tiny_dit` with T = 250
        they hold all but 5e-7."""
        values, vectors = np.linalg.eigh(self.gram.mean(0))
        held = np.flatnonzero(values.clip(0).cumsum() > 1e-10 * values.sum())[-DIRECTIONS:]
        return vectors[:, held] / np.sqrt(values[held])

    @cached_property
    def leading(self) -> int:
        """The number of directions that hold all but 1e-6 of the squared length."""
        lengths = np.square(self.gram.mean(0) @ self.directions).sum(0)
        return int((lengths.cumsum() > 1e-6 * lengths.sum()).sum())

    def along(self, values: np.ndarray, prompt: np.ndarray) -> np.ndarray:
        """The coordinates (n, r) in the leading directions of values (n, E): those of the nearest sum of directions.
        `prompt`: (n,), the prompt of each value."""
        found, last = np.zeros((len(values), self.leading)), self.directions[:, -self.leading :]
        for number in np.unique(prompt):
            rows = np.concatenate([self.predictions[number], self.states[number]]) / self.sizes[number]
            axes, these = last.T @ rows, prompt == number
            found[these] = np.linalg.solve(axes @ axes.T, axes @ values[these].T).T
        return found

    def errors(self, latents: np.ndarray, start: int = 0) -> np.ndarray:
        """Relative distances (n,) of final latents (n, ...) to x_T, for the prompts from number `start` on."""
        return self.distances(kept_elements(torch.as_tensor(latents)), np.arange(start, start + len(latents)))

    def distances(self, ends: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """Relative distances (n,) to x_T of the kept elements (n, E) of final latents, for the prompts with these
        numbers."""
        return finite_or_worst(np.linalg.norm(ends - self.states[prompts, -1], axis=1) / self.sizes[prompts])

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
    """The model's answers to errors of its latents, at computed steps of accelerated runs: n observations.

    Attributes:
        step, prompt: (n,), the step and the prompt's number.
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
        """The observations in which neither the error nor the answer is zero."""
        some = ((self.error**2).sum(1) > 1e-12) & ((self.answer**2).sum(1) > 0)
        return type(self)(*(getattr(self, name)[some] for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class Probe:
    """Accelerated runs of one plan, from which the simulator learns.

    Attributes:
        plan, predictor: what was run, at site=output.
        prompts: (n,), numbers of the recorded prompts.
        errors: (n,), relative errors of their final latents.
    """

    plan: Plan
    predictor: Predictor
    prompts: np.ndarray
    errors: np.ndarray


def elements_of(size: int) -> np.ndarray:
    """Indices of the kept elements of latents with `size` elements: all, or `ELEMENTS` random ones to limit the
    memory."""
    return np.sort(np.random.default_rng(0).permutation(size)[:ELEMENTS])


def kept_elements(latents: torch.Tensor, prompts: int | None = None) -> np.ndarray:
    """The kept elements (B, E) of the latents of that many prompts, float32. Where guidance doubles the batch within
    the sampler, both halves are the same."""
    flat = latents[:prompts].flatten(1)
    return flat[:, torch.as_tensor(elements_of(flat.shape[1]), device=flat.device)].float().cpu().numpy()


class _Recorder(StepListener):
    """Keeps what the scheduler is given at every step of one batch, and a copy of it from before the first."""

    def __init__(self, prompts: int):
        self.prompts, self.scheduler = prompts, None
        self.calls, self.predictions, self.latents = [], [], []

    def given(self, scheduler: "SchedulerMixin", arguments: dict) -> None:
        if self.scheduler is None:
            self.scheduler = copy_of_scheduler(scheduler)
        prediction, latents = arguments["model_output"], arguments["sample"]
        if prediction.shape != latents.shape:
            raise SettingError(
                f"{type(scheduler).__name__} takes predictions {tuple(prediction.shape)} for latents "
                f"{tuple(latents.shape)}: the simulator takes one value for each"
            )
        rest = ("model_output", "sample", "return_dict", HANDED_BACK)
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
    recorder = _Recorder(len(prompts))
    with watching(pipe.scheduler, recorder):
        batch = sample(pipe, method, prompts, seeds, decode=False, observe=observe, **call)
    states = [*recorder.latents, kept_elements(batch.latents, len(prompts))]
    return recorder, np.stack(recorder.predictions, 1), np.stack(states, 1), batch


def record(
    pipe: "DiffusionPipeline",
    batches: Sequence[tuple[Sequence[str], Sequence[int]]],
    num_inference_steps: int,
    probes: Sequence[tuple[Plan, Predictor]],
    count: Callable[[Report, list[int]], None] = lambda report, prompts: None,
    finer: int = 1,
    **call,
) -> tuple[Recorded, Answers | None, list[Probe], np.ndarray]:
    """Run prompts with every step computed, and some of them again with probes: plans from which the simulator learns.

    Args:
        batches: prompts and their seeds.
        num_inference_steps: T.
        probes: plans and predictors, dealt out to the batches in turn, each to two of the batch's prompts.
        count: called after every run with its report and the number of prompts.
        finer: the recorded runs have `finer` times T steps; those at the times of the T steps are kept.
        call: further arguments of the pipeline.

    Returns the recorded runs, the model's answers (None without probes), how the probes ended, and the final latents of
    the recorded runs, (P, ...).

    Raises SettingError for a scheduler whose step is not linear, for one that adds noise if `finer` is above 1, and for
    a pipeline of two models.
    """
    T, predictions, states, finals, probed, sampler = num_inference_steps, [], [], [], [], None
    steps, shapes = finer * T, {}
    full = Method(EvenlySpaced(steps, steps), "output", Reuse())

    def observe(branch, step, name, value):
        shapes[name] = [tensor.shape for tensor in tree_leaves(value)]

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
            which = [prompts[i] for i in some], [seeds[i] for i in some]
            runs.append((plan, predictor, some, *_run(pipe, method, *which, call)))
            count(runs[-1][-1].report, [len(some)])
        if sampler is None:
            grid = runs[0][3] if runs else recorder
            sampler = read_sampler(grid.scheduler, grid.calls)
            if sampler.noisy and steps != T:
                name = type(grid.scheduler).__name__
                raise SettingError(f"finer={finer}: {name} adds noise, so that runs of more steps end elsewhere")
        if steps != T:
            m, x = at_times(m, x, recorder.times, grid.times)
        first = sum(map(len, states))
        probed += [(plan, predictor, [first + i for i in some], q, y) for plan, predictor, some, _, q, y, _ in runs]
        predictions.append(m)
        states.append(x)
    recorded = Recorded(
        np.concatenate(predictions),
        np.concatenate(states),
        sampler,
        input_fits=shapes.get("input") == shapes["output"],
        finer=steps != T,
    )
    answers = [_answers(plan, some, recorded, q, y) for plan, _, some, q, y in probed]
    answers = Answers.join(answers) if answers else None
    ends = [
        Probe(plan, predictor, np.array(some), recorded.distances(y[:, -1], np.array(some)))
        for plan, predictor, some, _, y in probed
    ]
    return recorded, answers, ends, torch.cat(finals).numpy()


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
    """Plans for probes, with three predictors in turn. The steps are divided into parts, and each plan computes step 0
    and one random step of each part:

    - the first half of the plans has equal parts, as many as an eighth to four tenths of the steps. Their errors have
      several sizes, but are not so large that the model would answer differently from how it answers errors of good
      plans;
    - the others have parts of two steps, and one long part. The long part is at another place in each of these plans,
      and together the long parts cover the run. So each plan shows the effect of errors in one stage on the final
      latents.
    """
    random, T, windows = np.random.default_rng(seed), num_inference_steps, number // 2
    parts = []
    for _ in range(number - windows):
        budget = max(round(T * float(np.exp(random.uniform(np.log(0.125), np.log(0.4))))), 2)
        parts.append(np.linspace(1, T, budget).round().astype(int))
    for low, high in pairwise(np.linspace(1, T, windows + 1).round().astype(int).tolist()):
        parts.append(sorted({*range(1, low, 2), low, *range(high, T, 2), T}))
    plans = [(0, *(int(random.integers(low, high)) for low, high in pairwise(edges))) for edges in parts]
    return [(plan, (Taylor(1), Lagrange(2), AdamsBashforth(2))[turn % 3]) for turn, plan in enumerate(plans)]
