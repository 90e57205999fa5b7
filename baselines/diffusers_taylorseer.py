"""TaylorSeer (Liu et al., arXiv 2503.06923) as diffusers has it."""

from diffusers import TaylorSeerCacheConfig

from baselines.library import DiffusersCache
from dpcache.errors import SettingError

# As in diffusers, and Wan's, which are called attn1 and attn2: there it would cache nothing, without a word.
ATTENTIONS = [r"(transformer_|single_transformer_|temporal_transformer_)?blocks.*attn\d?"]


class DiffusersTaylorSeer(DiffusersCache):
    """Attention outputs are extrapolated between every N-th steps; everything else is computed in every step.

    Args:
        order: of the extrapolation.
        warmup: steps that are computed first; the first key after them comes one step late, as diffusers counts.
        lite: blocks are skipped whole, and the model's prediction is extrapolated.
    """

    def __init__(self, budget: int, num_inference_steps: int, order: int = 1, warmup: int = 3, lite: bool = False):
        super().__init__(budget, num_inference_steps)
        self.order, self.warmup, self.lite, self.partial = order, warmup, lite, not lite
        counts = {n: self._count(n) for n in range(1, num_inference_steps + 1)}
        self.interval = min(counts, key=lambda n: (abs(counts[n] - budget), n))
        self.settled = {"interval": self.interval, "attention_steps": counts[self.interval]}

    def _count(self, interval: int) -> int:
        T, first = self.num_inference_steps, self.warmup
        return min(first, T) + sum((step - first - 1) % interval == 0 for step in range(first, T))

    def config(self, pipe):
        if self.lite and not hasattr(pipe.transformer, "proj_out"):
            raise SettingError(
                f"TaylorSeer lite of diffusers needs a proj_out, {type(pipe.transformer).__name__} has none"
            )
        return TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=pipe.transformer.dtype,  # the default, bfloat16, would round a float32 model's
            cache_identifiers=None if self.lite else ATTENTIONS,
            use_lite_mode=self.lite,
        )
