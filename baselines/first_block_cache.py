"""First Block Cache (ParaAttention's, https://github.com/chengzeyi/ParaAttention) as diffusers has it."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from diffusers import FirstBlockCacheConfig

from baselines.library import DiffusersCache
from baselines.search import Search
from dpcache.denoisers import denoiser
from dpcache.errors import SettingError
from dpcache.hooks import streams_of
from dpcache.schedules import check_budget
from dpcache.sites import transformer_blocks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class FirstBlockCache(DiffusersCache):
    """The first block always runs; while its residual changes by less than the threshold, that of the others is
    reused."""

    threshold: float
    partial = True

    def config(self, pipe: "DiffusionPipeline") -> FirstBlockCacheConfig:
        transformer = denoiser(pipe)
        first, *_, last = [streams_of(block) for block in transformer_blocks(transformer)]
        if (first.other_index is None) != (last.other_index is None):  # it would subtract one from the other
            raise SettingError(
                f"diffusers offers none of its caches for {type(transformer).__name__} over all blocks: the first "
                "and the last return different streams"
            )
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
    return Search(make, budget, num_inference_steps, first=0.05, alone=True) if threshold is None else make(threshold)
