"""SeaCache (arXiv 2602.18993) as diffusers has it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import SeaCacheConfig

from baselines.library import DiffusersCache
from baselines.search import Search
from baselines.solver import of_flow_matching
from dpcache.arguments import argument
from dpcache.errors import SettingError
from dpcache.models.family import family_of
from dpcache.schedules import check_budget

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class SeaCache(DiffusersCache):
    """The residual over all blocks is extrapolated while the latents, filtered to the frequencies that are signal at
    their noise level, have changed by less than the threshold, for at most `max_skip` steps in a row."""

    threshold: float
    max_skip: int

    def config(self, pipe: "DiffusionPipeline") -> SeaCacheConfig:
        scheduler = pipe.scheduler
        if not of_flow_matching(scheduler) or scheduler.config.get("invert_sigmas"):
            raise SettingError(
                "SeaCache needs the noise levels of flow matching, from 1 to 0, as its scheduler's sigmas; those of "
                f"this {type(scheduler).__name__} are others"
            )
        return SeaCacheConfig(self.threshold, max_consecutive_cached=self.max_skip, raw_vision_callback=latents_of)


def latents_of(module: torch.nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The latents in a transformer's call, (C, F, H, W) each. In packed latents a token holds 2 x 2 pixels. Raises
    LookupError if the model packs its latents and its family's record does not say how (diffusers would hide a
    ValueError). The tokens of an image to be edited, which follow the latents, are left out."""
    latents = argument(0, "hidden_states", args, kwargs)
    if isinstance(latents, list):
        return latents
    if latents.ndim == 3:
        family = family_of(module)
        if family.token_grid is None:
            raise LookupError(f"SeaCache: how {family.transformer} packs its latents is not known")
        rows, columns = family.token_grid(kwargs)
        latents = latents[:, : rows * columns].unflatten(1, (rows, columns))
        latents = latents.unflatten(3, (-1, 2, 2))  # B, H, W, C, 2, 2
        latents = latents.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)
    if latents.ndim == 4:
        latents = latents.unsqueeze(2)
    return list(latents)


def seacache(
    budget: int, num_inference_steps: int, threshold: float | None = None, max_skip: int | None = None
) -> SeaCache | Search:
    """The residual over all blocks is extrapolated while the filtered latents have changed little.

    diffusers' own limit, 2 skipped steps in a row, spends at least 18 steps of 50; here twice the mean gap.

    Args:
        threshold: None: the one that spends the budget.
        max_skip: steps skipped in a row at most; None: as above.
    """
    check_budget(budget, num_inference_steps)
    longest = max(2, 2 * num_inference_steps // budget) if max_skip is None else max_skip

    def make(threshold: float) -> SeaCache:
        return SeaCache(num_inference_steps, threshold, longest, decided={"max_consecutive_cached": longest})

    return Search(make, budget, num_inference_steps, first=0.25) if threshold is None else make(threshold)
