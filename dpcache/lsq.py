"""Beyond the paper: least-squares prediction, planned exactly over its whole history (`method=dpcache_lsq`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpcache.gram import path_costs
from dpcache.method import Method
from dpcache.planner import plan
from dpcache.predictors import LeastSquares, Predictor, Reuse, Taylor, ridge_regression
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced, Schedule, check_budget


class LeastSquaresPlan(Method):
    """Chooses schedule and predictor together, on the calibration's Gram matrix.

    The cost of a schedule is the exact squared error of its predictions on the full-step trajectories, weighted by
    gain^(2 alpha) of the step, and the planner's state holds every key that a prediction looks at. Which predictor,
    warm-up and alpha serve best is settled in closed loop: of the candidates, the one whose accelerated runs of the
    calibration prompts end closest to the full-step latents.

    The weights of least squares are then fitted once more, to the features that the accelerated runs really have at
    their keys (targets: the full-step features), and kept if prompts left out of that fit end closer.

    Args:
        predictors: candidates: "lsq2", "lsq3" (least squares over 2 or 3 keys) and "taylor2".
        warmups, alphas: candidates.
        site: `stack` or `output`.
    """

    def __init__(
        self,
        budget: int,
        num_inference_steps: int,
        site: str = "stack",
        predictors: Sequence[str] = ("lsq3", "taylor2"),
        warmups: Sequence[int] = (1, 2, 3),
        alphas: Sequence[float] = (0.0, 0.5, 1.0),
    ):
        if unknown := set(predictors) - {"lsq2", "lsq3", "taylor2"}:
            raise ValueError(f"predictors={sorted(unknown)}: choose from lsq2, lsq3, taylor2")
        if site not in ("stack", "output"):
            raise ValueError(f"site={site}: the calibration holds Gram matrices for stack and output")
        check_budget(budget, num_inference_steps, min(warmups))
        super().__init__(Schedule(None, num_inference_steps), site, Reuse())
        self.budget = budget
        self.costs = [(name, alpha) for name in predictors for alpha in alphas]
        self.warmups = [warmup for warmup in warmups if warmup <= budget]

    needs_calibration = True

    @property
    def calibration_options(self):
        return {"measure_gains": True}

    def prepare(self, pipe, calibration=None):
        gram = calibration.gram if self.site == "stack" else calibration.output_gram
        trials, best = [], None
        for name, alpha in self.costs:
            predictor = Taylor(2) if name == "taylor2" else LeastSquares(gram, int(name[-1]))
            cost = path_costs(gram, predictor, predictor.history, calibration.gain ** (2 * alpha))
            for warmup in self.warmups:
                steps = plan(cost, self.budget, warmup)
                self._settle(steps, predictor)
                errors = self._errors(pipe, calibration)
                trial = {"predictor": name, "warmup": warmup, "alpha": alpha, "steps": steps}
                trials.append(trial | {"error": float(errors.mean())})
                if best is None or errors.mean() < best[0].mean():
                    best = errors, steps, predictor
        errors, steps, predictor = best
        self._settle(steps, predictor)
        self.settled = {"trials": trials, "predictor": repr(predictor)}
        if isinstance(predictor, LeastSquares) and len(errors) > 1:
            self._refit(pipe, calibration, errors)

    def _errors(self, pipe, calibration) -> np.ndarray:
        """Relative distance of each calibration prompt's final latents to the full-step ones, (n,)."""
        reference = calibration.latents.reshape(len(calibration.latents), -1)
        moved = calibration.rerun(pipe, self).reshape(reference.shape) - reference
        return np.linalg.norm(moved, axis=1) / np.linalg.norm(reference, axis=1)

    def _refit(self, pipe, calibration, errors):
        steps, first = self.schedule.steps, self.predictor
        split = max(1, int(0.7 * len(errors)))
        fitted, everything = fit_closed_loop(pipe, calibration, self, split)
        self._settle(steps, fitted)
        before, after = errors[split:].mean(), self._errors(pipe, calibration)[split:].mean()
        self._settle(steps, everything if after < before else first)
        self.settled["refit"] = {"held_out_before": float(before), "held_out_after": float(after)}

    def _settle(self, steps, predictor):
        self.schedule = Schedule(steps, self.num_inference_steps)
        self.set_predictor(predictor)


@dataclass(frozen=True, eq=False)
class FittedWeights(Predictor):
    """Weights that were fitted for one schedule: `table[step]` holds those of the last keys, newest last."""

    history: int
    table: dict[int, tuple[float, ...]]

    def weights(self, keys, step):
        return self.table[step]


def fit_closed_loop(pipe, calibration, method, split: int, ridge: float = 1e-6) -> tuple[FittedWeights, FittedWeights]:
    """Least-squares weights from the features that `method`'s runs have at their keys to the full-step features.

    Returns those fitted on the first `split` prompts, and on all. The T + K features of one batch are held at a time.
    """
    keys, T, history = method.schedule.steps, method.num_inference_steps, method.predictor.history
    own, cross = np.zeros((2, len(keys), len(keys))), np.zeros((2, len(keys), T))
    full, done = Method(EvenlySpaced(T, T), method.site, Reuse()), 0
    for batch in calibration.batches():
        truth, seen = (_record(pipe, which, batch, calibration) for which in (full, method))
        for branch in truth:
            Y, X = truth[branch].double(), seen[branch].double()
            for index, limit in enumerate((max(split - done, 0), None)):
                x, y = X[:, :limit].flatten(1), Y[:, :limit].flatten(1)
                own[index] += (x @ x.T).cpu().numpy()
                cross[index] += (x @ y.T).cpu().numpy()
        done += len(batch[0])

    def solve(G, B):
        table = {}
        for step in sorted(set(range(T)) - set(keys)):
            S = [a for a, key in enumerate(keys) if key < step][-history:]
            table[step] = tuple(ridge_regression(G[np.ix_(S, S)], B[S, step], ridge).tolist())
        return FittedWeights(history, table)

    return tuple(solve(G, B) for G, B in zip(own, cross))


def _record(pipe, method, batch, calibration) -> dict[str, torch.Tensor]:
    """Features (computed steps, B, ...) of every guidance branch over one batch."""
    kept: dict[str, list[torch.Tensor]] = {}
    method.observe = lambda branch, step, feature: kept.setdefault(branch, []).append(feature.clone())
    try:
        sample(pipe, method, *batch, decode=False, **calibration.made_from["call"])
    finally:
        method.observe = None
    return {branch: torch.stack(features) for branch, features in kept.items()}
