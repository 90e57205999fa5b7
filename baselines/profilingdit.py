"""ProfilingDiT: Model Reveals What to Cache (Ma et al., arXiv 2504.03140), as in the authors' code."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from baselines.search import Search, with_decided
from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Reuse
from dpcache.schedules import Schedule, check_budget
from dpcache.sites import Blocks
from dpcache.statistics import BlockChanges

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Profiled(CalibratedRecipe):
    """The recipe: takes the blocks from a profile and searches for the interval, unless these are given.

    Args: see `profilingdit`.
    """

    budget: int
    num_inference_steps: int
    blocks: Sequence[int] | None
    share: float
    interval: int | None
    warmup: int

    @property
    def statistics(self) -> tuple[BlockChanges, ...]:
        return (BlockChanges(),) if self.blocks is None else ()

    @property
    def example(self) -> Method:
        return self.make(6, self.blocks)

    def make(self, interval: int, blocks: Sequence[int] | None) -> Method:
        T = self.num_inference_steps
        steps = [*range(min(self.warmup, T)), *range(self.warmup, T, interval)]
        return Method(Schedule(steps, T), Blocks(blocks), Reuse())

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        blocks, profile = self.blocks, {}
        if blocks is None:
            changes = calibration[BlockChanges()].tolist()
            least = sorted(range(len(changes)), key=changes.__getitem__)
            blocks, profile = sorted(least[: max(1, round(self.share * len(changes)))]), {"changes": changes}
        if self.interval is not None:
            method = self.make(self.interval, blocks)
        else:
            make = partial(self.make, blocks=blocks)
            search = Search(make, self.budget, self.num_inference_steps, first=6, setting="interval", whole=True)
            method = search.fit(pipe, calibration)
        return with_decided(method, profile | {"blocks": list(blocks)})


def profilingdit(
    budget: int,
    num_inference_steps: int,
    blocks: Sequence[int] | None = None,
    share: float = 0.6,
    interval: int | None = None,
    warmup: int = 6,
) -> Method | Profiled:
    """The blocks that a profile chooses are skipped: what each run of consecutive ones adds is reused. The other blocks
    always run.

    The authors' profile finds blocks that attend to the background, by masks of SAM2 and thresholds that are not
    published. Here the profile takes the same share of blocks: those whose additions change least from step to step.

    Args:
        blocks: indices of the blocks that are skipped; None: those of the profile.
        share: of all blocks that the profile takes; the authors' list for HunyuanVideo has 24 of 40.
        interval: after the warm-up, all blocks run in every `interval`-th step; with the authors' 6, half of the
            compute is spent. None: the interval that spends the budget, or 6 if none does.
        warmup: steps that are computed first.
    """
    check_budget(budget, num_inference_steps)
    if not 0 < share <= 1:
        raise SettingError(f"share={share} must be above 0 and at most 1")
    recipe = Profiled(budget, num_inference_steps, blocks, share, interval, warmup)
    return recipe if blocks is None or interval is None else recipe.make(interval, blocks)
