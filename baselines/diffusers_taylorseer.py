"""TaylorSeer (Liu et al., arXiv 2503.06923) as diffusers has it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusers import TaylorSeerCacheConfig

from baselines.library import DiffusersCache
from dpcache.errors import SettingError
from dpcache.schedules import check_budget

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# As in diffusers, and Wan's, which are called attn1 and attn2: there it would cache nothing, without a word.
ATTENTIONS = [r"(transformer_|single_transformer_|temporal_transformer_)?blocks.*attn\d?"]


@dataclass(frozen=True, eq=False)
class DiffusersTaylorSeer(DiffusersCache):
    """Attention outputs are extrapolated between every N-th steps; everything else is computed in every step.

    Args:
        interval: N.
        order, warmup, lite: see `diffusers_taylorseer`.
    """

    interval: int
    order: int
    warmup: int
    lite: bool

    @property
    def partial(self) -> bool:
        return not self.lite

    def config(self, pipe: "DiffusionPipeline") -> TaylorSeerCacheConfig:
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


def diffusers_taylorseer(
    budget: int, num_inference_steps: int, order: int = 1, warmup: int = 3, lite: bool = False
) -> DiffusersTaylorSeer:
    """TaylorSeer with the interval whose number of computed steps comes closest to the budget.

    Args:
        order: of the extrapolation.
        warmup: steps that are computed first; the first key after them comes one step late, as diffusers counts.
        lite: all blocks are skipped, and the model's prediction is extrapolated.
    """
    check_budget(budget, num_inference_steps)
    T = num_inference_steps

    def count(interval: int) -> int:
        return min(warmup, T) + sum((step - warmup - 1) % interval == 0 for step in range(warmup, T))

    counts = {interval: count(interval) for interval in range(1, T + 1)}
    interval = min(counts, key=lambda n: (abs(counts[n] - budget), n))
    decided = {"interval": interval, "attention_steps": counts[interval]}
    return DiffusersTaylorSeer(T, interval, order, warmup, lite, decided=decided)
