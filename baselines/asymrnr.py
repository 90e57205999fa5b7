"""AsymRnR: Video Diffusion Transformers Acceleration with Asymmetric Reduction and Restoration (Sun et al., arXiv
2412.11706), as in the authors' code."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from baselines.search import Search, with_decided
from dpcache._diffusers import Hook, leave_uncompiled, unwrap_module
from dpcache.calibration import Calibration
from dpcache.denoisers import denoiser
from dpcache.errors import SettingError
from dpcache.flops import attention_flops
from dpcache.hooks import SessionHook
from dpcache.method import CalibratedRecipe, Method
from dpcache.models.family import block_of
from dpcache.predictors import Reuse
from dpcache.schedules import Schedule, check_budget
from dpcache.sites import Site, transformer_blocks
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dpcache.session import Session

CHUNK = (6, 2, 2)
"""Frames, rows and columns of the chunks of tokens, each with one that others are matched with: for HunyuanVideo."""

Places = Mapping[int, Sequence[int]]
"""Steps by block."""


@dataclass(frozen=True)
class ThinnedAttention(Site):
    """Keeps the matching of tokens. The model runs at every step, but its self-attention takes only a part of the
    video's queries, keys and values. A computed step computes the matching and keeps it; a skipped step reuses it.

    Args:
        queries, values: the steps, by block, at which a part of the queries, or of the keys and values, is left out.
        query_ratio, value_ratio: how many of the video's tokens are then left out.
    """

    name = "matching"
    queries: Places = field(default_factory=dict)
    values: Places = field(default_factory=dict)
    query_ratio: float = 0.9
    value_ratio: float = 0.3

    @property
    def partial(self) -> bool:
        return True

    def hooks(self, session: "Session", transformer: torch.nn.Module) -> list[tuple[torch.nn.Module, Hook]]:
        config, pairs = unwrap_module(transformer).config, []
        for index, block in enumerate(transformer_blocks(transformer)):
            known = block_of(block)
            attention = getattr(block, known.attention, None)
            if attention is None:
                raise SettingError(f"site={self.name} does not know the self-attention of a {known.kind}")
            pairs.append((attention, ThinHook(session, index, config, known.text_first)))
        return pairs


def patches(config: Mapping) -> tuple[int, int, int]:
    """Frames, rows and columns of the latents that form one token."""
    size = config.get("patch_size", 1)
    return (config.get("patch_size_t") or 1, size, size) if isinstance(size, int) else tuple(size)


def split(grid: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits the tokens of a video, numbered frame by frame and row by row: indices of one random token of every chunk,
    which is kept, and of all others, which are matched with the kept ones. If the chunks do not fill the grid, they
    begin at a random place.

    Args:
        grid: frames, rows, columns.
    """
    rng = np.random.default_rng(seed)
    chunk = [min(size, length) for size, length in zip(CHUNK, grid)]
    counts = [length // size for size, length in zip(chunk, grid)]
    starts = [rng.integers(length - size * count + 1) for size, count, length in zip(chunk, counts, grid)]
    corners = np.meshgrid(*(s + size * np.arange(n) for s, size, n in zip(starts, chunk, counts)), indexing="ij")
    place = np.ravel_multi_index([c + rng.integers(size, size=counts) for c, size in zip(corners, chunk)], grid)
    kept = np.sort(place, axis=None)
    return torch.from_numpy(kept), torch.from_numpy(np.setdiff1d(np.arange(np.prod(grid)), kept))


def match(tokens: torch.Tensor, kept: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of the other tokens, the squared distance to the nearest kept token, in units of the others' mean
    square, and the number of that kept token, (B, H, n) each.

    Args:
        tokens: (B, H, N, D).
    """
    tokens = tokens.float()
    own, near = tokens[:, :, others], tokens[:, :, kept]
    squares = (near**2).sum(-1)[..., None, :] - 2 * own @ near.mT  # but for the token's own, which is the same for all
    distance, nearest = squares.min(-1)
    distance = distance + (own**2).sum(-1)
    return distance.clamp(min=0) / (own**2).sum(-1).mean(), nearest


@dataclass
class Thinning:
    """The tokens that stay, and the tokens whose outputs replace those of the tokens left out.

    Attributes:
        stay: indices into N tokens of those that stay, (B, H, n).
        source: for every token, the place among the staying tokens of the token whose output it gets, (B, H, N).
    """

    stay: torch.Tensor
    source: torch.Tensor

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) -> (B, H, n, D)."""
        return tokens.gather(2, self.stay[..., None].expand(-1, -1, -1, tokens.shape[-1]))

    def restored(self, outputs: torch.Tensor) -> torch.Tensor:
        """(B, H, n, D) -> (B, H, N, D)."""
        return outputs.gather(2, self.source[..., None].expand(-1, -1, -1, outputs.shape[-1]))


def thinning(
    distance: torch.Tensor, nearest: torch.Tensor, kept: torch.Tensor, others: torch.Tensor, ratio: float
) -> Thinning:
    """Leave out the tokens with the smallest distances to a kept one, as many as are `ratio` of all tokens. Each is
    replaced by its nearest kept token."""
    total = len(kept) + len(others)
    count = max(0, int(total * (1 - ratio)) - len(kept))  # of the others, that stay
    order, lead = distance.argsort(-1, descending=True), distance.shape[:2]
    stay = torch.cat([others[order[..., :count]], kept.expand(*lead, -1)], -1)
    source = torch.empty((*lead, total), dtype=torch.long, device=distance.device)
    places = torch.arange(count + len(kept), device=distance.device).expand(*lead, -1)
    source.scatter_(-1, stay, places)
    left_out = order[..., count:]
    source.scatter_(-1, others[left_out], count + nearest.gather(-1, left_out))
    return Thinning(stay, source)


class _Attention(TorchFunctionMode):
    """PyTorch's attention, with `attend` in its place."""

    def __init__(self, attend: Callable):
        super().__init__()
        self.attend, self.seen = attend, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.seen = True
        return self.attend(func, *args, **(kwargs or {}))


class ThinHook(SessionHook):
    """On a self-attention.

    Args:
        index: of its block.
        config: the model's.
        text_first: whether the text's tokens come before the video's; where there are any.
    """

    def __init__(self, session: "Session", index: int, config: Mapping, text_first: bool):
        super().__init__(session)
        self.index, self.text_first = index, text_first
        self.patch, self.channels = patches(config), config.get("in_channels")
        self.latest, self.parted = None, ()  # step and grid, and how their tokens are split

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        with _Attention(self.attend) as attention:
            output = self.forward(*args, **kwargs)
        if not attention.seen:
            raise SettingError("AsymRnR has to see PyTorch's own attention: set_attention_backend('native')")
        return output

    def attend(
        self,
        func: Callable,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """The attention function `func` on (B, H, N, D) with some tokens left out. Returns (B, H, N, D)."""
        session, site = self.session, self.session.site
        branch, shape = session.current, session.current.signature[0][0]
        if len(shape) != 5:
            raise SettingError(f"AsymRnR thins the tokens of videos, and this model's input is {shape}")
        frames = shape[2] if shape[1] == self.channels else shape[1]  # CogVideoX has them before the channels
        grid = tuple(length // size for length, size in zip((frames, *shape[3:]), self.patch))
        count, length = grid[0] * grid[1] * grid[2], query.shape[2]
        if key.shape[2] != length or length < count or is_causal:
            raise SettingError(f"AsymRnR: a self-attention of {length} tokens does not hold the video's {count}")
        video = slice(length - count, length) if self.text_first else slice(0, count)
        latest = branch.keys[-1], grid, query.device
        if self.latest != latest:
            parts = split(grid, 1000 * self.index + branch.keys[-1])
            self.latest, self.parted = latest, tuple(part.to(query.device, non_blocking=True) for part in parts)
        kept, others = self.parted
        if branch.skip:
            of_query, nearest_query, of_value, nearest_value = session.predict(str(self.index))
        else:
            of_query, nearest_query = match(query[:, :, video], kept, others)
            of_value, nearest_value = match(value[:, :, video], kept, others)
            session.keep(str(self.index), (of_query, nearest_query, of_value, nearest_value))
            if branch.step:  # the first step's is counted as a full one
                products = 2 * query.shape[0] * query.shape[1] * len(kept) * len(others)
                session.spare(-products * (query.shape[-1] + value.shape[-1]))
        before = attention_flops(query.shape, key.shape, value.shape)
        restore = None
        if branch.step and branch.step in site.queries.get(self.index, ()):
            thinned = thinning(of_query, nearest_query, kept, others, site.query_ratio)
            query, restore = self.replaced(query, video, thinned), thinned
        if branch.step and branch.step in site.values.get(self.index, ()):
            thinned = thinning(of_value, nearest_value, kept, others, site.value_ratio)
            key, value = (self.replaced(tokens, video, thinned) for tokens in (key, value))
        if attn_mask is not None:
            attn_mask = self.mask(attn_mask, length, query.shape[2], key.shape[2])
        output = func(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **kwargs)
        session.spare(before - attention_flops(query.shape, key.shape, value.shape))
        if restore is None:
            return output
        text = output.shape[2] - restore.stay.shape[2]
        if self.text_first:
            return torch.cat([output[:, :, :text], restore.restored(output[:, :, text:])], 2)
        end = output.shape[2] - text
        return torch.cat([restore.restored(output[:, :, :end]), output[:, :, end:]], 2)

    @staticmethod
    def replaced(tokens: torch.Tensor, video: slice, thinned: Thinning) -> torch.Tensor:
        """With the video's tokens thinned."""
        parts = [tokens[:, :, : video.start], thinned.of(tokens[:, :, video]), tokens[:, :, video.stop :]]
        return torch.cat(parts, 2)

    def mask(self, mask: torch.Tensor, length: int, queries: int, keys: int) -> torch.Tensor:
        """The attention mask for the tokens that stay. A mask is assumed to be the same for all of the video's
        tokens."""
        if mask.shape[-1] == length:
            mask = mask[..., :keys] if self.text_first else mask[..., length - keys :]
        if mask.shape[-2] == length:
            mask = mask[..., :queries, :] if self.text_first else mask[..., length - queries :, :]
        return mask


@dataclass(frozen=True)
class Redundancy(Rerun):
    """Mean squared distance of a video's tokens to their nearest kept token, in units of the tokens' mean square, for
    queries and for values: (2, blocks, T), mean over prompts, guidance branches and heads."""

    def measure(self, pipe: "DiffusionPipeline", calibration: Calibration) -> np.ndarray:
        T, count = calibration.num_inference_steps, len(transformer_blocks(denoiser(pipe)))
        found = defaultdict(list)

        def observe(branch, step, name, matching):
            for part, distance in enumerate(matching[::2]):
                found[part, int(name), step].append(float(distance.mean()))

        every = Method(Schedule(range(T), T), ThinnedAttention(), Reuse())
        calibration.rerun(pipe, every, observe=observe)
        return np.array(
            [[[np.mean(found[part, block, step]) for step in range(T)] for block in range(count)] for part in (0, 1)]
        )


@dataclass(frozen=True)
class AsymRnR(CalibratedRecipe):
    """The recipe: self-attention leaves out tokens of the video that are similar to another token. A query that is left
    out gets the output of the similar one; keys and values are left out without replacement. Of every chunk of tokens a
    random one is kept, and the others are matched with the nearest kept token, head by head. A matching is used for
    several steps.

    Tokens are left out in the blocks and at the steps at which tokens are most similar, according to their distances in
    the full-step trajectories, one for each calibration prompt. The authors have ten tiers of similarity; their
    repository has the values for four models, but not the code that derives them. Here tokens are left out in the
    `share` of blocks and steps with the smallest distances, separately for queries and for values, and the share is
    searched for so that it spends the budget. Most budgets are out of reach, because only a part of attention's two
    matrix products is saved. Then the share is 0.2, about what the authors' tiers for HunyuanVideo choose. At step 0 no
    token is left out.

    Args: see `asymrnr`.
    """

    budget: int
    num_inference_steps: int
    share: float | None
    query_ratio: float
    value_ratio: float
    reuse: int
    statistics: ClassVar[tuple] = (Redundancy(),)

    @property
    def example(self) -> Method:
        return self.make({}, {})

    def make(self, queries: Places, values: Places) -> Method:
        T = self.num_inference_steps
        site = ThinnedAttention(queries, values, self.query_ratio, self.value_ratio)
        return Method(Schedule(range(0, T, self.reuse), T), site, Reuse())

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        distances = calibration[Redundancy()]

        def make(share: float) -> Method:
            return with_decided(self.make(*(least(part, share) for part in distances)), {"share": share})

        if self.share is not None:
            return make(self.share)
        return Search(make, self.budget, self.num_inference_steps, 0.2, "share", alike=True).fit(pipe, calibration)


def asymrnr(
    budget: int,
    num_inference_steps: int,
    share: float | None = None,
    query_ratio: float = 0.9,
    value_ratio: float = 0.3,
    reuse: int = 3,
) -> AsymRnR:
    """Similar tokens are left out of self-attention, see `AsymRnR`.

    Args:
        share: share of blocks and steps at which tokens are left out; None: the share that spends the budget.
        query_ratio, value_ratio: share of the video's tokens that are left out there; by default the authors' for
            HunyuanVideo.
        reuse: for how many steps a matching is used; by default the authors' value.
    """
    check_budget(budget, num_inference_steps)
    if not 0 < query_ratio < 1 or not 0 < value_ratio < 1 or reuse < 1 or not 0 <= (share or 0) <= 1:
        raise SettingError(
            f"share={share}, query_ratio={query_ratio}, value_ratio={value_ratio}, reuse={reuse}: must be from 0 to 1, "
            "between 0 and 1, between 0 and 1, and at least 1"
        )
    return AsymRnR(budget, num_inference_steps, share, query_ratio, value_ratio, reuse)


def least(distances: np.ndarray, share: float) -> dict[int, list[int]]:
    """The `share` of blocks and steps with the smallest distances (blocks, T): the steps of each block that has any."""
    order = distances.argsort(axis=None, kind="stable")[: round(min(share, 1) * distances.size)]
    blocks, steps = np.unravel_index(order, distances.shape)
    return {int(block): sorted(steps[blocks == block].tolist()) for block in sorted({*blocks.tolist()})}
