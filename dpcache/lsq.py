"""Beyond the paper: least-squares prediction, planned exactly over its whole history (`method=dpcache_lsq`)."""

from collections.abc import Sequence

import numpy as np

from dpcache.gram import path_costs
from dpcache.method import Method
from dpcache.planner import plan
from dpcache.predictors import LeastSquares, Reuse, Taylor
from dpcache.schedules import Schedule, check_budget


class LeastSquaresPlan(Method):
    """Chooses schedule and predictor together, on the calibration's Gram matrix.

    The cost of a schedule is the exact squared error of its predictions on the full-step trajectories, weighted by
    gain^(2 alpha) of the step, and the planner's state holds every key that a prediction looks at. Which predictor,
    warm-up and alpha serve best is settled in closed loop: of the candidates, the one whose accelerated runs of the
    calibration prompts end closest to the full-step latents.

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
        self.candidates = [
            (name, warmup, alpha) for name in predictors for alpha in alphas for warmup in warmups if warmup <= budget
        ]

    needs_calibration = True

    @property
    def calibration_options(self):
        return {"measure_gains": True}

    def prepare(self, pipe, calibration=None):
        gram = calibration.gram if self.site == "stack" else calibration.output_gram
        norm = np.linalg.norm(calibration.latents.reshape(len(calibration.latents), -1), axis=1)
        trials, best = [], None
        for name, warmup, alpha in self.candidates:
            predictor = Taylor(2) if name == "taylor2" else LeastSquares(gram, int(name[-1]))
            cost = path_costs(gram, predictor, predictor.history, calibration.gain ** (2 * alpha))
            steps = plan(cost, self.budget, warmup)
            self._settle(steps, predictor)
            moved = (calibration.rerun(pipe, self) - calibration.latents).reshape(len(norm), -1)
            error = float(np.mean(np.linalg.norm(moved, axis=1) / norm))
            trials.append({"predictor": name, "warmup": warmup, "alpha": alpha, "steps": steps, "error": error})
            if best is None or error < best[0]:
                best = error, steps, predictor
        self._settle(*best[1:])
        self.settled = {"trials": trials, "predictor": repr(self.predictor)}

    def _settle(self, steps, predictor):
        self.schedule = Schedule(steps, self.num_inference_steps)
        self.set_predictor(predictor)
