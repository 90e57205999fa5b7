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
"""How many elements of a module's output for one sample are compared from step to step. The outputs of all steps are
held in memory."""


def bac(budget: int, num_inference_steps: int, updates: int | None = None, upstream: int = 5) -> "BAC":
    """Attention and feed-forward outputs are reused. Each module has its own list of update steps, see `BAC`.

    Args:
        updates: the number of steps at which a module is computed, before the union; None: what spends the budget.
        upstream: the number of feed-forwards that are also computed at the update steps of the feed-forwards after
            them.
    """
    check_budget(budget, num_inference_steps)
    if updates is not None and not 1 <= updates <= num_inference_steps:
        raise SettingError(f"updates={updates} must be between 1 and num_inference_steps={num_inference_steps}")
    if upstream < 0:
        raise SettingError(f"upstream={upstream} must be at least 0")
    return BAC(budget, num_inference_steps, updates, upstream)


@dataclass(frozen=True)
class Likeness(Rerun):
    """For every module, the cosine similarity and the mean absolute difference of its outputs at any two steps: (2,
    modules, T, T), mean over prompts and guidance branches. Of large outputs only elements at equal distances are
    compared."""

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
    """Cosine similarities of rows (B, T, n) with each other, (B, T, T)."""
    rows = torch.nn.functional.normalize(rows, dim=-1)
    return rows @ rows.mT


def differences(rows: torch.Tensor) -> torch.Tensor:
    """Mean absolute differences of rows (B, T, n), (B, T, T)."""
    return torch.cdist(rows, rows, p=1) / rows.shape[-1]


def update_steps(similarity: np.ndarray, updates: int) -> list[int]:
    """The steps at which a module is computed, beginning with 0, found by dynamic programming. They maximise the sum
    over the other steps of the similarity (T, T) between the reused output and the output that would be computed."""
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
    """The update steps of all modules. The `upstream` feed-forwards with the largest caching errors also take the
    update steps of every feed-forward after them, so that these are not updated from stale input.

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
    """The recipe: every module has the same number of update steps, at the steps that suit it best (the paper's
    Adaptive Caching Scheduler). Then some feed-forwards also take the update steps of later ones (its Bubbling Union).

    It takes one trajectory for each calibration prompt, and up to ten runs of one prompt for the number of updates that
    spends the budget. The paper is on diffusion policies, whose actions are a few dozen numbers; we could obtain
    neither its authors' code nor its text, only descriptions of it. Our choices are: five upstream feed-forwards; their
    caching error, which is the mean absolute difference between any two steps, as in a public reimplementation; and, if
    the budget lies between two numbers of updates, one more update for the modules whose outputs are the least similar.

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
