"""FasterCache (Lv et al., arXiv 2410.19355) as diffusers has it."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusers import FasterCacheConfig

from baselines.library import AttentionReuse, every_nth
from baselines.search import Search
from dpcache.method import session_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class FasterCache(AttentionReuse):
    """Attention outputs are extrapolated from the last two in all but every N-th step, below a timestep.

    FasterCache's other half computes the unconditional branch from the conditional one. It needs a pipeline that stacks
    the two branches in a batch, the unconditional one first. None of ours does, so they are treated as
    guidance-distilled.

    Args:
        weight: of the extrapolation.
    """

    weight: float

    def config(self, pipe: "DiffusionPipeline") -> FasterCacheConfig:
        logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)  # it warns every time
        return FasterCacheConfig(
            spatial_attention_block_skip_range=self.skip_range,
            spatial_attention_timestep_skip_range=self.timesteps,
            attention_weight_callback=lambda _: self.weight,
            is_guidance_distilled=True,
            current_timestep_callback=lambda: session_of(pipe).timestep,
        )


def fastercache(
    budget: int,
    num_inference_steps: int,
    skip_range: int | None = None,
    timesteps: tuple[int, int] = (-1, 681),  # diffusers' default
    weight: float = 0.5,  # likewise
) -> FasterCache | Search:
    """Attention extrapolated in all but every N-th step.

    Args:
        skip_range: N; None: the one that spends the budget.
        timesteps: the range, of 0 to 1000, within which attention is extrapolated.
        weight: of the extrapolation.
    """

    def make(interval: int) -> FasterCache:
        return FasterCache(num_inference_steps, interval, tuple(timesteps), weight)

    return every_nth(make, budget, num_inference_steps, skip_range)
