"""Weights that are learnt while the calibration's prompts run with them.

A skipped step should end on the latents of the full-step run: x_{s+1}. Where the run stands is known only in the run
itself, because the model answers the errors that earlier steps have left. So the prompts are run with every step's
weights fitted as that step is reached, by least squares over the prompts: what the latest keys have predicted (and the
latents themselves, if the predictor sees them) against the prediction that takes the latents to x_{s+1},

    aim_s = v_s - dx'_{s+1} / drive[s, 0],

where v_s is the full-step run's prediction and dx'_{s+1} the error that would be left if v_s were predicted
(`linear_sampler`: sum_j carry[s, j] dx_{s-j} + sum_{j>0} drive[s, j] (q_{s-j} - v_{s-j}), q what was predicted).

The simulator fits such weights, too (`Simulator.closed_loop`), but has to guess the model's answers. Where few prompts
have taught, its weights count as if one more had.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpcache._diffusers import StepListener, watch_steps
from dpcache.calibration import Calibration
from dpcache.lsq import FittedWeights
from dpcache.method import Method
from dpcache.predictors import Predictor, ridge_regression
from dpcache.schedules import Schedule
from dpcache.simulator import Recorded, kept_elements

TRUST = 1.0  # for how many prompts simulated weights count


class ClosedLoopFit:
    """The weights of one plan, learnt run by run.

    The equations of all runs are summed, so each batch of prompts runs with what it and the batches before it have
    taught.

    Args:
        recorded: the reference runs of the calibration's prompts.
        plan: the computed steps, beginning with step 0.
        simulated: the weights to begin with, which also say how many of the latest computed predictions are weighed,
            and whether the latents are.
        trust: for how many prompts they count.
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
        self.prompts: dict[int, int] = {}  # of every skipped step how many it has learnt from,
        self.among: dict[int, np.ndarray] = {}  # the sums of products, (h, h),
        self.towards: dict[int, np.ndarray] = {}  # and of products with the aim, (h,)

    @property
    def predictor(self) -> FittedWeights:
        """With the weights as they are by now."""
        return replace(self.simulated, table={step: self._solve(step) for step in self.simulated.table})

    def run(self, pipe, calibration: Calibration, start: int, limit: int) -> np.ndarray:
        """Learn from the calibration's prompts from `start` to before `limit`. Returns the relative errors of their
        final latents in these runs."""
        size, errors = calibration.made_from["batch_size"], []
        for first in range(start, limit, size):
            last = min(first + size, limit)
            learner = _Learner(self, pipe.scheduler, slice(first, last))
            method = Method(Schedule(self.plan, self.recorded.steps), "output", learner.predictor)
            unwatch = watch_steps(pipe.scheduler, learner)
            try:
                latents, _ = calibration.rerun(pipe, method, last, start=first)
            finally:
                unwatch()
            errors.append(self.recorded.errors(latents, first))
        return np.concatenate(errors)

    def add(self, step: int, seen: np.ndarray, aim: np.ndarray) -> tuple[float, ...]:
        """Of one batch what there is to predict from, (B, h, E), and what to aim at, (B, E). Returns the weights with
        which this batch goes on."""
        self.prompts[step] = self.prompts.get(step, 0) + len(aim)
        among, towards = np.einsum("bhe,bke->hk", seen, seen), np.einsum("bhe,be->h", seen, aim)
        self.among[step] = self.among.get(step, 0) + among
        self.towards[step] = self.towards.get(step, 0) + towards
        return self._solve(step)

    def _solve(self, step: int) -> tuple[float, ...]:
        if step not in self.prompts:
            return self.simulated.table[step]
        learnt = ridge_regression(self.among[step], self.towards[step], self.ridge)
        part = self.trust / (self.trust + self.prompts[step])
        return tuple(((1 - part) * learnt + part * np.array(self.simulated.table[step])).tolist())


@dataclass(frozen=True, eq=False)
class _Learning(Predictor):
    """Asks the learner for its weights when a step is skipped."""

    history: int
    learner: "_Learner"
    sees_input: bool = False

    def weights(self, keys, step):
        return self.learner.weights(keys, step)


class _Learner(StepListener):
    """Follows the run of one batch at its scheduler, and fits the weights of each skipped step as it is reached."""

    def __init__(self, fit: ClosedLoopFit, scheduler, prompts: slice):
        recorded = fit.recorded
        self.fit, self.scheduler, self.sizes = fit, scheduler, recorded.sizes[prompts, None]
        self.v, self.x = recorded.aims[prompts], recorded.states[prompts]
        self.q: list[np.ndarray] = []  # what was predicted so far, (B, E) each
        self.y: list[np.ndarray] = []  # the latents so far
        self.found: dict[int, tuple[float, ...]] = {}
        self.predictor = _Learning(fit.simulated.history, self, fit.simulated.sees_input)

    def given(self, scheduler, arguments):
        if scheduler is not self.scheduler:
            return
        if not self.y:
            self.y.append(kept_elements(arguments["sample"], len(self.sizes)))
        self.q.append(kept_elements(arguments["model_output"], len(self.sizes)))

    def after_step(self, scheduler, output):
        if scheduler is self.scheduler:
            self.y.append(kept_elements(output[0], len(self.sizes)))

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        """Of the keys and, if it is seen, of the input: the same for every guidance branch."""
        if step not in self.found:
            self.found[step] = self._fit(keys, step)
        return self.found[step]

    def _fit(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        sampler = self.fit.recorded.sampler
        carry, drive = sampler.carry[step], sampler.drive[step]
        error = np.zeros(self.q[0].shape)
        for back in range(min(len(carry), step + 1)):
            error += carry[back] * (self.y[step - back] - self.x[:, step - back])
            if back:
                error += drive[back] * (self.q[step - back] - self.v[:, step - back])
        aim = self.v[:, step] - (error / drive[0] if drive[0] else 0)
        seen = [self.q[key] for key in keys]
        if self.predictor.sees_input:
            seen.append(self.y[step])
        return self.fit.add(step, np.stack(seen, 1) / self.sizes[..., None], aim / self.sizes)
