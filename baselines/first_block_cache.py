"""First Block Cache (ParaAttention's, https://github.com/chengzeyi/ParaAttention) as diffusers has it."""

from dataclasses import dataclass
from functools import partial

from diffusers import FirstBlockCacheConfig

from baselines.library import DiffusersCache
from baselines.search import Search
from dpcache.schedules import check_budget


@dataclass(frozen=True, eq=False)
class FirstBlockCache(DiffusersCache):
    """The first block always runs; while its residual changes by less than the threshold, that of the others is
    reused."""

    threshold: float
    partial = True

    def config(self, pipe):
        return FirstBlockCacheConfig(self.threshold)


def first_block_cache(
    budget: int, num_inference_steps: int, threshold: float | None = None
) -> FirstBlockCache | Search:
    """The residual over all blocks but the first is reused while that of the first has changed little.

    Args:
        threshold: diffusers' own parameter, 0.05 by default; None: the one that spends the budget.
    """
    check_budget(budget, num_inference_steps)
    make = partial(FirstBlockCache, num_inference_steps)
    return Search(make, budget, num_inference_steps, first=0.05) if threshold is None else make(threshold)
