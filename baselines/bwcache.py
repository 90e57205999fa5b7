"""BWCache: Accelerating Video Diffusion Transformers through Block-Wise Caching (Cui et al., arXiv 2509.13789)."""

import torch

from baselines.search import Searched
from dpcache.calibration import relative_change
from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.schedules import OnlineSchedule, check_budget


class SimilarBlocks(OnlineSchedule):
    """Once the blocks' outputs have changed little from one computed step to the next, the following `reuse` steps take
    them as they are.

    The change is the mean over all blocks of |h - h'|_1 / |h'|_1 of their image streams. With the first reuse at step k
    the last k / 2 steps are always computed; each guidance branch decides by itself. The authors' code could not be
    had. Whether the paper counts k from the start or from the end its text leaves open: from the start fits the shares
    of reused steps in its tables. That every computed step is tested again is our reading, too.
    """

    first = 0.15  # the paper's threshold

    def __init__(self, budget, num_inference_steps, threshold, reuse):
        super().__init__(num_inference_steps)
        check_budget(budget, num_inference_steps, 2)
        self.budget, self.threshold, self.needs_calibration = budget, threshold, threshold is None
        self.reuse = max(num_inference_steps // 10, 2 * num_inference_steps // budget) if reuse is None else reuse

    def start(self):
        return {"left": 0, "limit": None, "changes": []}

    def learn(self, context, name, feature):
        if isinstance(name, int):  # a block's
            state = context.online
            if name in state:
                state["changes"].append(relative_change(feature, state[name]))
            state[name] = feature

    def decide(self, context, block, args, kwargs):
        state, step = context.online, context.step
        if state["changes"] and context.keys[-1] == step - 1:  # a step was computed just now: what does it say?
            similar = torch.stack(state["changes"]).mean().item() < self.threshold
            state["left"] = self.reuse if similar else 0
            if similar and state["limit"] is None:
                state["limit"] = self.num_inference_steps - (step - 1) / 2
        state["changes"] = []
        state["left"] -= 1
        return state["left"] < 0 or step >= state["limit"]


def bwcache(budget: int, num_inference_steps: int, threshold: float | None = None, reuse: int | None = None) -> Method:
    """With every block's output reused, that of the last one is all that reaches the result.

    Args:
        threshold: the paper's delta; None: the one that spends the budget.
        reuse: the paper's R, steps that take the outputs of a computed one; None: the paper's tenth of all steps, or
            twice the mean gap of a smaller budget.
    """
    return Searched(SimilarBlocks(budget, num_inference_steps, threshold, reuse), "stack", Reuse())
