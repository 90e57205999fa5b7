"""DBCache and its calibrators, of cache-dit (https://github.com/vipshop/cache-dit)."""

import os
from importlib.util import find_spec

from diffusers import DiffusionPipeline

from baselines.library import LibraryCache
from baselines.search import rerun
from dpcache.errors import SettingError
from dpcache.method import dpcache

CALIBRATORS = {"taylorseer": "TaylorSeerCalibratorConfig", "foca": "FoCaCalibratorConfig"}


class DBCache(LibraryCache):
    """The first block of every kind always runs; while its residual changes by less than the threshold, that of the
    others is reused, or forecast by a calibrator.

    cache-dit computes the first 8 steps, which leaves nothing to decide of a budget of 9: here it is half of the budget
    at most, halved again while not even an endless threshold spends so little.

    Args:
        threshold: of the first block's residual, 0.08 by default; None: the one that spends the budget.
        calibrator: taylorseer or foca, with cache-dit's settings; None: reuse.
        warmup: steps that are computed first; None: as above.
        planned: instead of a threshold, the steps that DPCache plans, as cache-dit's steps mask. The first blocks of
            the other steps cost too, so that a few steps fewer are planned.
        separate_cfg: whether the pipeline runs guidance branches one after the other; None: cache-dit's own opinion.
    """

    partial = True

    def __init__(
        self,
        budget: int,
        num_inference_steps: int,
        threshold: float | None = None,
        calibrator: str | None = None,
        warmup: int | None = None,
        planned: bool = False,
        separate_cfg: bool | None = None,
    ):
        if find_spec("cache_dit") is None:
            raise ModuleNotFoundError("DBCache needs cache-dit: pip install -e '.[peers]'")
        if calibrator is not None and calibrator not in CALIBRATORS:
            raise SettingError(f"calibrator={calibrator} is not one of {', '.join(CALIBRATORS)}, null")
        super().__init__(budget, num_inference_steps)
        self.threshold, self.calibrator, self.separate_cfg = threshold, calibrator, separate_cfg
        self.shortens, self.warmup = warmup is None, max(1, min(8, budget // 2)) if warmup is None else warmup
        self.planned, self.skipped = planned, None
        self.needs_calibration = planned or threshold is None

    def prepare(self, pipe, calibration=None):
        if self.planned:
            self.calibration = calibration
            self.spend(pipe, calibration, "skipped", first=self.num_inference_steps - self.budget, whole=True)
            self.settled["mask"] = self._mask()
        elif self.threshold is None:
            self.threshold = float("inf")
            while self.shortens and self.warmup > 1 and rerun(self, pipe, calibration, limit=1) > self.budget:
                self.warmup //= 2
            self.settled = {"max_warmup_steps": self.warmup}
            self.spend(pipe, calibration, "threshold", first=0.08)

    def _mask(self) -> list[int]:
        T = self.num_inference_steps
        budget = max(T - self.skipped, 1)
        plan = dpcache(budget, T, warmup=min(3, budget))
        plan.prepare(None, self.calibration)
        return [int(step in plan.schedule.steps) for step in range(T)]

    def start(self, pipe, transformer):
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it tells of every step
        import cache_dit

        if not isinstance(pipe, DiffusionPipeline) or not cache_dit.BlockAdapterRegister.is_supported(pipe):
            raise SettingError(f"cache-dit does not know {type(pipe).__name__}")
        settings = {"Fn_compute_blocks": 1, "num_inference_steps": self.num_inference_steps}
        if self.planned:
            settings |= {"steps_computation_mask": self._mask(), "steps_computation_policy": "static"}
        else:
            settings |= {"max_warmup_steps": self.warmup, "residual_diff_threshold": self.threshold}
        cache_dit.enable_cache(
            pipe,
            cache_config=cache_dit.DBCacheConfig(**settings, enable_separate_cfg=self.separate_cfg),
            calibrator_config=getattr(cache_dit, CALIBRATORS[self.calibrator])() if self.calibrator else None,
        )
        self.branches = bool(transformer._context_kwargs["cache_config"].enable_separate_cfg)

    def stop(self, pipe, transformer):
        import cache_dit

        cache_dit.disable_cache(pipe)
