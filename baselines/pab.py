"""Pyramid Attention Broadcast (Zhao et al., arXiv 2408.12588) as diffusers has it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusers import PyramidAttentionBroadcastConfig

from baselines.library import AttentionReuse, every_nth
from baselines.search import Search
from dpcache.method import session_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class PyramidAttentionBroadcast(AttentionReuse):
    """Attention outputs are reused for N steps, within a range of timesteps; everything else is computed."""

    def config(self, pipe: "DiffusionPipeline") -> PyramidAttentionBroadcastConfig:
        ranges = {
            f"{kind}_attention_{what}": value
            for kind in ("spatial", "temporal", "cross")
            for what, value in (("block_skip_range", self.skip_range), ("timestep_skip_range", self.timesteps))
        }
        return PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: session_of(pipe).timestep)


def pab(
    budget: int,
    num_inference_steps: int,
    skip_range: int | None = None,
    timesteps: tuple[int, int] = (100, 800),  # diffusers' default
) -> PyramidAttentionBroadcast | Search:
    """Attention reused in all but every N-th step.

    Args:
        skip_range: N; None: the one that spends the budget.
        timesteps: the range, of 0 to 1000, within which attention is reused.
    """

    def make(interval: int) -> PyramidAttentionBroadcast:
        return PyramidAttentionBroadcast(num_inference_steps, interval, tuple(timesteps))

    return every_nth(make, budget, num_inference_steps, skip_range)
