"""ToCa: Accelerating Diffusion Transformers with Token-wise Feature Caching (Zou et al., arXiv 2410.05317), as in the
authors' code."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from baselines.search import FullSteps
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.models.family import block_named
from dpcache.predictors import Reuse
from dpcache.schedules import Schedule, check_budget
from dpcache.sites import Tokens

if TYPE_CHECKING:
    from dpcache.session import Branch

# Factors of models with both kinds of blocks: much of a single-stream block, little of a double-stream one.
PARTS = {"double": 0.4, "single": 1.6, None: 1.0}


@dataclass(frozen=True)
class TokenScores:
    """On a skipped step each feed-forward runs on the tokens with the highest scores. The score is attention received
    (s1) + soft_fresh_weight * age / interval (s3); the age is in steps since the token was last computed. Attention
    outputs are reused (s2, for cross-attention, is not in the code for these models), and in a DiT the tokens are
    spread over the image (s4).

    The number of tokens depends on the layer and, in a DiT, on the step. 27 is the index of DiT-XL's last layer; the
    code for FLUX has the same number.

    Args:
        num_inference_steps: T.
        interval: mean gap between full steps.
        fresh_ratio, soft_fresh_weight: see `toca`.
    """

    num_inference_steps: int
    interval: float
    fresh_ratio: float | None
    soft_fresh_weight: float

    def count(self, step: int, block: str, layer: int, length: int) -> int:
        """How many of `length` tokens this step computes anew."""
        ratio = self.fresh_ratio
        if block_named(block).square_grid:  # the scheme "ToCa-ddim50"
            left = (self.num_inference_steps - 1 - step) / self.num_inference_steps
            ratio = (0.07 if ratio is None else ratio) * (0.8 + 0.4 * layer / 27) * (3 - 4 * left) * 2.5
        else:
            ratio = (0.1 if ratio is None else ratio) * (1.5 - layer / 27) * PARTS[block_named(block).part]
        return int(torch.tensor(min(max(ratio, 0.0), 1.0)) * length)  # in float32, like theirs

    def select(self, context: "Branch", name: str, block: str, layer: int, received: torch.Tensor) -> torch.Tensor:
        refreshed_before, step = context.state.refreshed, context.step
        refreshed = refreshed_before.get(name, torch.zeros_like(received)).clamp(min=context.keys[-1])
        score = torch.nn.functional.normalize(received, dim=-1)
        score = score + self.soft_fresh_weight * (step - 1 - refreshed) / self.interval
        if block_named(block).square_grid:
            score = spread_out(score)
        count = self.count(step, block, layer, received.shape[1])
        chosen = score.argsort(dim=-1, descending=True, stable=True)[:, :count]
        refreshed_before[name] = refreshed.scatter(1, chosen, step)
        return chosen


def spread_out(score: torch.Tensor, bonus: float = 0.6) -> torch.Tensor:
    """Scores (B, N) of a square grid of tokens, in which the highest score of every 2 x 2 cell is raised by the share
    `bonus`."""
    side = math.isqrt(score.shape[1])
    if side**2 != score.shape[1] or side % 2:
        raise SettingError(f"{score.shape[1]} tokens are not a square of an even number")
    cells = score.view(-1, side // 2, 2, side // 2, 2).transpose(2, 3).flatten(3)  # (B, rows, columns, 4)
    best, place = cells.max(-1, keepdim=True)
    cells = cells.scatter_add(-1, place, bonus * best)
    return cells.unflatten(-1, (2, 2)).transpose(2, 3).reshape(score.shape)


@dataclass(frozen=True)
class ToCa(FullSteps):
    """The recipe, see `FullSteps`. The authors' code for DiT has other intervals, which shrink from 5 to 2, and one or
    two steps at which only the first layer is computed in full. Here full steps are spaced evenly for DiT too.
    """

    fresh_ratio: float | None
    soft_fresh_weight: float

    def make(self, full: int) -> Method:
        interval = (self.num_inference_steps - self.warmup + 1) / (full - self.warmup + 1)
        return self.with_steps(self.spaced(full), interval)

    def with_steps(self, steps: list[int], interval: float) -> Method:
        scores = TokenScores(self.num_inference_steps, interval, self.fresh_ratio, self.soft_fresh_weight)
        return Method(Schedule(steps, self.num_inference_steps), Tokens(selector=scores), Reuse())


def toca(
    budget: int,
    num_inference_steps: int,
    interval: int | None = None,
    fresh_ratio: float | None = None,
    soft_fresh_weight: float = 0.25,
    warmup: int = 3,
) -> Method | ToCa:
    """Every attention output is reused, and a few tokens of every feed-forward output are computed anew.

    Args:
        interval: the authors' N, a full step after every N - 1 others; None: as many full steps as spend the budget,
            with the mean gap between them for N.
        fresh_ratio: mean share of tokens computed anew, before the factors for layer, step and kind of block; None: the
            authors' 0.07 for DiT, else 0.1.
        soft_fresh_weight: of the age in a token's score.
        warmup: full steps to begin with.
    """
    check_budget(budget, num_inference_steps, warmup)
    recipe = ToCa(budget, num_inference_steps, warmup, fresh_ratio, soft_fresh_weight)
    return recipe if interval is None else recipe.with_steps(recipe.every(interval), interval)
