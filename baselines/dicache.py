"""DiCache: Let Diffusion Model Determine Its Own Cache (Bu et al., arXiv 2508.17356), as in the authors' code."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from baselines.search import Search
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.predictors import Predictor
from dpcache.schedules import OnlineSchedule, check_budget
from dpcache.sites import Residual
from dpcache.statistics import relative_change

if TYPE_CHECKING:
    from dpcache.session import Branch


@dataclass
class ProbeState:
    """The state of one guidance branch in one generation.

    Attributes:
        accumulated: sum of the relative changes of the probe's output since the last computed step.
        gamma: see `TrajectoryAlignment`.
        before, after: the probe's input and output at the last step.
        older, newer: the probe's residuals at the last two computed steps.
    """

    accumulated: float = 0.0
    gamma: float = 1.0
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    older: torch.Tensor | None = None
    newer: torch.Tensor | None = None


@dataclass(frozen=True)
class ShallowProbe(OnlineSchedule):
    """A step is computed when the sum of the relative step-to-step changes of the probed blocks' output reaches the
    threshold. The first `warmup` + 1 steps and the last are always computed.

    Args:
        minus_input, clip: see `dicache`.
    """

    warmup: int
    threshold: float
    minus_input: bool
    clip: tuple[float, float]

    def start(self) -> ProbeState:
        return ProbeState()

    def decide(self, context: "Branch", block: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
        state, before = context.state, context.stack_input
        after = args[0] if args else kwargs["hidden_states"]
        if after.shape != before.shape:
            raise SettingError(
                f"probe: what enters a {type(block).__name__}, which comes after the probed blocks, is another stream "
                "than the first block's input: probe fewer"
            )
        residual, compute, new = after - before, True, state.newer
        if self.warmup < context.step < self.num_inference_steps - 1 and new is not None:
            change = relative_change(after, state.after)
            if self.minus_input:
                change = (change - relative_change(before, state.before)).abs()
            old = new if state.older is None else state.older
            gamma = (residual - old).float().abs().mean() / (new - old).float().abs().mean()
            change, state.gamma = torch.stack([change, gamma]).tolist()  # the host waits for the device once
            state.accumulated += change
            compute = not state.accumulated < self.threshold  # also where it is not a number
        if compute:
            state.accumulated = 0.0
            state.older, state.newer = new, residual
        state.before, state.after = before, after
        return compute

    def scale(self, context: "Branch", weights: tuple[float, ...]) -> tuple[float, ...]:
        low, high = self.clip
        gamma = min(max(low, context.state.gamma), high)  # not a number where nothing has changed: low
        return (1 - gamma, gamma) if len(weights) > 1 else weights


@dataclass(frozen=True)
class TrajectoryAlignment(Predictor):
    """r' + gamma (r - r') of the last two residuals r' and r. Gamma, here 1, is |p - p'| / |q - p'| of the probe's
    residuals: p of this step, p' and q of the steps of r' and r."""

    history = 2

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        return (0.0, 1.0)[-len(keys) :]


def dicache(
    budget: int,
    num_inference_steps: int,
    probe: int = 1,
    threshold: float | None = None,
    retention: float | None = None,
    minus_input: bool = False,
    clip: tuple[float, float] = (1.0, 1.5),
) -> Method | Search:
    """The residual over all blocks is extrapolated along the trajectory that a shallow probe shows.

    The authors compute a fifth of all steps first, which is much of a small budget. Here it is a fifth of the budget.

    Args:
        probe: blocks that run at every step (the authors recommend 1 to 5). A computed step goes on from them.
        threshold: of the accumulated change, 0.4 for the authors' FLUX; None: the one that spends the budget.
        retention: share of all steps that are computed first; None: a fifth of the budget.
        minus_input: subtract the relative change of the probe's input from that of its output (the authors'
            `delta_minus`).
        clip: bounds of gamma; the authors' code for Wan has (1, 2).
    """
    check_budget(budget, num_inference_steps, least=2)
    if probe < 1:
        raise SettingError(f"probe={probe} must be at least 1 block")
    warmup = int(0.2 * budget if retention is None else retention * num_inference_steps)
    if budget < warmup + 2:
        raise SettingError(f"budget={budget}: retention={retention} and the last step take {warmup + 2} steps")

    def make(threshold: float) -> Method:
        schedule = ShallowProbe(num_inference_steps, warmup, threshold, minus_input, clip)
        return Method(schedule, Residual(probe), TrajectoryAlignment())

    return Search(make, budget, num_inference_steps, first=0.4) if threshold is None else make(threshold)
