"""TeaCache: Timestep Embedding Tells (Liu et al., arXiv 2411.19108)."""

import logging

import numpy as np

from baselines.search import Searched
from dpcache.calibration import relative_change
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.models.family import modulated_input
from dpcache.predictors import Reuse
from dpcache.schedules import OnlineSchedule

log = logging.getLogger(__name__)

# Published by the authors for FLUX.1-dev: output change as a polynomial of input change, highest power first.
FLUX_POLYNOMIAL = (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)


class AccumulatedChange(OnlineSchedule):
    """A step is computed once the rescaled changes of the modulated input since the last computed step reach the
    threshold (Eq. 5-7); so are the first and the last step.

    Args:
        threshold: None: `prepare` finds the one that spends the budget on average on the calibration's
            trajectories.
        polynomial: rescaling, highest power first; None: `prepare` fits one of degree 4 to the calibration.
    """

    def __init__(self, budget, num_inference_steps, threshold=None, polynomial=None):
        super().__init__(num_inference_steps)
        if not 2 <= budget <= num_inference_steps:
            raise SettingError(f"budget={budget} must be between 2 and num_inference_steps={num_inference_steps}")
        self.budget, self.threshold, self.polynomial = budget, threshold, polynomial
        self.needs_calibration = threshold is None or polynomial is None
        self.r_squared: float | None = None  # of a polynomial that was fitted

    @property
    def ready(self):
        return super().ready and self.polynomial is not None

    def prepare(self, calibration):
        if not self.needs_calibration:
            return
        changes = calibration.input_change
        if not len(changes):
            raise SettingError("teacache: the calibration holds no modulated inputs: this model's are not known")
        if self.polynomial is None:
            self.polynomial = fit_polynomial(changes, calibration.output_change)
            self.r_squared = r_squared(self.polynomial, changes, calibration.output_change)
            if self.r_squared < 0.5:
                log.warning(
                    "teacache: the polynomial explains %.0f %% of the output's changes on the calibration prompts; "
                    "better a method that does not guess them from the input's",
                    100 * max(self.r_squared, 0),
                )
        if self.threshold is None:
            self.first = find_threshold(changes, self.polynomial, self.budget)

    def start(self):
        return {"previous": None, "accumulated": 0.0}

    def decide(self, context, block, args, kwargs):
        state, step, current = context.online, context.step, modulated_input(block, args, kwargs)
        if context.keys and step < self.num_inference_steps - 1:
            state["accumulated"] += np.polyval(self.polynomial, relative_change(current, state["previous"]).item())
            compute = state["accumulated"] >= self.threshold
        else:
            compute = True
        if compute:
            state["accumulated"] = 0.0
        state["previous"] = current
        return bool(compute)


def fit_polynomial(input_change: np.ndarray, output_change: np.ndarray, degree: int = 4) -> tuple[float, ...]:
    """Least-squares fit of the output's change over the input's, all steps of all trajectories (3.3)."""
    x, y = input_change[:, 1:].ravel(), output_change[:, 1:].ravel()
    return tuple(np.polyfit(x, y, degree).tolist())


def r_squared(polynomial, input_change: np.ndarray, output_change: np.ndarray) -> float:
    """Share of the variance of the output's change that the polynomial explains, at most 1."""
    y = output_change[:, 1:].ravel()
    rest = y - np.polyval(polynomial, input_change[:, 1:].ravel())
    return float(1 - rest.var() / y.var())


def count_computed(input_change: np.ndarray, polynomial, threshold: float) -> float:
    """Computed steps, on average over the trajectories (n, T), that a threshold leads to."""
    rescaled, total = np.polyval(polynomial, input_change), 0
    for row in rescaled:
        accumulated, computed = 0.0, 2
        for change in row[1:-1]:
            accumulated += change
            if accumulated >= threshold:
                accumulated, computed = 0.0, computed + 1
        total += computed
    return total / len(rescaled)


def find_threshold(input_change: np.ndarray, polynomial, budget: int) -> float:
    """The middle of the thresholds that spend the budget on average on recorded trajectories, by bisection."""

    def lowest(limit: float) -> float:
        low, high = 0.0, float(np.abs(np.polyval(polynomial, input_change)).sum(1).max()) + 1e-9
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if count_computed(input_change, polynomial, middle) > limit else (low, middle)
        return high

    return (lowest(budget) + lowest(budget - 0.5)) / 2


class TeaCache(Searched):
    """Searches from the threshold of the recorded trajectories on: an accelerated one is not quite the same."""

    def prepare(self, pipe, calibration=None):
        super().prepare(pipe, calibration)
        self.settled |= {"threshold": self.schedule.threshold, "polynomial": list(self.schedule.polynomial)}
        if self.schedule.r_squared is not None:
            self.settled["r_squared"] = self.schedule.r_squared


def teacache(
    budget: int,
    num_inference_steps: int,
    threshold: float | None = None,
    polynomial: str | list[float] | None = None,
) -> Method:
    """The image stream's residual over all blocks is reused while the modulated input has changed little.

    Args:
        threshold: the paper's own knob; the budget is then not enforced.
        polynomial: coefficients, highest power first; `flux`: the authors' for FLUX.1-dev; None: fitted.
    """
    if isinstance(polynomial, str):
        if polynomial != "flux":
            raise SettingError(f"polynomial={polynomial} is not one of: flux, null, a list of coefficients")
        polynomial = FLUX_POLYNOMIAL
    return TeaCache(AccumulatedChange(budget, num_inference_steps, threshold, polynomial), "residual", Reuse())
