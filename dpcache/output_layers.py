"""How a model's output layers map features of other steps to predictions, for the simulator (`dpcache.simulator`) at
site=stack.

At this site a skipped step predicts the last block's output h and runs the output layers on it. The output layers
change with time, so a feature of step a gives another prediction at step s than at step a. In diffusion transformers
they are a norm followed by a linear map: with f_s(h) = b_s + A_s h / |h|, and weights w of the features of earlier
keys,

    f_s(sum_a w_a h_a) = b_s + sum_a u_a (f_s(h_a) - b_s)    with u_a = w_a |h_a| / |sum_c w_c h_c|

This is an approximation, because |h| is here the length over all tokens, while the norm divides each token by its own
length.

The values of f_s at earlier features are measured. Each prompt runs once with all steps computed, and then several
times with only step 0 computed. In these later runs every step gets the feature of a fixed number of steps before, from
the full-step run; after every step, the latents are replaced by those of the full-step run. So the measured predictions
include guidance as the pipeline applies it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from dpcache._diffusers import StepListener, watching
from dpcache.calibration import record
from dpcache.denoisers import denoiser
from dpcache.errors import SettingError
from dpcache.gram import gram
from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.recorded import Recorded, kept_elements
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.session import Report, Session

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

DELAYS = 16  # at most: how many steps ago the features are
EXTRA = 64  # directions at most beside those of the recorded runs
MISFIT = 0.5  # at most, see `measure_output_layers`


@dataclass(frozen=True, eq=False)
class OutputLayers:
    """The output layers, in coordinates of r directions, the last of which are `Recorded.directions`.

    Attributes:
        delays: (D,), rising, the first is 0.
        decoded: (D, T, r), f_s of the feature of step s - delay, or of step 0 if that is later.
        empty: (T, r), b_s.
        lengths: (T, T), <h_a, h_b>, both without their mean over the channels; None if there is no norm.
        metrics: (P, r, r), every prompt's Gram matrix of the directions.
    """

    delays: np.ndarray
    decoded: np.ndarray
    empty: np.ndarray
    lengths: np.ndarray | None
    metrics: np.ndarray

    def at(self, step: int) -> np.ndarray:
        """(step, r): f_s - b_s of the features of all earlier steps, interpolated linearly between two delays."""
        ago = step - np.arange(step)
        high = np.searchsorted(self.delays, ago)
        low = high - 1
        part = ((ago - self.delays[low]) / (self.delays[high] - self.delays[low]))[:, None]
        return (1 - part) * self.decoded[low, step] + part * self.decoded[high, step] - self.empty[step]

    def pack(self) -> np.ndarray:
        """As one array, for a calibration's file."""
        lengths = np.empty(0) if self.lengths is None else self.lengths
        head = [len(self.metrics), *self.decoded.shape, len(lengths)]
        parts = (self.delays, self.decoded, self.empty, lengths, self.metrics)
        return np.concatenate([head, *(part.ravel() for part in parts)])

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "OutputLayers":
        """Of what `pack` made."""
        P, D, T, r, normed = packed[:5].astype(int)
        shapes = [(D,), (D, T, r), (T, r), (normed, normed), (P, r, r)]
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        delays, *parts = (part.reshape(shape) for part, shape in zip(np.split(packed[5:], ends), shapes))
        return cls(delays.astype(int), *parts[:2], parts[2] if normed else None, parts[3])


class _Forced(StepListener):
    """Keeps the predictions that the scheduler gets, and replaces the latents that it returns by those of another
    run."""

    def __init__(self, prompts: int, latents: list[torch.Tensor] | None = None):
        self.prompts, self.latents = prompts, latents
        self.predictions, self.returned = [], []

    def given(self, scheduler: "SchedulerMixin", arguments: dict) -> None:
        self.predictions.append(kept_elements(arguments["model_output"], self.prompts))

    def after_step(self, scheduler: "SchedulerMixin", output: "SchedulerOutput | tuple") -> None:
        if self.latents is None:
            self.returned.append(output[0].clone())
        else:
            output[0].copy_(self.latents[len(self.predictions) - 1])


@dataclass(frozen=True, eq=False)
class _Given(Method):
    """Fills in skipped steps with `feature(branch, step)`."""

    feature: Callable[[str, int], torch.Tensor] = field(kw_only=True)

    def session(self, pipe: "DiffusionPipeline", observe: Callable | None = None) -> Session:
        return _GivenSession(pipe, self, observe)


class _GivenSession(Session):
    def predict(self, name: str, seen: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, ...]:
        self._once(name)
        return self.method.feature(self.current.name, self.current.step)


class _Batch:
    """One batch of prompts, with the features and latents of its full-step run."""

    def __init__(
        self,
        pipe: "DiffusionPipeline",
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_inference_steps: int,
        count: Callable[[Report, list[int]], None],
        call: dict,
    ):
        self.pipe, self.prompts, self.seeds, self.T = pipe, prompts, seeds, num_inference_steps
        self.count, self.call = count, call
        full = _Forced(len(prompts))
        with watching(pipe.scheduler, full):
            method = Method(EvenlySpaced(self.T, self.T), "stack", Reuse())
            batch, kept = record(pipe, method, prompts, seeds, **call)
        count(batch.report, [len(prompts)])
        self.features = {branch: tensors["stack"] for branch, tensors in kept.items()}
        self.latents, self.predictions = full.returned, np.stack(full.predictions, 1)

    def decode(self, feature: Callable[[torch.Tensor, int], torch.Tensor]) -> np.ndarray:
        """(B, T, E): predictions along the full-step run, of every step s from feature(features, s), where `features`
        are the branch's (T, ...)."""
        device = self.latents[0].device

        def given(branch: str, step: int) -> torch.Tensor:
            return feature(self.features[branch], step).to(device)

        method = _Given(Schedule([0], self.T), "stack", Reuse(), feature=given)
        forced = _Forced(len(self.prompts), self.latents)
        with watching(self.pipe.scheduler, forced):
            batch = sample(self.pipe, method, self.prompts, self.seeds, decode=False, **self.call)
        self.count(batch.report, [len(self.prompts)])
        return np.stack(forced.predictions, 1)

    def lengths(self) -> np.ndarray:
        """(T, T), mean over guidance branches."""
        centred = (feature.float() - feature.float().mean(-1, keepdim=True) for feature in self.features.values())
        return np.mean([gram(feature) for feature in centred], 0)


def measure_output_layers(
    pipe: "DiffusionPipeline",
    recorded: Recorded,
    batches: Sequence[tuple[Sequence[str], Sequence[int]]],
    count: Callable[[Report, list[int]], None] = lambda report, prompts: None,
    **call,
) -> OutputLayers:
    """Of the prompts that were recorded, in the same order.

    Args:
        count: told of every run what it did, and of how many prompts.
        call: further arguments of the pipeline.

    Raises SettingError where the model does not offer site=stack, and where its output layers are not what they are
    taken for: a prediction from two earlier features then differs from what the formula says by more than half
    of how far it is from the step's own.
    """
    T = recorded.steps
    delays = np.unique([0, *np.geomspace(1, T - 1, DELAYS).round().astype(int)])
    places = sorted({1, min(4, len(delays) - 1)})  # of two delays that are tried together
    weights = np.array([1.5, -0.5][: len(places)])
    decoded, empty, doubled, tried, lengths = [], [], [], [], 0.0

    def together(features: torch.Tensor, step: int) -> torch.Tensor:
        return sum(w * features[max(step - d, 0)] for w, d in zip(weights.tolist(), delays[places].tolist()))

    for prompts, seeds in batches:
        batch = _Batch(pipe, prompts, seeds, T, count, call)
        ago = [batch.decode(lambda features, s, d=d: features[max(s - d, 0)]) for d in delays[1:].tolist()]
        decoded.append(np.stack([batch.predictions, *ago], 1))
        empty.append(batch.decode(lambda features, s: torch.zeros_like(features[s])))
        doubled.append(batch.decode(lambda features, s: 2 * features[s]))
        tried.append(batch.decode(together))
        lengths = lengths + batch.lengths() * len(prompts) / len(recorded.states)
    parts = (np.concatenate(part) / recorded.sizes[:, None, None] for part in (empty, doubled, tried))
    decoded, (empty, doubled, tried) = np.concatenate(decoded) / recorded.sizes[:, None, None, None], parts
    if np.linalg.norm(doubled - decoded[:, 0]) > 0.1 * np.linalg.norm(decoded[:, 0] - empty):
        lengths = None
    steps = np.arange(delays[places[-1]], T)
    shares = normed(lengths, np.tile(weights, (len(steps), 1)), steps[:, None] - delays[places])
    expected = np.einsum("sh,phse->pse", shares, (decoded[:, places] - empty[:, None])[:, :, steps]) + empty[:, steps]
    moved, off = (np.linalg.norm(tried[:, steps] - part) for part in (decoded[:, 0, steps], expected))
    if off > MISFIT * moved:
        raise SettingError(
            f"the output layers of {type(denoiser(pipe)).__name__} are no norm and linear after it (off by "
            f"{off / moved:.0%}): site=stack cannot be simulated"
        )
    return _in_coordinates(recorded, delays, decoded, empty, lengths)


def normed(lengths: np.ndarray | None, weights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """u of the weights w (N, h) of the features of steps (N, h)."""
    if lengths is None:
        return weights
    among = lengths[keys[:, :, None], keys[:, None, :]]
    length = np.sqrt(np.maximum(np.einsum("nh,nhk,nk->n", weights, among, weights), 1e-12))
    return weights * np.sqrt(np.einsum("nhh->nh", among)) / length[:, None]


def _in_coordinates(recorded: Recorded, delays, decoded, empty, lengths) -> OutputLayers:
    """Of what was measured, (P, D, T, E) and (P, T, E). What of it does not lie along the recorded directions lies
    along others, of which the `EXTRA` longest are taken."""
    rows = np.concatenate([recorded.predictions, recorded.states], 1) / recorded.sizes[:, None, None]
    known = recorded.directions.T @ rows  # (P, r, E)
    values = np.concatenate([decoded.reshape(len(rows), -1, rows.shape[2]), empty], 1)
    along = (values @ known.swapaxes(1, 2)).mean(0)
    rest = values - along @ known
    squares, vectors = np.linalg.eigh((rest @ rest.swapaxes(1, 2)).mean(0))
    held = np.flatnonzero(squares.clip(0).cumsum() > 1e-10 * squares.sum())[-EXTRA:]
    more = (vectors[:, held] / np.sqrt(squares[held])).T @ rest
    axes = np.concatenate([more, known], 1)
    places = np.concatenate([vectors[:, held] * np.sqrt(squares[held]), along], 1)
    *each, last = np.split(places, len(delays) + 1)
    return OutputLayers(delays, np.stack(each), last, lengths, axes @ axes.swapaxes(1, 2))
