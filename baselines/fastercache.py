"""FasterCache (Lv et al., arXiv 2410.19355) as diffusers has it."""

import logging

from diffusers import FasterCacheConfig

from baselines.library import DiffusersCache


class FasterCache(DiffusersCache):
    """Attention outputs are extrapolated from the last two in all but every N-th step, below a timestep.

    Its other half, the guidance branch made from the conditional one, takes pipelines that stack the two in a batch,
    unconditional first. None of ours does, so they count as distilled ones.

    Args:
        skip_range: N; None: the one that spends the budget; 2, the default, where a model without attention would
            spend more.
        timesteps: the range, of 0 to 1000; diffusers' default.
        weight: of the extrapolation; diffusers' default.
    """

    partial, branches = True, False

    def __init__(
        self,
        budget: int,
        num_inference_steps: int,
        skip_range: int | None = None,
        timesteps: tuple[int, int] = (-1, 681),
        weight: float = 0.5,
    ):
        super().__init__(budget, num_inference_steps)
        self.skip_range, self.timesteps, self.weight = skip_range, tuple(timesteps), weight
        self.needs_calibration = skip_range is None

    def prepare(self, pipe, calibration=None):
        if self.needs_calibration:
            self.spend(pipe, calibration, "skip_range", first=2, whole=True)

    def config(self, pipe):
        logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)  # it warns every time
        return FasterCacheConfig(
            spatial_attention_block_skip_range=self.skip_range,
            spatial_attention_timestep_skip_range=self.timesteps,
            attention_weight_callback=lambda _: self.weight,
            is_guidance_distilled=True,
            current_timestep_callback=lambda: self._cache.timestep,
        )
