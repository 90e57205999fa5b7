"""Pyramid Attention Broadcast (Zhao et al., arXiv 2408.12588) as diffusers has it."""

from diffusers import PyramidAttentionBroadcastConfig

from baselines.library import AttentionReuse
from dpcache.method import session_of


class PyramidAttentionBroadcast(AttentionReuse):
    """Attention outputs are reused for N steps, within a range of timesteps; everything else is computed."""

    def __init__(
        self,
        budget: int,
        num_inference_steps: int,
        skip_range: int | None = None,
        timesteps: tuple[int, int] = (100, 800),  # diffusers' default
    ):
        super().__init__(budget, num_inference_steps, skip_range, timesteps)

    def config(self, pipe):
        ranges = {
            f"{kind}_attention_{what}": value
            for kind in ("spatial", "temporal", "cross")
            for what, value in (("block_skip_range", self.skip_range), ("timestep_skip_range", self.timesteps))
        }
        return PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: session_of(pipe).timestep)
