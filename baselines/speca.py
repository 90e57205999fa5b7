"""SpeCa: Accelerating Diffusion Transformers with Speculative Feature Caching (Liu et al., arXiv 2509.11628)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from baselines.search import Search
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.predictors import Taylor
from dpcache.schedules import OnlineSchedule, check_budget
from dpcache.sites import Modules

if TYPE_CHECKING:
    from dpcache.session import Branch


@dataclass
class Verification:
    """The state of one guidance branch in one generation.

    Attributes:
        forecasts: number of forecasts since the last computed step.
        verify: whether the current forecast is verified.
        error: of the last forecast that was verified since the last computed step.
    """

    forecasts: int = 0
    verify: bool = False
    error: torch.Tensor | None = None


@dataclass(frozen=True)
class Verified(OnlineSchedule):
    """Steps are forecast until the error of the last block is too large. The error compares the block's forecast output
    with its computed one, both from the forecast input.

    As in the authors' code, a forecast that fails is used nevertheless, and the next step is computed (the paper
    computes the failed step). The first `shortest` forecasts after a computed step are not verified, and at most
    `longest` forecasts follow each other. The error is the mean of |forecast - real| / |real| over all elements of the
    block's image stream, as in the code for DiT (the code for FLUX takes the block's projection before its gate). The
    allowed error is threshold * decay^(step / T), but at least `floor`.
    """

    threshold: float
    decay: float
    floor: float
    shortest: int
    longest: int
    warmup: int

    def start(self) -> Verification:
        return Verification()

    def decide(self, context: "Branch", block: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
        state, step = context.state, context.step
        if context.keys and context.keys[-1] == step - 1:  # the step after a computed one is never computed
            state.forecasts, state.verify, state.error = 1, False, None
            return False
        state.verify = state.forecasts >= self.shortest
        compute = not context.keys or step < self.warmup or state.forecasts >= self.longest
        if not compute and state.verify and state.error is not None:
            allowed = max(self.threshold * self.decay ** (step / self.num_inference_steps), self.floor)
            compute = not state.error.item() <= allowed  # also where it is not a number
        state.forecasts = 0 if compute else state.forecasts + 1
        return compute

    def verifies(self, context: "Branch") -> bool:
        return context.state.verify

    def verify(self, context: "Branch", draft: torch.Tensor, real: torch.Tensor) -> None:
        real = real.float()
        context.state.error = ((draft.float() - real).abs() / (real.abs() + 1e-10)).mean()


def speca(
    budget: int,
    num_inference_steps: int,
    order: int = 2,
    threshold: float | None = None,
    decay: float = 0.3,
    floor: float = 0.0,
    shortest: int = 2,
    longest: int | None = None,
    warmup: int = 3,
) -> Method | Search:
    """TaylorSeer's forecasts of every attention and feed-forward output, for as long as they pass verification.

    Args:
        threshold: largest error allowed at first; None: the one that spends the budget.
        decay, floor: of the threshold. The authors' floor (0.1 for FLUX) belongs to their thresholds: 0 here.
        shortest, longest: forecasts after a computed step that are never verified, and at most; longest: None: the
            authors' 8, or twice the mean gap.
        warmup: steps before this one are computed, but for those right after a computed one.
    """
    check_budget(budget, num_inference_steps, least=2)
    if not 1 <= warmup <= 2 * budget:  # every other step of which is computed
        raise SettingError(f"warmup={warmup} must be between 1 and twice budget={budget}")
    most = max(8, 2 * num_inference_steps // budget) if longest is None else longest
    predictor = Taylor(order, since=max(warmup - 3, 0))  # the authors' factors begin at the last warm-up step but one

    def make(threshold: float) -> Method:
        schedule = Verified(num_inference_steps, threshold, decay, floor, shortest, most, warmup)
        return Method(schedule, Modules(verifier=schedule), predictor)

    return Search(make, budget, num_inference_steps, first=1.0) if threshold is None else make(threshold)
