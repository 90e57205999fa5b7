"""Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers (Chen et al., arXiv
2406.01125)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from baselines.search import spent, with_decided, with_full_steps
from dpcache._diffusers import Hook
from dpcache.calibration import Calibration
from dpcache.denoisers import denoiser
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Staggered, check_budget
from dpcache.sites import Blocks, Site, transformer_blocks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dpcache.session import Session

PAPERS_SHARE = 0.75
"""The share of blocks that are reused. If every 2nd step is full, it gives the speed-up of 1.6 that the paper
reports."""


def delta_dit(
    budget: int,
    num_inference_steps: int,
    interval: int | None = None,
    share: float | None = None,
    boundary: float = 0.5,
) -> "DeltaDiT | Method":
    """In the first half of the steps, what the last blocks add to their input is reused; in the second half, what the
    first blocks add. The last blocks make the details and the first blocks the outline, and the sampler makes the
    outline first.

    Args:
        interval: the paper's N: all blocks run in every N-th step. None: as many full steps as spend the budget.
        share: of all blocks, the share that is reused at the other steps; None: see `DeltaDiT`.
        boundary: the paper's b, as a share of the steps. Before it, the last blocks are reused; from the next full step
            on, the first blocks.
    """
    check_budget(budget, num_inference_steps)
    if not 0 <= boundary <= 1:
        raise SettingError(f"boundary={boundary} must be between 0 and 1")
    recipe = DeltaDiT(budget, num_inference_steps, share, boundary)
    if interval is None:
        return recipe
    if interval < 1:
        raise SettingError(f"interval={interval} must be at least 1")
    return recipe.make(range(0, num_inference_steps, interval), PAPERS_SHARE if share is None else share)


@dataclass(frozen=True)
class Ends(Site):
    """What the first blocks and what the last blocks add to the streams. The two sets of blocks may overlap, so every
    block belongs to one of three groups, which are kept separately: "front", "middle" (in both sets) and "rear".

    Args:
        share: of all blocks, the share of the first blocks, and likewise of the last blocks.
    """

    name = "ends"
    apart_in_time = True
    kinds = ("front", "middle", "rear")
    share: float

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise SettingError(f"share={self.share} must be above 0 and at most 1")

    @property
    def partial(self) -> bool:
        return True

    def hooks(self, session: "Session", transformer: torch.nn.Module) -> list[tuple[torch.nn.Module, Hook]]:
        depth = len(transformer_blocks(transformer))
        count = max(round(self.share * depth), 1)
        front, rear = set(range(count)), set(range(depth - count, depth))
        pairs = []
        for group, blocks in zip(self.kinds, (front - rear, front & rear, rear - front)):
            for block, hook in Blocks(blocks).hooks(session, transformer):
                hook.name = f"{hook.name}.{group}"
                pairs.append((block, hook))
        return pairs


@dataclass(frozen=True)
class DeltaDiT(CalibratedRecipe):
    """The recipe: evenly spaced full steps, as many as spend the budget together with the blocks of the other steps.

    There is no public code of the authors, and we could read only the paper's abstract and descriptions of the paper.
    Our choices are: the boundary in the middle of the steps, and the division of the budget. The paper's share of the
    blocks is reused, or more, so that half of the budget is left for full steps. Calibration takes three or four runs
    of one prompt.

    Args: see `delta_dit`.
    """

    budget: int
    num_inference_steps: int
    share: float | None
    boundary: float
    statistics: ClassVar[tuple] = ()

    @property
    def example(self) -> Method:
        return self.make([0], PAPERS_SHARE if self.share is None else self.share)

    def make(self, full: Sequence[int], share: float) -> Method:
        """With these full steps."""
        T = self.num_inference_steps
        turn = next((step for step in full if step >= self.boundary * T), T)
        lists = {
            "front": sorted({*full, *range(turn)}),
            "middle": full,
            "rear": sorted({*full, *range(turn, T)}),
        }
        return Method(Staggered(T, lists), Ends(share), Reuse())

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        T, share = self.num_inference_steps, self.share

        def make(full: int) -> Method:
            return self.make(EvenlySpaced(full, T).steps, share)

        if share is None:
            depth, share = len(transformer_blocks(denoiser(pipe))), 1.0
            always = (spent(make(1), pipe, calibration, limit=1) - 1) / max(T - 1, 1)  # of a step without blocks
            computed = int(depth * (self.budget / (2 * T) - always) / (1 - always))
            share = 1 - min(max(computed, 0), int(depth * (1 - PAPERS_SHARE))) / depth
        found = with_full_steps(make, self.budget, T, 1, pipe, calibration)
        return with_decided(found, {"share": share})
