"""DiCache: Let Diffusion Model Determine Its Own Cache (Bu et al., arXiv 2508.17356), as in the authors' code."""

import torch

from baselines.search import Searched
from dpcache.calibration import relative_change
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.predictors import Predictor
from dpcache.schedules import OnlineSchedule, check_budget


class ShallowProbe(OnlineSchedule):
    """The first `probe` blocks run at every step. A step is computed, from there on, once the relative changes of what
    they leave, each against the step before, add up to the threshold; so are the first steps and the last."""

    partial, first = True, 0.4

    def __init__(self, budget, num_inference_steps, probe, threshold, retention, minus_input, clip):
        super().__init__(num_inference_steps)
        check_budget(budget, num_inference_steps, 2)
        if probe < 1:
            raise SettingError(f"probe={probe} must be at least 1 block")
        self.budget, self.probe, self.threshold, self.needs_calibration = budget, probe, threshold, threshold is None
        self.warmup = int(0.2 * budget if retention is None else retention * num_inference_steps)
        self.minus_input, self.clip = minus_input, clip
        if budget < self.warmup + 2:
            raise SettingError(f"budget={budget}: retention={retention} and the last step take {self.warmup + 2} steps")

    def start(self):
        return {"accumulated": 0.0, "gamma": 1.0}

    def decide(self, context, block, args, kwargs):
        state, before = context.online, context.stack_input
        after = args[0] if args else kwargs["hidden_states"]
        residual, compute = after - before, True
        if self.warmup < context.step < self.num_inference_steps - 1 and "newer" in state:
            change = relative_change(after, state["after"])
            if self.minus_input:
                change = (change - relative_change(before, state["before"])).abs()
            old, new = state.get("older", state["newer"]), state["newer"]
            gamma = (residual - old).float().abs().mean() / (new - old).float().abs().mean()
            change, state["gamma"] = torch.stack([change, gamma]).tolist()  # the host waits for the device once
            state["accumulated"] += change
            compute = not state["accumulated"] < self.threshold  # also where it is not a number
        if compute:
            state["accumulated"] = 0.0
            if "newer" in state:
                state["older"] = state["newer"]
            state["newer"] = residual
        state["before"], state["after"] = before, after
        return compute

    def scale(self, context, weights):
        low, high = self.clip
        gamma = min(max(low, context.online["gamma"]), high)  # not a number where nothing has changed: low
        return (1 - gamma, gamma) if len(weights) > 1 else weights


class TrajectoryAlignment(Predictor):
    """r' + gamma (r - r') of the last two residuals r' and r. Gamma, here 1, is |p - p'| / |q - p'| of the probe's
    residuals: p of this step, p' and q of the steps of r' and r."""

    history = 2

    def weights(self, keys, step):
        return (0.0, 1.0)[-len(keys) :]


def dicache(
    budget: int,
    num_inference_steps: int,
    probe: int = 1,
    threshold: float | None = None,
    retention: float | None = None,
    minus_input: bool = False,
    clip: tuple[float, float] = (1.0, 1.5),
) -> Method:
    """The residual over all blocks is extrapolated along the trajectory that a shallow probe shows.

    The authors compute a fifth of the steps first, which leaves little of a small budget: here it is of the budget.

    Args:
        probe: blocks that run at every step (the authors recommend 1 to 5). A computed step goes on from them.
        threshold: of the accumulated change, 0.4 for the authors' FLUX; None: the one that spends the budget.
        retention: share of all steps that is computed first; None: as above.
        minus_input: only count what the probe changes beyond its input (the authors' `delta_minus`).
        clip: bounds of gamma; the authors' code for Wan has (1, 2).
    """
    schedule = ShallowProbe(budget, num_inference_steps, probe, threshold, retention, minus_input, clip)
    return Searched(schedule, "residual", TrajectoryAlignment())
