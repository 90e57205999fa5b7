"""Pyramid Attention Broadcast (Zhao et al., arXiv 2408.12588) as diffusers has it."""

from diffusers import PyramidAttentionBroadcastConfig

from baselines.library import DiffusersCache


class PyramidAttentionBroadcast(DiffusersCache):
    """Attention outputs are reused for N steps, within a range of timesteps; everything else is computed.

    Args:
        skip_range: N; None: the one that spends the budget; 2, the default, where a model without attention would
            spend more.
        timesteps: the range, of 0 to 1000; diffusers' default.
    """

    partial, branches = True, False

    def __init__(
        self,
        budget: int,
        num_inference_steps: int,
        skip_range: int | None = None,
        timesteps: tuple[int, int] = (100, 800),
    ):
        super().__init__(budget, num_inference_steps)
        self.skip_range, self.timesteps, self.needs_calibration = skip_range, tuple(timesteps), skip_range is None

    def prepare(self, pipe, calibration=None):
        if self.needs_calibration:
            self.spend(pipe, calibration, "skip_range", first=2, whole=True)

    def config(self, pipe):
        ranges = {
            f"{kind}_attention_{what}": value
            for kind in ("spatial", "temporal", "cross")
            for what, value in (("block_skip_range", self.skip_range), ("timestep_skip_range", self.timesteps))
        }
        return PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: self._cache.timestep)
