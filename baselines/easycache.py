"""EasyCache: Less is Enough, Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching (Zhou et al.,
arXiv 2507.02860), as in the authors' code."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from baselines.search import Search
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.schedules import OnlineSchedule, check_budget
from dpcache.sites import OutputResidual

if TYPE_CHECKING:
    from dpcache.session import Branch


@dataclass
class RateState:
    """Of one guidance branch in one generation; only that of the first one is used.

    Attributes:
        accumulated: changes since the last computed step.
        x: the model's input at the last step.
        computed_x, v: its input and its prediction at the last computed step.
        rate: k.
    """

    accumulated: float = 0.0
    x: torch.Tensor | None = None
    computed_x: torch.Tensor | None = None
    v: torch.Tensor | None = None
    rate: torch.Tensor | None = None


@dataclass(frozen=True)
class TransformationRate(OnlineSchedule):
    """A step is computed when the sum of k |x_t - x_t-1| / |v| over the steps since the last computed one reaches the
    threshold. The first `warmup` steps and the last are always computed.

    x is the model's input, v its last computed prediction, |.| the mean of absolute values, and k = |v - v'| / |x - x'|
    over the last two computed steps. The first guidance branch decides for all.
    """

    warmup: int
    threshold: float

    def start(self) -> RateState:
        return RateState()

    def decide(self, context: "Branch", block: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
        if context.leader is not context:
            return not context.leader.skip
        state, step, x = context.state, context.step, whole(context.part.input(args, kwargs), context)
        compute = True
        if self.warmup <= step < self.num_inference_steps - 1 and state.rate is not None:
            change = state.rate * (x - state.x).float().abs().mean() / state.v.float().abs().mean()
            state.accumulated += change.item()
            compute = not state.accumulated < self.threshold  # also where it is not a number
        if compute:
            state.accumulated = 0.0
        state.x = x.clone()  # the sampler's own, which it may change in place
        return compute

    def learn(self, context: "Branch", name: str | int, feature: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        state = context.state
        if context.leader is not context:
            return
        x = whole(state.x, context)
        v = whole(feature, context) + x
        if state.v is not None:
            state.rate = (v - state.v).float().abs().mean() / (x - state.computed_x).float().abs().mean()
        state.computed_x, state.v = x, v


def whole(latents: torch.Tensor, context: "Branch") -> torch.Tensor:
    """Latents as one tensor, without what an image-to-video model has appended to their channels."""
    if not torch.is_tensor(latents):
        return torch.stack(tuple(latents))
    return OutputResidual.like(latents, context.shapes[0]) if context.shapes else latents


def easycache(
    budget: int, num_inference_steps: int, threshold: float | None = None, warmup: int | None = None
) -> Method | Search:
    """What the model adds to its input is reused: v = x + (v' - x').

    Args:
        threshold: the paper's tau; None: the one that spends the budget.
        warmup: steps computed first (at least 2); None: the authors' 5 for HunyuanVideo, or half of a smaller budget.
    """
    computed_first = max(2, min(5, budget // 2)) if warmup is None else warmup
    check_budget(budget, num_inference_steps, computed_first)
    if computed_first < 2:
        raise SettingError(f"warmup={warmup} must be at least 2: a rate takes two computed steps")
    if budget < min(computed_first + 1, num_inference_steps):
        raise SettingError(
            f"budget={budget}: warmup={computed_first} and the last step take {computed_first + 1} steps"
        )

    def make(threshold: float) -> Method:
        schedule = TransformationRate(num_inference_steps, computed_first, threshold)
        return Method(schedule, "output_residual", Reuse())

    # From the authors' threshold for Wan2.1; that for HunyuanVideo is 0.025.
    return Search(make, budget, num_inference_steps, first=0.05) if threshold is None else make(threshold)
