"""Beyond the paper: steps and predictor searched in a simulated closed loop, the best few confirmed in a real one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.lsq import LEAST_SQUARES
from dpcache.method import Method
from dpcache.plan_search import search_plans, starting_plans
from dpcache.predictors import LeastSquares, Predictor, short_names
from dpcache.schedules import EvenlySpaced, Schedule, check_budget
from dpcache.simulator import Recorded, Simulator, Weights, decibels, fit_response, random_probes, record
from dpcache.statistics import Rerun

PREDICTORS = ("lsq2", "lsq3", "lsq2x", "lsq3x", "lagrange2", "taylor2", "ab2", "ab3")


@dataclass(frozen=True)
class SimulatedRuns(Rerun):
    """What the simulator needs: `Simulator.pack`. It takes every prompt once with all steps and `probes` accelerated
    runs of two prompts each, about five full runs for twelve; the full-step latents come with it."""

    probes: int = 12

    def measure(self, pipe, calibration):
        T, call = calibration.num_inference_steps, calibration.made_from["call"]
        probes = random_probes(self.probes, T)
        recorded, answers = record(pipe, calibration.batches(), T, probes, calibration.count, **call)
        calibration.latents = recorded.latents
        return Simulator(recorded, fit_response(answers, recorded)).pack()


@dataclass(frozen=True)
class SimulatedPlan:
    """The recipe of a method whose steps and predictor are searched in the simulator, at site=output.

    Step 0 alone is fixed. The simulator finds the best plan of every predictor. It is too hopeful about some, as it
    knows no answers that are not proportional to their errors: so the best few are run, and the best of the evenly
    spaced plans, with which it is not.

    Args:
        budget, num_inference_steps: K and T, see `dpcache.schedules`.
        predictors: candidates: "lsq1" to "lsq4", least squares over so many keys; "lsq1x" to "lsq4x", over the current
            latents as well (left out where the scheduler adds noise); and the short names of `dpcache.predictors`.
        finalists: how many are run, an evenly spaced one among them.
        trajectories: what these runs may cost together, in full-step trajectories of one sample.
        probes: see `SimulatedRuns`.

    Raises SettingError for a budget out of range and for candidates that are not known.
    """

    budget: int
    num_inference_steps: int
    predictors: Sequence[str] = PREDICTORS
    finalists: int = 4
    trajectories: float = 3.0
    probes: int = 12

    def __post_init__(self):
        check_budget(self.budget, self.num_inference_steps, 1)
        known = [*LEAST_SQUARES, *short_names()]
        if not self.predictors or set(self.predictors) - set(known):
            raise SettingError(f"predictors={list(self.predictors)}: choose from {', '.join(known)}")
        if self.finalists < 2 or self.trajectories <= 0 or self.probes < 1:
            raise SettingError(
                f"finalists={self.finalists}, trajectories={self.trajectories}, probes={self.probes}: must be at least "
                "2, above 0 and at least 1"
            )

    @property
    def statistics(self) -> tuple[SimulatedRuns]:
        return (SimulatedRuns(self.probes),)

    @property
    def example(self) -> Method:
        T = self.num_inference_steps
        fixed = [short_names()[name]() for name in self.predictors if name not in LEAST_SQUARES]
        learnt = [LeastSquares(np.eye(T), int(name[3])) for name in self.predictors if name in LEAST_SQUARES]
        longest = max(fixed + learnt, key=lambda predictor: predictor.history)
        return Method(EvenlySpaced(self.budget, T), "output", longest)

    def build(self, pipe, calibration: Calibration) -> Method:
        simulator = simulator_of(calibration, self.probes)
        searched, even = self.search(simulator)
        trials = [*searched[: self.finalists - 1], *even[:1], *searched[self.finalists - 1 :], *even[1:]]
        finalists, T = min(self.finalists, len(trials)), self.num_inference_steps
        prompts = min(max(int(self.trajectories * T / (finalists * self.budget)), 1), len(calibration.latents))
        reference, methods = calibration.latents[:prompts].reshape(prompts, -1), []
        for trial in trials:
            predictor = make_predictor(trial["predictor"], simulator.recorded)
            method = Method(Schedule(trial["steps"], T), "output", predictor)
            try:
                moved = calibration.rerun(pipe, method, prompts)[0].reshape(prompts, -1) - reference
            except SettingError as error:
                if not predictor.sees_input:
                    raise
                trial["refused"] = str(error)  # this model's input has another shape than its prediction
                continue
            errors = np.linalg.norm(moved, axis=1) / np.linalg.norm(reference, axis=1)
            trial |= {"confirmed": float(decibels(errors.clip(1e-10))), "prompts": prompts}
            methods.append((trial, method))
            if len(methods) == finalists:
                break
        trial, chosen = max(methods, key=lambda pair: pair[0]["confirmed"])
        decided = {"steps": trial["steps"], "predictor": trial["predictor"], "trials": trials}
        return replace(chosen, decided=decided)

    def search(self, simulator: Simulator) -> tuple[list[dict], list[dict]]:
        """Of every predictor the best plan and its promised decibels, best first; and the same with even spacing."""
        recorded, searched, spaced = simulator.recorded, [], []
        even = EvenlySpaced(self.budget, recorded.steps).steps
        for name in self.predictors:
            if name.endswith("x") and recorded.sampler.noisy:
                continue
            predictor = make_predictor(name, recorded)
            weights = Weights(predictor, recorded.steps)
            ((promised, plan),) = search_plans(simulator, weights, starting_plans(recorded, predictor, self.budget))
            searched.append({"predictor": name, "steps": list(plan), "promised": promised})
            promised = float(decibels(simulator.errors(weights.fill([even])))[0])
            spaced.append({"predictor": name, "steps": list(even), "promised": promised})
        return tuple(sorted(trials, key=lambda trial: -trial["promised"]) for trials in (searched, spaced))


def make_predictor(name: str, recorded: Recorded) -> Predictor:
    """Of a name that `SimulatedPlan` knows."""
    if name in LEAST_SQUARES:
        return recorded.least_squares(int(name[3]), name.endswith("x"))
    return short_names()[name]()


def simulator_of(calibration: Calibration, probes: int = 12) -> Simulator:
    """The simulator that a calibration holds. Raises SettingError if it has none that was made with so many probes."""
    return Simulator.unpack(calibration[SimulatedRuns(probes)], calibration.latents)


def predict_error(calibration: Calibration, method: Method) -> float:
    """`Simulator.predict_error` of the simulator that a calibration holds: to be had by
    `dpcache.calibrate(pipe, prompts, T, statistics=(SimulatedRuns(),))`."""
    return simulator_of(calibration).predict_error(method)
