"""BAC: Block-wise Adaptive Caching for Accelerating Diffusion Policy (Ji et al., arXiv 2506.13456), here for diffusion
transformers of images and videos."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from baselines.search import Search
from dpcache.calibration import Calibration
from dpcache.denoisers import denoiser
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.models.family import block_of, feed_forwards_of
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Staggered, check_budget
from dpcache.sites import Modules, transformer_blocks, unknown_block
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MOST_ELEMENTS = 2**16
"""Of a module's output for one sample, how many are compared from step to step: the outputs of all steps are held."""


def bac(budget: int, num_inference_steps: int, updates: int | None = None, upstream: int = 5) -> "BAC":
    """Attention and feed-forward outputs are reused, each module at update steps of its own, see `BAC`.

    Args:
        updates: the number of steps at which a module is computed, before the union; None: what spends the budget.
        upstream: of the feed-forwards, how many take over the update steps of those after them.
    """
    check_budget(budget, num_inference_steps)
    if updates is not None and not 1 <= updates <= num_inference_steps:
        raise SettingError(f"updates={updates} must be between 1 and num_inference_steps={num_inference_steps}")
    if upstream < 0:
        raise SettingError(f"upstream={upstream} must be at least 0")
    return BAC(budget, num_inference_steps, updates, upstream)


@dataclass(frozen=True)
class Likeness(Rerun):
    """Of every module's output at any two steps, the cosine similarity and the mean absolute difference: (2, modules,
    T, T), mean over prompts and guidance branches. Of large outputs, elements at equal distances stand for all."""

    def measure(self, pipe: "DiffusionPipeline", calibration: Calibration) -> np.ndarray:
        T, names = calibration.num_inference_steps, Modules.names(denoiser(pipe))
        total, outputs = np.zeros((2, len(names), T, T)), defaultdict(list)
        count = 0

        def observe(branch, step, name, output):
            nonlocal count
            kept = outputs[branch, name]
            if step == 0:
                kept.clear()
            kept.append(sampled(output if isinstance(output, tuple) else (output,)))
            if step < T - 1:
                return
            rows = torch.stack(kept, 1)  # (B, T, n)
            kept.clear()
            total[0, names.index(name)] += cosines(rows).sum(0).numpy()
            total[1, names.index(name)] += differences(rows).sum(0).numpy()
            count += len(rows)

        calibration.rerun(pipe, Method(EvenlySpaced(T, T), "modules", Reuse()), observe=observe)
        return total * len(names) / count


def sampled(streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each sample, at most `MOST_ELEMENTS` elements at equal distances, (B, n), float32 on the CPU."""
    every = -(-sum(stream[0].numel() for stream in streams) // MOST_ELEMENTS)
    return torch.cat([stream.flatten(1)[:, ::every] for stream in streams], 1).float().cpu()


def cosines(rows: torch.Tensor) -> torch.Tensor:
    """Of rows (B, T, n), (B, T, T)."""
    rows = torch.nn.functional.normalize(rows, dim=-1)
    return rows @ rows.mT


def differences(rows: torch.Tensor) -> torch.Tensor:
    """Mean absolute differences of rows (B, T, n), (B, T, T)."""
    return torch.cdist(rows, rows, p=1) / rows.shape[-1]


def update_steps(similarity: np.ndarray, updates: int) -> list[int]:
    """The steps at which a module is computed, so that the similarities (T, T) of what is reused at the other steps to
    what would be computed there have the largest sum. The first is 0. By dynamic programming."""
    T = len(similarity)
    # gain[i, j]: what is reused of step i at the steps up to j, the next update or the end.
    gain = np.full((T, T + 1), -np.inf)
    for i in range(T):
        gain[i, i + 1 :] = np.concatenate([[0.0], np.cumsum(similarity[i, i + 1 :])])
    best, before = np.full((updates, T), -np.inf), np.zeros((updates, T), int)
    best[0, 0] = 0.0
    for count in range(1, updates):
        reached = best[count - 1][:, None] + gain[:, :T]  # (last update, next update)
        best[count], before[count] = reached.max(0), reached.argmax(0)
    steps = [int((best[-1] + gain[:, T]).argmax())]
    for count in range(updates - 1, 0, -1):
        steps.append(int(before[count, steps[-1]]))
    return steps[::-1]


def bubbled(
    steps: Mapping[str, Sequence[int]], depths: Mapping[str, int], errors: Mapping[str, float], upstream: int
) -> dict[str, list[int]]:
    """The update steps of all modules, where the `upstream` feed-forwards of the largest caching errors also take those
    of every feed-forward after them, so that its update does not begin from stale input.

    Args:
        depths: the block of every feed-forward.
        errors: of every feed-forward.
    """
    chosen = sorted(errors, key=errors.__getitem__, reverse=True)[:upstream]
    found = {name: list(own) for name, own in steps.items()}
    for name in sorted(chosen, key=depths.__getitem__, reverse=True):  # the last first: unions pass on what they took
        later = [found[other] for other in depths if depths[other] > depths[name]]
        found[name] = sorted(set(found[name]).union(*later))
    return found


@dataclass(frozen=True)
class BAC(CalibratedRecipe):
    """The recipe: every module has the same number of update steps, where they suit it best (the paper's Adaptive
    Caching Scheduler); then some feed-forwards take over the steps of later ones (its Bubbling Union).

    It takes one trajectory for each calibration prompt, and up to ten runs of one prompt for the number of updates that
    spends the budget. The paper is on diffusion policies, whose actions are a few dozen numbers; its authors' code was
    not to be had here, nor more of the paper than descriptions of it. Open, and chosen here: five upstream
    feed-forwards; their caching error, which is the mean absolute difference between any two steps, as in a public
    reimplementation; and, where the budget lies between two numbers of updates, one more for the modules whose outputs
    are the least alike.

    Args: see `bac`.
    """

    budget: int
    num_inference_steps: int
    updates: int | None
    upstream: int

    @property
    def statistics(self) -> tuple[Likeness]:
        return (Likeness(),)

    @property
    def example(self) -> Method:
        return Method(Staggered(self.num_inference_steps, {}), "modules", Reuse())

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        T, transformer = self.num_inference_steps, denoiser(pipe)
        names, (similarities, differing) = Modules.names(transformer), calibration[Likeness()]
        depths = feed_forwards(transformer)
        errors = {name: float(differing[names.index(name)].mean()) for name in depths}
        least_alike = similarities.mean((1, 2)).argsort(kind="stable")

        def make(skipped: float) -> Method:
            every, more = divmod(
                min(max(round((1 - skipped) * T * len(names)), len(names)), T * len(names)), len(names)
            )
            updates = np.full(len(names), every)
            updates[least_alike[:more]] += 1
            own = {name: update_steps(*pair) for name, *pair in zip(names, similarities, updates, strict=True)}
            lists = bubbled(own, depths, errors, self.upstream)
            decided = {"updates": updates.tolist(), "lists": lists}
            return Method(Staggered(T, lists), "modules", Reuse(), decided)

        updates = T if self.updates is None and self.budget == T else self.updates
        if updates is not None:
            return make(1 - updates / T)
        first = 1 - self.budget / T
        return Search(make, self.budget, T, first, setting="skipped", alike=True).fit(pipe, calibration)


def feed_forwards(transformer: torch.nn.Module) -> dict[str, int]:
    """Names of the modules that hold a feed-forward, and the index of the block of each. Raises SettingError where none
    is known."""
    blocks = transformer_blocks(transformer)
    found = {f"{index}.{name}": index for index, block in enumerate(blocks) for _, name in feed_forwards_of(block)}
    if not found:
        raise SettingError(unknown_block(Modules(), block_of(blocks[0]), "feed_forwards"))
    return found
