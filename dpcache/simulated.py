"""Beyond the paper: steps and predictor searched in a simulated closed loop, the best few run in a real one, in which
their weights are learnt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dpcache.calibration import Calibration
from dpcache.closed_loop import ClosedLoopFit
from dpcache.errors import SettingError
from dpcache.lsq import LEAST_SQUARES, FittedWeights
from dpcache.method import CalibratedRecipe, Method
from dpcache.output_layers import measure_output_layers
from dpcache.plan_search import open_loop_plan, search_plans, starting_plans
from dpcache.predictors import LeastSquares, Predictor, short_names
from dpcache.recorded import Plan, Recorded, random_probes, record
from dpcache.schedules import EvenlySpaced, Schedule, check_budget
from dpcache.simulator import Simulator, Weights, decibels, fit_simulator
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CLOSED_LOOP = [f"closed{keys}{seen}" for seen in ("", "x") for keys in range(1, 5)]
HOPELESS = 10.0  # decibels, about by how much the simulator can be too hopeful about one plan more than another
PREDICTORS = ("closed2", "closed3", "closed4", "closed2x", "closed3x", "closed4x")


@dataclass(frozen=True)
class SimulatedRuns(Rerun):
    """What the simulator needs: `Simulator.pack`. Measuring it runs every prompt once with all steps, and makes
    `probes` accelerated runs of two prompts each; twelve probes cost about eight full-step runs. If `finer` is 1, it
    also yields the full-step latents.

    Args:
        finer: accelerated runs aim at the final latents of runs of `finer` times T steps.
        stack: whether site=stack is to be simulated, too. That takes one more run of every prompt, see
            `dpcache.output_layers`.

    Raises SettingError for `stack` with `finer` above 1.
    """

    version: ClassVar[int] = 5
    probes: int = 12
    finer: int = 1
    stack: bool = False

    def __post_init__(self):
        if self.stack and self.finer > 1:
            raise SettingError(f"finer={self.finer}: site=stack is simulated with finer=1")

    def measure(self, pipe: "DiffusionPipeline", calibration: Calibration) -> np.ndarray:
        T, call = calibration.num_inference_steps, calibration.made_from["call"]
        probes = random_probes(self.probes, T)
        recorded, answers, ends, latents = record(
            pipe, calibration.batches(), T, probes, calibration.count, self.finer, **call
        )
        if self.finer == 1:
            calibration.latents = latents
        simulator = fit_simulator(recorded, answers, ends)
        if self.stack:
            layers = measure_output_layers(pipe, recorded, calibration.batches(), calibration.count, **call)
            simulator = replace(simulator, layers=layers)
        return simulator.pack()


@dataclass(frozen=True)
class SimulatedPlan(CalibratedRecipe):
    """The recipe of a method whose steps and predictor are searched in the simulator, at site=output.

    Step 0 alone is fixed. The simulator finds the best plan of every predictor. The simulator underestimates errors,
    because it leaves out answers that are not proportional to their errors. It does so most for the plans that a search
    finds: among many plans, a search selects those that the simulator is most wrong about. So plans of three kinds
    (`search`) are run in turn, of each kind the best ones: all of them on one calibration prompt or more, the better
    half on further prompts, and so on (successive halving). In these runs the weights of "closed" predictors are learnt
    (`dpcache.closed_loop`), and the best plan's from further prompts, as far as the runs last.

    Args:
        budget, num_inference_steps: K and T, see `dpcache.schedules`.
        predictors: candidates: "closed1" to "closed4", weights of so many keys that take back the errors of the run
            itself, see `dpcache.closed_loop`; "lsq1" to "lsq4", least squares over so many keys; either with "x" at
            the end, over the current latents as well (left out where the scheduler adds noise); and the short names of
            `dpcache.predictors`.
        finalists: how many are run.
        trajectories: what these runs may cost together, in full-step trajectories of one sample; a third is for the
            best plan's weights. With large budgets there are fewer finalists, two at least.
        probes: see `SimulatedRuns`.
        finer: the end of runs of so many times T steps is aimed at. The T-step run has an error of its own, and theirs
            is smaller. Each calibration prompt then takes so many trajectories.

    Raises SettingError for a budget out of range, for candidates that are not known, and for `finer` below 1.
    """

    budget: int
    num_inference_steps: int
    predictors: Sequence[str] = PREDICTORS
    finalists: int = 3
    trajectories: float = 3.0
    probes: int = 12
    finer: int = 1

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps)
        known = [*CLOSED_LOOP, *LEAST_SQUARES, *short_names()]
        if not self.predictors or set(self.predictors) - set(known):
            raise SettingError(f"predictors={list(self.predictors)}: choose from {', '.join(known)}")
        if self.finalists < 2 or self.trajectories <= 0 or self.probes < 1:
            raise SettingError(
                f"finalists={self.finalists}, trajectories={self.trajectories}, probes={self.probes}: must be at least "
                "2, above 0 and at least 1"
            )
        if self.finer < 1:
            raise SettingError(f"finer={self.finer} must be at least 1")

    @property
    def statistics(self) -> tuple[SimulatedRuns]:
        return (SimulatedRuns(self.probes, self.finer),)

    @property
    def example(self) -> Method:
        T = self.num_inference_steps
        fixed = [short_names()[name]() for name in self.predictors if name in short_names()]
        learnt = [LeastSquares(np.eye(T), *_sight(name)) for name in self.predictors if name not in short_names()]
        longest = max(fixed + learnt, key=lambda predictor: predictor.history)
        return Method(EvenlySpaced(self.budget, T), "output", longest)

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        simulator, T = simulator_of(calibration, self.probes, self.finer), self.num_inference_steps
        trials = self.search(simulator)
        runs = int(self.trajectories * T / self.budget)
        finalists = min(self.finalists, max(runs // 3, 2))
        methods = [make_method(simulator, trial["predictor"], trial["steps"]) for trial in trials[:finalists]]
        fits = {
            number: ClosedLoopFit(simulator.recorded, method.schedule.steps, method.predictor)
            for number, method in enumerate(methods)
            if trials[number]["predictor"] in CLOSED_LOOP
        }

        def errors(number: int, start: int, limit: int) -> np.ndarray:
            if number in fits:
                return fits[number].run(pipe, calibration, start, limit)
            return simulator.recorded.errors(calibration.rerun(pipe, methods[number], limit, start=start)[0], start)

        prompts = len(simulator.recorded.states)
        best, found = successive_halving(len(methods), errors, runs - runs // 3, prompts)
        seen, method = len(found[best]), methods[best]
        if best in fits:  # the weights learn from what runs are left
            more = min(max(runs - sum(map(len, found)), 0), prompts - seen)
            found[best] = np.append(found[best], errors(best, seen, seen + more) if more else [])
            method = replace(method, predictor=fits[best].predictor)
        for trial, some in zip(trials, found):
            trial |= {"confirmed": float(decibels(some)), "prompts": len(some)}
        decided = {"steps": trials[best]["steps"], "predictor": trials[best]["predictor"], "trials": trials}
        return replace(method, decided=decided)

    def promised(self, calibration: Calibration) -> float:
        """Simulated decibels of the final latents with this budget, of a short search with one predictor. They grow
        with the budget as the quality of the images does, see `dpcache.quality.find_budget`."""
        simulator = simulator_of(calibration, self.probes, self.finer)
        first, *_ = self._candidates(simulator.recorded)
        spaced = EvenlySpaced(self.budget, self.num_inference_steps).steps
        ((promised, _),) = search_plans(scorer(simulator, first), self.num_inference_steps, [spaced])
        return promised

    def _candidates(self, recorded: Recorded) -> list[str]:
        """The predictors that can be simulated. Raises SettingError if there are none."""
        found = [name for name in self.predictors if recorded.inputs_known or not _sees_input(name)]
        if not found:
            raise SettingError(f"predictors={list(self.predictors)}: this model's input cannot be simulated")
        return found

    def search(self, simulator: Simulator) -> list[dict]:
        """Predictors, plans and their promised decibels, in the order in which they are worth a run.

        They are of three kinds: what the search finds; what it finds from the third kind where the simulator knows the
        response alone, and nothing of `fit_mixing` and `fit_growth`; and the exact plan over open-loop costs
        (`open_loop_plan`), which takes no advantage of what the simulator is wrong about. The best of every kind come
        first, then the second best, and so on. What promises `HOPELESS` decibels less than the best that was searched
        comes last.
        """
        recorded, T, kinds = simulator.recorded, self.num_inference_steps, {}
        simpler = Simulator(recorded, simulator.response)
        searched: Plan | None = None

        @cache
        def open_loop(name: str) -> Plan:
            return open_loop_plan(simulator, make_predictor(name, recorded), self.budget)

        for name in self._candidates(recorded):
            score = scorer(simulator, name)
            exact = open_loop(name.removesuffix("x") if _sees_input(name) else name)
            if searched is None:
                starts = [*starting_plans(T, self.budget), exact]
            else:  # what is best with one predictor is nearly so with the next
                starts = [max(searched, exact, key=lambda plan: score([plan])[0])]
            promised, searched = max(search_plans(score, T, starts))
            plans = {
                "searched": (promised, searched),
                "searched by the response alone": search_plans(scorer(simpler, name), T, [exact])[0],
                "exact": (float(score([exact])[0]), exact),
            }
            for kind, (promised, plan) in plans.items():
                trial = {"kind": kind, "predictor": name, "steps": list(plan), "promised": promised}
                kinds.setdefault(kind, []).append(trial)
        for trials in kinds.values():
            trials.sort(key=lambda trial: -trial["promised"])
        best, ordered = kinds["searched"][0]["promised"], {}
        for trial in (trial for rank in zip(*kinds.values()) for trial in rank):
            ordered.setdefault((trial["predictor"], *trial["steps"]), trial)
        return sorted(ordered.values(), key=lambda trial: trial["promised"] < best - HOPELESS)


def successive_halving(
    candidates: int, errors: Callable[[int, int, int], np.ndarray], runs: int, prompts: int
) -> tuple[int, list[np.ndarray]]:
    """The candidate with the smallest geometric mean error, and the errors that were found of every one: all of them
    are run on the first prompts, the better half on further ones, until one is left.

    Args:
        candidates: how many, at least 1.
        errors: of a candidate (its number) on the prompts from the second argument to before the third.
        runs: how many runs of one prompt to spend, about; each round takes the same part, at least one prompt.
        prompts: how many there are.
    """
    alive, found, seen = list(range(candidates)), [np.empty(0)] * candidates, 0
    rounds = max((candidates - 1).bit_length(), 1)
    for turn in range(rounds):
        more = min(max(runs // (rounds - turn) // len(alive), 1), prompts - seen)
        if more:
            for number in alive:
                found[number] = np.append(found[number], errors(number, seen, seen + more))
        runs, seen = runs - more * len(alive), seen + more
        alive = sorted(alive, key=lambda number: -decibels(found[number]))[: (len(alive) + 1) // 2]
    return alive[0], found


def _sees_input(name: str) -> bool:
    return name in CLOSED_LOOP + LEAST_SQUARES and name.endswith("x")


def _sight(name: str) -> tuple[int, bool]:
    """How many keys "closed3x" or "lsq3" look at, and whether they see the input."""
    return int(name.removesuffix("x")[-1]), name.endswith("x")


def make_predictor(name: str, recorded: Recorded) -> Predictor:
    """Of a name that `SimulatedPlan` knows; in place of weights that are found in a run, those of least squares."""
    if name in short_names():
        return short_names()[name]()
    return recorded.least_squares(*_sight(name))


def scorer(simulator: Simulator, name: str) -> Callable[[list[Plan]], np.ndarray]:
    """The function that gives simulated decibels (N,) of N plans with the predictor of that name."""
    if name in CLOSED_LOOP:
        return lambda plans: decibels(simulator.closed_loop(plans, *_sight(name))[0])
    weights = Weights(make_predictor(name, simulator.recorded), simulator.recorded.steps)
    return lambda plans: decibels(simulator.errors(weights.fill(plans)))


def make_method(simulator: Simulator, name: str, steps: Sequence[int]) -> Method:
    """With these steps and the predictor of that name."""
    if name in CLOSED_LOOP:
        history, sees_input = _sight(name)
        fill = simulator.closed_loop([steps], history, sees_input)[1]
        predictor = FittedWeights(history, fill.table(0), sees_input)
    else:
        predictor = make_predictor(name, simulator.recorded)
    return Method(Schedule(list(steps), simulator.recorded.steps), "output", predictor)


def simulator_of(calibration: Calibration, probes: int = 12, finer: int = 1, stack: bool = False) -> Simulator:
    """The simulator that a calibration holds. Raises SettingError if it has none that was made with these settings."""
    return Simulator.unpack(calibration[SimulatedRuns(probes, finer, stack)])


def predict_error(calibration: Calibration, method: Method) -> float:
    """`Simulator.predict_error` of the simulator that a calibration holds: to be had by
    `dpcache.calibrate(pipe, prompts, T, statistics=(SimulatedRuns(),))`, for methods at site=stack by
    `SimulatedRuns(stack=True)`."""
    return simulator_of(calibration, stack=method.site.name == "stack").predict_error(method)
