"""ProfilingDiT: Model Reveals What to Cache (Ma et al., arXiv 2504.03140), as in the authors' code."""

from collections import defaultdict

from baselines.search import spend
from dpcache.calibration import relative_change
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.session import denoiser
from dpcache.sites import Blocks, transformer_blocks


class ProfilingDiT(Method):
    """What the blocks that a profile has found add is reused, in runs of consecutive ones; the others always run.

    The authors' profile finds blocks that attend to the background, by masks of SAM2 and thresholds that are nowhere
    published. Here it takes the same share of blocks, those whose additions change least from step to step.

    Args:
        blocks: indices of the blocks that are skipped; None: those of the profile.
        share: of all blocks that the profile takes; the authors' list for HunyuanVideo has 24 of 40.
        interval: after the warm-up all blocks run in every so many steps; the authors' 6 spends half of the steps.
            None: what spends the budget, or 6 where no interval does.
        warmup: steps that are computed first.
    """

    needs_calibration = True

    def __init__(
        self,
        budget: int,
        num_inference_steps: int,
        blocks: list[int] | None = None,
        share: float = 0.6,
        interval: int | None = None,
        warmup: int = 6,
    ):
        if not 1 <= budget <= num_inference_steps:
            raise SettingError(f"budget={budget} must be between 1 and num_inference_steps={num_inference_steps}")
        if not 0 < share <= 1:
            raise SettingError(f"share={share} must be above 0 and at most 1")
        super().__init__(Schedule(None, num_inference_steps), Blocks(blocks), Reuse())
        self.budget, self.share, self.warmup, self.interval = budget, share, warmup, interval
        self.profiled = blocks is None
        self.needs_calibration = blocks is None or interval is None

    @property
    def interval(self) -> int | None:
        return self._interval

    @interval.setter
    def interval(self, value: int | None) -> None:
        self._interval, T = value, self.num_inference_steps
        if value is not None:
            self.schedule = Schedule([*range(min(self.warmup, T)), *range(self.warmup, T, value)], T)

    def prepare(self, pipe, calibration=None):
        if self.profiled:
            changes = profile(pipe, calibration)
            self.settled = {"changes": changes}
            least = sorted(range(len(changes)), key=changes.__getitem__)
            self.site = Blocks(sorted(least[: max(1, round(self.share * len(changes)))]))
        self.settled["blocks"] = self.site.blocks
        if self.interval is None:
            self.settled |= spend(self, pipe, calibration, self, "interval", self.budget, first=6, whole=True)


def profile(pipe, calibration) -> list[float]:
    """Of every block, the relative L1 change of what it adds to the image stream, from step to step of the calibration
    prompts' full-step trajectories: mean over steps, prompts and guidance branches."""
    T, count = int(calibration.made_for["num_inference_steps"]), len(transformer_blocks(denoiser(pipe)))
    previous, changes = {}, defaultdict(list)

    def observe(branch, step, name, added):
        added = added[0] if isinstance(added, tuple) else added
        if step:
            changes[name].append(relative_change(added, previous[branch, name]).item())
        previous[branch, name] = added

    for start in (0, 1):  # every other block, so that each is a run of its own
        if blocks := range(start, count, 2):
            calibration.rerun(pipe, Method(EvenlySpaced(T, T), Blocks(blocks), Reuse()), observe=observe)
    return [sum(changes[str(block)]) / len(changes[str(block)]) for block in range(count)]
