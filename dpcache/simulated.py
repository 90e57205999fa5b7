"""Beyond the paper: steps and predictor searched in a simulated closed loop, the best few confirmed in a real one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.plan_search import search_plans, starting_plans
from dpcache.predictors import Predictor, short_names
from dpcache.schedules import Schedule, check_budget
from dpcache.simulator import Plan, Simulator, Trajectories, Weights, decibels

PREDICTORS = ("lsq2", "lsq3", "lsq2x", "lsq3x", "lagrange2", "taylor2", "ab2", "ab3", "hermite2")
LEAST_SQUARES = [f"lsq{keys}{seen}" for seen in ("", "x") for keys in range(1, 5)]


@dataclass(frozen=True)
class Candidate:
    """A plan for one predictor and site, with the decibels of its final error that the simulator promises and that
    real runs confirmed (None: it was not run)."""

    plan: Plan
    predictor: Predictor
    name: str
    site: str
    promised: float
    confirmed: float | None = None

    def method(self, num_inference_steps: int) -> Method:
        """The method that it is."""
        return Method(Schedule(self.plan, num_inference_steps), self.site, self.predictor)

    def record(self) -> dict:
        """What it is, for a file."""
        return {
            "steps": list(self.plan),
            "predictor": self.name,
            "site": self.site,
            "promised": self.promised,
            "confirmed": self.confirmed,
        }


class SimulatedPlan:
    """Chooses steps, predictor and site for one budget.

    The simulator answers for every predictor which plan is best; step 0 alone is fixed. It cannot tell the sites
    apart, and least squares may be less sure than it thinks, so the best few are run.

    Args:
        sites: `output`, `stack` or both.
        predictors: candidates: "lsq1" to "lsq4", least squares over so many keys; "lsq1x" to "lsq4x", over the current
            latents as well (site=output alone); and the short names of `dpcache.predictors`.
        finalists: how many are run.
        trajectories: what these runs may cost together, in full runs of one prompt.
    """

    def __init__(
        self,
        budget: int,
        num_inference_steps: int,
        sites: Sequence[str] = ("output", "stack"),
        predictors: Sequence[str] = PREDICTORS,
        finalists: int = 4,
        trajectories: float = 3.0,
    ):
        check_budget(budget, num_inference_steps, 1)
        if unknown := [name for name in predictors if name not in [*LEAST_SQUARES, *short_names()]]:
            raise SettingError(f"predictors={unknown}: choose from {', '.join([*LEAST_SQUARES, *short_names()])}")
        if not sites or set(sites) - {"output", "stack"}:
            raise SettingError(f"sites={list(sites)}: choose from output, stack")
        if finalists < 1 or trajectories <= 0:
            raise SettingError(f"finalists={finalists}, trajectories={trajectories}: must be at least 1 and above 0")
        self.budget, self.num_inference_steps = budget, num_inference_steps
        self.sites, self.predictors = tuple(sites), tuple(predictors)
        self.finalists, self.trajectories = finalists, trajectories

    def candidates(self, simulator: Simulator) -> list[Candidate]:
        """The best plan of every predictor at every site, best first."""
        known, found = simulator.trajectories, []
        for name in self.predictors:
            if name.endswith("x") and ("output" not in self.sites or known.sampler.noisy):
                continue
            predictor = make_predictor(name, known)
            weights = Weights(predictor, known.steps)
            starts = starting_plans(known, predictor, self.budget)
            ((promised, plan),) = search_plans(simulator, weights, starts)
            sites = ("output",) if name.endswith("x") else self.sites
            found += [Candidate(plan, predictor, name, site, promised) for site in sites]
        return sorted(found, key=lambda candidate: -candidate.promised)

    def build(self, simulator: Simulator, rerun: Callable[[Method, int], np.ndarray]) -> tuple[Method, list[Candidate]]:
        """The method, and the candidates in the order of their merit, the one chosen first.

        Args:
            rerun: of a method and a number n, the final latents (n, ...) of its runs of the first n recorded prompts.
        """
        T, reference = self.num_inference_steps, simulator.trajectories.latents
        candidates = self.candidates(simulator)
        runs = min(self.finalists, len(candidates))
        prompts = min(max(int(self.trajectories * T / (runs * self.budget)), 1), len(reference))
        reference = reference[:prompts].reshape(prompts, -1)
        confirmed = []
        for one in candidates[:runs]:
            moved = rerun(one.method(T), prompts).reshape(prompts, -1) - reference
            errors = np.linalg.norm(moved, axis=1) / np.linalg.norm(reference, axis=1)
            quality = float(decibels(np.maximum(errors, 1e-10)))
            confirmed.append(Candidate(one.plan, one.predictor, one.name, one.site, one.promised, quality))
        confirmed.sort(key=lambda candidate: -candidate.confirmed)
        return confirmed[0].method(T), confirmed + candidates[runs:]


def make_predictor(name: str, trajectories: Trajectories) -> Predictor:
    """Of a name that `SimulatedPlan` knows."""
    if name in LEAST_SQUARES:
        return trajectories.least_squares(int(name[3]), name.endswith("x"))
    return short_names()[name]()
