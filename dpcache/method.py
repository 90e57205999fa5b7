"""Method = Schedule x Site x Predictor, and how one is put on a pipeline."""

import functools
import weakref
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from diffusers.utils.torch_utils import unwrap_module

from dpcache.cache import Report, StepCache
from dpcache.predictors import Predictor, Taylor
from dpcache.schedules import Planned, Schedule
from dpcache.sites import SITES


class Method:
    """A caching method, composed of its three parts.

    The board knows methods by `num_inference_steps`, `needs_calibration`, `calibration_options`, `prepare`, `settled`,
    `attach`, `detach` and `report` alone, so a library's own cache can stand beside them by offering these.

    Args:
        schedule: which steps are computed.
        site: what is kept of them, one of `sites.SITES`.
        predictor: how a skipped step is filled in.

    `observe`, if it is set, is called as `observe(branch, step, name, feature)` for every feature kept, and with
    site=output for the model's input ("input") at every step.
    """

    def __init__(self, schedule: Schedule, site: str, predictor: Predictor):
        if site not in SITES:
            raise ValueError(f"site={site} is not one of {', '.join(SITES)}")
        if predictor.sees_input and not site.startswith("output"):
            raise ValueError(f"site={site}: a predictor that sees the model's input takes site=output")
        self.schedule, self.site, self.observe = schedule, site, None
        self.set_predictor(predictor)
        self.blocks: Sequence[int] | None = None  # with site=blocks, indices of those that are skipped; None: all
        self.settled: dict = {}  # what `prepare` decided, for the record
        self.costs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of layers, see `dpcache.flops`
        self._cache: StepCache | None = None

    def set_predictor(self, predictor: Predictor) -> None:
        """Also remembers its weights: the same keys and steps come back in every generation."""
        self.predictor, self.weights = predictor, functools.lru_cache(maxsize=None)(predictor.weights)

    @property
    def num_inference_steps(self) -> int:
        """Steps of the scheduler's grid that the sampler has to ask for."""
        return self.schedule.num_inference_steps

    @property
    def history(self) -> int:
        """How many computed features are kept of everything that the site keeps."""
        return self.predictor.history

    @property
    def needs_calibration(self) -> bool:
        return self.schedule.needs_calibration

    @property
    def partial(self) -> bool:
        """Whether parts of steps are computed as well, so that the budget counts full-step equivalents."""
        return self.schedule.partial or self.site == "blocks"

    @property
    def calibration_options(self) -> dict:
        """Arguments of `calibrate` that this method's calibration has to be made with."""
        return self.schedule.calibration_options

    def prepare(self, pipe, calibration=None) -> None:
        """Settle the schedule. `calibration`: a `Calibration`, where `needs_calibration`."""
        self.schedule.prepare(calibration)

    def attach(self, pipe) -> None:
        """Start caching. Raises ValueError where the model does not offer the site."""
        if not self.schedule.ready:
            raise ValueError("the schedule is not settled yet: call method.prepare(pipe, calibration) first")
        self._cache = StepCache(denoiser(pipe), self, pipe)

    def detach(self, pipe) -> None:
        """Stop caching and leave the transformer as it was before `attach`."""
        self._cache.detach()

    def report(self) -> Report:
        """What has been computed and predicted since `attach`."""
        return self._cache.report() if self._cache is not None else Report()


def dpcache(
    budget: int,
    num_inference_steps: int,
    warmup: int = 3,
    order: int = 2,
    solver: str = "paper",
    max_jump: int | None = None,
    cost: str = "l1",
    path_aware: bool = True,
    cumulative: bool = True,
    steps: list[int] | None = None,
) -> Method:
    """DPCache (Denoising as Path Planning, arXiv 2602.22654): planned steps, the last block's output, Taylor.

    Args:
        solver, cost, path_aware, cumulative: see `dpcache.schedules.Planned`.
        max_jump: largest distance between computed steps; the authors' code uses `int(0.3 * num_inference_steps)`.
        steps: a schedule to use as it is, without calibration (for one, a published schedule).
    """
    predictor = Taylor(order, since=max(warmup - 2, 0))
    if steps is None:
        schedule = Planned(
            predictor, budget, num_inference_steps, warmup, solver, max_jump, cost, path_aware, cumulative
        )
    elif len(steps) != budget:
        raise ValueError(f"steps has {len(steps)} entries: set budget={len(steps)}, not {budget}")
    elif list(steps[:warmup]) != list(range(warmup)):
        raise ValueError(f"steps={list(steps)} does not begin with the warmup={warmup} steps 0..{warmup - 1}")
    else:
        schedule = Schedule(steps, num_inference_steps)
    return Method(schedule, "stack", predictor)


_attached: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def denoiser(pipe) -> torch.nn.Module:
    """The transformer (or U-Net) of a pipeline, or itself. Raises ValueError if there is none, or more than one."""
    if isinstance(pipe, torch.nn.Module):
        return unwrap_module(pipe)
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            f"this {type(pipe).__name__} has two transformers, for two ranges of steps: cache pipe.transformer and "
            "pipe.transformer_2 each with a method of its own, made for the number of steps in its range"
        )
    for name in ("transformer", "unet"):
        if getattr(pipe, name, None) is not None:
            return unwrap_module(getattr(pipe, name))
    raise ValueError(f"{type(pipe).__name__} has neither a transformer nor a unet")


def enable(pipe, method) -> None:
    """Cache with `method` from now on. `pipe`: a diffusers pipeline (best: new generations are then seen by
    themselves whatever happens), or its transformer alone. Raises ValueError if a method is already enabled."""
    transformer = denoiser(pipe)
    if transformer in _attached:
        raise ValueError("a method is already enabled on this pipeline: call dpcache.disable(pipe) first")
    method.attach(pipe)
    _attached[transformer] = method


def disable(pipe) -> None:
    """Undo `enable`: the transformer is as it was before. Raises ValueError if nothing is enabled."""
    method = _attached.pop(denoiser(pipe), None)
    if method is None:
        raise ValueError("no method is enabled on this pipeline")
    method.detach(pipe)


@contextmanager
def cached(pipe, method):
    """`enable` within a `with` block, `disable` at its end."""
    enable(pipe, method)
    try:
        yield method
    finally:
        disable(pipe)


def report(pipe) -> Report:
    """The report of the method that is enabled on `pipe`. Raises ValueError if none is."""
    method = _attached.get(denoiser(pipe))
    if method is None:
        raise ValueError("no method is enabled on this pipeline")
    return method.report()
