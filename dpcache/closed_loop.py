"""Weights that are learnt while the calibration's prompts are run with them.

A skipped step should end on the latents of the full-step run: x_{s+1}. The latents of an accelerated run are known only
in the run itself, because the model answers the errors that earlier steps have left. So the prompts are run, and the
weights of each step are fitted when the run reaches it, by least squares over the prompts. The latest keys' predictions
(and the latents, if the predictor sees them) are fitted to the prediction that takes the latents to x_{s+1},

    aim_s = v_s - dx'_{s+1} / drive[s, 0],

where v_s is the full-step run's prediction and dx'_{s+1} the error that would be left if v_s were predicted
(`linear_sampler`: sum_j carry[s, j] dx_{s-j} + sum_{j>0} drive[s, j] (q_{s-j} - v_{s-j}), q what was predicted).

The simulator fits such weights, too (`Simulator.closed_loop`), but can only estimate the model's answers. Its weights
are mixed into the learnt ones as if they came from one more prompt (`TRUST`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dpcache._diffusers import StepListener, watching
from dpcache.calibration import Calibration
from dpcache.lsq import FittedWeights
from dpcache.method import Method
from dpcache.predictors import Predictor, ridge_regression
from dpcache.recorded import Recorded, kept_elements
from dpcache.schedules import Schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

TRUST = 1.0  # for how many prompts simulated weights count


class ClosedLoopFit:
    """The weights of one plan, learnt in one run after the other.

    The least-squares equations of all runs are summed. So each batch of prompts uses weights learnt from itself and
    from the batches before.

    Args:
        recorded: the reference runs of the calibration's prompts.
        plan: the computed steps, beginning with step 0.
        simulated: the weights to begin with. They also set how many of the latest computed predictions are used, and
            whether the latents are.
        trust: the number of prompts for which the simulated weights count.
        ridge: see `dpcache.predictors.LeastSquares`.
    """

    def __init__(
        self,
        recorded: Recorded,
        plan: Sequence[int],
        simulated: FittedWeights,
        trust: float = TRUST,
        ridge: float = 1e-6,
    ):
        self.recorded, self.plan, self.simulated, self.trust, self.ridge = recorded, list(plan), simulated, trust, ridge
        self.sums: dict[int, tuple] = {}
        """Of every skipped step that was reached: prompts, and over these the sums of products among what is weighed,
        (h, h), and with the aim, (h,)."""

    @property
    def predictor(self) -> FittedWeights:
        """The predictor with the weights learnt so far."""
        return replace(self.simulated, table={step: self._solve(step) for step in self.simulated.table})

    def run(self, pipe: "DiffusionPipeline", calibration: Calibration, start: int, limit: int) -> np.ndarray:
        """Learn from the calibration's prompts from `start` to before `limit`. Returns the relative errors of their
        final latents in these runs."""
        size, errors = calibration.made_from["batch_size"], []
        for first in range(start, limit, size):
            last = min(first + size, limit)
            learner = _Learner(self, slice(first, last))
            method = Method(Schedule(self.plan, self.recorded.steps), "output", learner)
            with watching(pipe.scheduler, learner):
                latents, _ = calibration.rerun(pipe, method, last, start=first)
            errors.append(self.recorded.errors(latents, first))
        return np.concatenate(errors)

    def add(self, step: int, seen: np.ndarray, aim: np.ndarray) -> tuple[float, ...]:
        """Add the data of one batch at a step: what is predicted from, (B, h, E), and the aim, (B, E). Returns the
        weights that this batch uses at the step."""
        prompts, among, towards = self.sums.get(step, (0, 0.0, 0.0))
        among, towards = among + np.einsum("bhe,bke->hk", seen, seen), towards + np.einsum("bhe,be->h", seen, aim)
        self.sums[step] = prompts + len(aim), among, towards
        return self._solve(step)

    def _solve(self, step: int) -> tuple[float, ...]:
        simulated = self.simulated.table[step]
        if step not in self.sums:
            return simulated
        prompts, among, towards = self.sums[step]
        learnt, part = ridge_regression(among, towards, self.ridge), self.trust / (self.trust + prompts)
        return tuple(((1 - part) * learnt + part * np.array(simulated)).tolist())


class _Learner(StepListener, Predictor):
    """The predictor for the run of one batch. It listens to the scheduler, and fits the weights of each skipped step
    when the run reaches it."""

    def __init__(self, fit: ClosedLoopFit, prompts: slice):
        recorded = fit.recorded
        self.fit, self.sizes = fit, recorded.sizes[prompts, None]
        self.history, self.sees_input = fit.simulated.history, fit.simulated.sees_input
        self.v, self.x = recorded.aims[prompts], recorded.states[prompts]
        # What was predicted so far, and the latents, (B, E) each; and how far both are from the reference run's.
        self.q: list[np.ndarray] = []
        self.y: list[np.ndarray] = []
        self.dv: list[np.ndarray] = []
        self.dx: list[np.ndarray] = []
        self.found: dict[int, tuple[float, ...]] = {}

    def given(self, scheduler: "SchedulerMixin", arguments: dict) -> None:
        if not self.y:
            self._arrive(arguments["sample"])
        self.q.append(kept_elements(arguments["model_output"], len(self.sizes)))
        self.dv.append(self.q[-1] - self.v[:, len(self.dv)])

    def after_step(self, scheduler: "SchedulerMixin", output: "SchedulerOutput | tuple") -> None:
        self._arrive(output[0])

    def _arrive(self, latents) -> None:
        self.y.append(kept_elements(latents, len(self.sizes)))
        self.dx.append(self.y[-1] - self.x[:, len(self.dx)])

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        """The weights of the keys and, if it is seen, of the input: the same for every guidance branch."""
        if step not in self.found:
            self.found[step] = self._fit(keys, step)
        return self.found[step]

    def _fit(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        sampler = self.fit.recorded.sampler
        drive = sampler.drive[step, 0]
        aim = self.v[:, step] - (sampler.carried(step, self.dx, self.dv) / drive if drive else 0)
        seen = [self.q[key] for key in keys]
        if self.sees_input:
            seen.append(self.y[step])
        return self.fit.add(step, np.stack(seen, 1) / self.sizes[..., None], aim / self.sizes)
