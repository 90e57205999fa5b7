"""BWCache: Accelerating Video Diffusion Transformers through Block-Wise Caching (Cui et al., arXiv 2509.13789)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from baselines.search import Search
from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.schedules import OnlineSchedule, check_budget
from dpcache.statistics import relative_change

if TYPE_CHECKING:
    from dpcache.session import Branch


@dataclass
class BlockState:
    """The state of one guidance branch in one generation.

    Attributes:
        left: the number of steps for which the outputs are still to be reused.
        limit: the step from which on all steps are computed; None before the first reuse.
        changes: of the blocks' outputs, from the last but one computed step to the last one.
        outputs: of each block at the last computed step.
    """

    left: int = 0
    limit: float | None = None
    changes: list[torch.Tensor] = field(default_factory=list)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SimilarBlocks(OnlineSchedule):
    """If the blocks' outputs have changed little from one computed step to the next, the following `reuse` steps reuse
    them.

    The change is the mean over all blocks of |h - h'|_1 / |h'|_1 of their image streams. If the first reuse is at step
    k, the last k / 2 steps are always computed. Each guidance branch decides by itself. We could not obtain the
    authors' code. The paper does not say whether k is counted from the start or from the end; counting from the start
    agrees with the shares of reused steps in its tables. That every computed step is tested again is our reading, too.
    """

    threshold: float
    reuse: int

    def start(self) -> BlockState:
        return BlockState()

    def learn(self, context: "Branch", name: str | int, feature: torch.Tensor) -> None:
        if isinstance(name, int):  # a block's
            state = context.state
            if name in state.outputs:
                state.changes.append(relative_change(feature, state.outputs[name]))
            state.outputs[name] = feature

    def decide(self, context: "Branch", block: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
        state, step = context.state, context.step
        if state.changes and context.keys[-1] == step - 1:  # a step was computed just now: what does it say?
            similar = torch.stack(state.changes).mean().item() < self.threshold
            state.left = self.reuse if similar else 0
            if similar and state.limit is None:
                state.limit = self.num_inference_steps - (step - 1) / 2
        state.changes = []
        state.left -= 1
        return state.left < 0 or step >= state.limit


def bwcache(
    budget: int, num_inference_steps: int, threshold: float | None = None, reuse: int | None = None
) -> Method | Search:
    """Reuses the last block's output: if every block's output is reused, only the last one reaches the result.

    Args:
        threshold: the paper's delta; None: the one that spends the budget.
        reuse: the paper's R, steps that take the outputs of a computed one; None: the paper's tenth of all steps, or
            twice the mean gap of a smaller budget.
    """
    check_budget(budget, num_inference_steps, least=2)
    steps = max(num_inference_steps // 10, 2 * num_inference_steps // budget) if reuse is None else reuse

    def make(threshold: float) -> Method:
        return Method(SimilarBlocks(num_inference_steps, threshold, steps), "stack", Reuse())

    # From the paper's threshold on.
    return Search(make, budget, num_inference_steps, first=0.15) if threshold is None else make(threshold)
