"""First Block Cache (ParaAttention's, https://github.com/chengzeyi/ParaAttention) as diffusers has it."""

from diffusers import FirstBlockCacheConfig

from baselines.library import DiffusersCache


class FirstBlockCache(DiffusersCache):
    """The first block always runs; while its residual changes by less than the threshold, that of the others is reused.

    Args:
        threshold: diffusers' own knob, 0.05 by default; None: the one that spends the budget.
    """

    partial = True

    def __init__(self, budget: int, num_inference_steps: int, threshold: float | None = None):
        super().__init__(budget, num_inference_steps)
        self.threshold, self.needs_calibration = threshold, threshold is None

    def prepare(self, pipe, calibration=None):
        if self.needs_calibration:
            self.spend(pipe, calibration, "threshold", first=0.05)

    def config(self, pipe):
        return FirstBlockCacheConfig(self.threshold)
