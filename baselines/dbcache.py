"""DBCache and its calibrators, of cache-dit (https://github.com/vipshop/cache-dit)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import inf
from typing import TYPE_CHECKING, ClassVar

from diffusers import DiffusionPipeline

from baselines.library import LibraryCache
from baselines.search import Search, spent, with_decided
from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe
from dpcache.planned import dpcache
from dpcache.schedules import check_budget
from dpcache.statistics import L1Cost

if TYPE_CHECKING:
    import torch

CALIBRATORS = {"taylorseer": "TaylorSeerCalibratorConfig", "foca": "FoCaCalibratorConfig"}


@dataclass(frozen=True, eq=False)
class DBCache(LibraryCache):
    """The first block of every kind always runs. While its residual changes by less than the threshold, the residual of
    the other blocks is reused, or forecast by a calibrator.

    Args:
        threshold: of the first block's residual; None: the mask says which steps are computed.
        warmup: steps that are computed first.
        mask: of every step 1 if it is computed, else 0.
        calibrator, separate_cfg: see `dbcache`.
    """

    threshold: float | None
    warmup: int | None = None
    mask: tuple[int, ...] | None = None
    calibrator: str | None = None
    separate_cfg: bool | None = None
    package = "cache_dit"
    partial = True

    def start(self, pipe: DiffusionPipeline, transformer: "torch.nn.Module") -> None:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it tells of every step
        import cache_dit

        if not isinstance(pipe, DiffusionPipeline) or not cache_dit.BlockAdapterRegister.is_supported(pipe):
            raise SettingError(f"cache-dit does not know {type(pipe).__name__}")
        settings = {"Fn_compute_blocks": 1, "num_inference_steps": self.num_inference_steps}
        if self.mask is not None:
            settings |= {"steps_computation_mask": list(self.mask), "steps_computation_policy": "static"}
        else:
            settings |= {"max_warmup_steps": self.warmup, "residual_diff_threshold": self.threshold}
        cache_dit.enable_cache(
            pipe,
            cache_config=cache_dit.DBCacheConfig(**settings, enable_separate_cfg=self.separate_cfg),
            calibrator_config=getattr(cache_dit, CALIBRATORS[self.calibrator])() if self.calibrator else None,
        )

    def keeps_branches_apart(self, transformer: "torch.nn.Module") -> bool:
        return bool(transformer._context_kwargs["cache_config"].enable_separate_cfg)

    def stop(self, pipe: DiffusionPipeline, transformer: "torch.nn.Module") -> None:
        import cache_dit

        cache_dit.disable_cache(pipe)


@dataclass(frozen=True)
class Thresholded(CalibratedRecipe):
    """The recipe with a threshold. cache-dit computes the first 8 steps, which is nearly all of a budget of 9. Here the
    warm-up is at most half of the budget, and is halved again as long as even an infinite threshold spends more than
    the budget."""

    budget: int
    num_inference_steps: int
    warmup: int | None
    make: Callable[..., DBCache]
    statistics: ClassVar[tuple] = ()
    example: ClassVar[None] = None

    def fit(self, pipe: DiffusionPipeline, calibration: Calibration) -> DBCache:
        warmup = first_warmup(self.budget) if self.warmup is None else self.warmup
        if self.warmup is None:
            while warmup > 1 and spent(self.make(inf, warmup), pipe, calibration, limit=1) > self.budget:
                warmup //= 2
        make = partial(self.make, warmup=warmup)
        found = Search(make, self.budget, self.num_inference_steps, first=0.08).fit(pipe, calibration)
        return with_decided(found, {"max_warmup_steps": warmup})


@dataclass(frozen=True)
class Masked(CalibratedRecipe):
    """The recipe with the steps that DPCache plans as cache-dit's steps mask. The other steps still run the first
    blocks, so a few steps less are planned."""

    budget: int
    num_inference_steps: int
    make: Callable[..., DBCache]
    example: ClassVar[None] = None

    @property
    def statistics(self) -> tuple[L1Cost]:
        return dpcache(self.budget, self.num_inference_steps, warmup=1).statistics

    def fit(self, pipe: DiffusionPipeline, calibration: Calibration) -> DBCache:
        T = self.num_inference_steps

        def make(skipped: int) -> DBCache:
            budget = max(T - skipped, 1)
            steps = dpcache(budget, T, warmup=min(3, budget)).fit(pipe, calibration).schedule.steps
            mask = tuple(int(step in steps) for step in range(T))
            return with_decided(self.make(None, mask=mask), {"mask": list(mask)})

        return Search(make, self.budget, T, first=T - self.budget, setting="skipped", whole=True).fit(pipe, calibration)


def first_warmup(budget: int) -> int:
    """Steps that are computed first: cache-dit's 8, or half of the budget if that is less."""
    return max(1, min(8, budget // 2))


def dbcache(
    budget: int,
    num_inference_steps: int,
    threshold: float | None = None,
    calibrator: str | None = None,
    warmup: int | None = None,
    planned: bool = False,
    separate_cfg: bool | None = None,
) -> DBCache | Thresholded | Masked:
    """DBCache, with a threshold that spends the budget or with planned steps.

    Args:
        threshold: of the first block's residual, 0.08 by default; None: the one that spends the budget.
        calibrator: taylorseer or foca, with cache-dit's settings; None: reuse.
        warmup: steps that are computed first; None: see `Thresholded`.
        planned: instead of a threshold, the steps that DPCache plans.
        separate_cfg: whether the pipeline runs guidance branches one after the other; None: what cache-dit knows of the
            pipeline.
    """
    if find_spec("cache_dit") is None:
        raise ModuleNotFoundError("DBCache needs cache-dit: pip install -e '.[peers]'")
    if calibrator is not None and calibrator not in CALIBRATORS:
        raise SettingError(f"calibrator={calibrator} is not one of {', '.join(CALIBRATORS)}, null")
    check_budget(budget, num_inference_steps)
    make = partial(DBCache, num_inference_steps, calibrator=calibrator, separate_cfg=separate_cfg)
    if planned:
        return Masked(budget, num_inference_steps, make)
    if threshold is None:
        return Thresholded(budget, num_inference_steps, warmup, make)
    return make(threshold, first_warmup(budget) if warmup is None else warmup)
