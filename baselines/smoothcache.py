"""SmoothCache: A Universal Inference Acceleration Technique for Diffusion Transformers (Liu et al., arXiv 2411.10510),
as in the authors' code."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from baselines.search import Search, with_decided
from dpcache.calibration import Calibration
from dpcache.denoisers import denoiser
from dpcache.errors import SettingError
from dpcache.method import CalibratedRecipe, Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, Staggered, check_budget, kind
from dpcache.sites import Modules
from dpcache.statistics import Rerun

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def smoothcache(
    budget: int,
    num_inference_steps: int,
    threshold: float | None = None,
    lookahead: int | None = None,
    steps: Mapping[str, Sequence[int]] | None = None,
) -> "SmoothCache | Method":
    """Attention and feed-forward outputs are reused. Each type of layer has its own computed steps, see `SmoothCache`.

    Args:
        threshold: of the error, the authors' 0.08 to 0.35; None: the one that spends the budget.
        lookahead: how many steps in a row may reuse an output; None: the authors' 3, or more if the budget needs it.
        steps: the computed steps of every type ({"attn1": [...], "ff": [...]}), without calibration; a type that is not
            listed is computed at every step.
    """
    check_budget(budget, num_inference_steps)
    if steps is not None:
        return method(num_inference_steps, steps)
    if lookahead is not None and lookahead < 1:
        raise SettingError(f"lookahead={lookahead} must be at least 1")
    return SmoothCache(budget, num_inference_steps, threshold, lookahead)


def method(num_inference_steps: int, lists: Mapping[str, Sequence[int]]) -> Method:
    """The method with these computed steps of every type of layer."""
    return Method(Staggered(num_inference_steps, lists), "modules", Reuse())


@dataclass(frozen=True)
class LayerErrors(Rerun):
    """The error of reusing a layer's output, |L_i - L_i+k|_1 / |L_i+k|_1 (Eq. 4), of every type of layer, for k = 1 to
    `lookahead` steps: (types, lookahead, T), from step i, infinite where there is no step i + k. Mean over the layers
    of a type, prompts and guidance branches. `lookahead` outputs of every layer are held in memory."""

    lookahead: int

    def measure(self, pipe: "DiffusionPipeline", calibration: Calibration) -> np.ndarray:
        T, types = calibration.num_inference_steps, layer_types(pipe)
        total = np.full((len(types), self.lookahead, T), np.inf)
        latest, errors = defaultdict(lambda: deque(maxlen=self.lookahead)), defaultdict(list)

        def observe(branch, step, name, output):
            output = output if isinstance(output, tuple) else (output,)
            kept = latest[branch, name]
            if step == 0:
                kept.clear()
            for before, earlier in enumerate(kept, 1):
                errors[kind(name), before, step - before].append(relative_error(earlier, output))
            kept.appendleft(output)

        calibration.rerun(pipe, Method(EvenlySpaced(T, T), "modules", Reuse()), observe=observe)
        for (name, before, step), found in errors.items():
            total[types.index(name), before - 1, step] = np.mean(found)
        return total


def relative_error(reused: Sequence[torch.Tensor], real: Sequence[torch.Tensor]) -> float:
    """|reused - real|_1 / |real|_1, over all streams of the layer together."""
    moved = sum((old.float() - new.float()).abs().sum() for old, new in zip(reused, real))
    return (moved / sum(new.float().abs().sum() for new in real)).item()


def layer_types(pipe: "DiffusionPipeline") -> list[str]:
    """Names of the modules that are kept of a block, in all kinds of blocks."""
    return list(dict.fromkeys(map(kind, Modules.names(denoiser(pipe)))))


def computed(errors: np.ndarray, threshold: float) -> list[int]:
    """Computed steps of a type of layer. After each, as many steps are skipped as possible with the error (lookahead,
    T) of the last skipped one within the threshold. The last step is always computed, as in the authors' code."""
    lookahead, T = errors.shape
    steps, step = [], 0
    while step < T:
        steps.append(step)
        allowed = [skipped for skipped in range(1, lookahead + 1) if errors[skipped - 1, step] <= threshold]
        step += max(allowed, default=0) + 1
    return sorted({*steps, T - 1})


@dataclass(frozen=True)
class SmoothCache(CalibratedRecipe):
    """The recipe: each type of layer has a list of computed steps, from its errors on full-step trajectories and one
    threshold for all types.

    It takes one trajectory for each calibration prompt, and for the threshold up to ten runs of one prompt. The
    authors' example for diffusers reuses self-attention alone; here, as in the paper, it is all layers before a
    residual connection. The norms, embedders and output layers always run, and count against the budget.

    Args: see `smoothcache`.
    """

    budget: int
    num_inference_steps: int
    threshold: float | None
    lookahead: int | None

    @property
    def reach(self) -> int:
        """The lookahead. By default it is so long that an infinite threshold computes at most two thirds of the budget,
        so that a threshold can spend the budget."""
        if self.lookahead is not None:
            return self.lookahead
        return max(3, -(-self.num_inference_steps // max(2 * self.budget // 3 - 1, 1)) - 1)

    @property
    def statistics(self) -> tuple[LayerErrors]:
        return (LayerErrors(self.reach),)

    @property
    def example(self) -> Method:
        return method(self.num_inference_steps, {})

    def fit(self, pipe: "DiffusionPipeline", calibration: Calibration) -> Method:
        T, errors = self.num_inference_steps, calibration[LayerErrors(self.reach)]

        def make(threshold: float) -> Method:
            lists = {name: computed(own, threshold) for name, own in zip(layer_types(pipe), errors, strict=True)}
            return with_decided(method(T, lists), {"lists": lists})

        threshold = 0.0 if self.threshold is None and self.budget == T else self.threshold
        if threshold is not None:
            return with_decided(make(threshold), {"threshold": threshold})
        return Search(make, self.budget, T, first=0.18, alike=True).fit(pipe, calibration)
