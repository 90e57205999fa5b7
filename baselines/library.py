"""The caches of other libraries: switched on and off, and observed, as a `dpcache.method.Runnable`."""

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from baselines.full import full
from baselines.search import Search
from dpcache._diffusers import Hook, reset_caches, without_offload
from dpcache.denoisers import denoiser
from dpcache.errors import SettingError
from dpcache.flops import LayerFlops, matrix_layers
from dpcache.schedules import check_budget
from dpcache.session import Branch, CallHook, Part, Session
from dpcache.sites import transformer_blocks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dpcache.calibration import Calibration


@dataclass(frozen=True, eq=False)
class LibraryCache(ABC):
    """A library's cache. It decides by itself which steps are computed, so this is observed at the model's modules.

    `start` switches it on, and `stop` off. Afterwards everything that it has left on the transformer is removed.

    Args:
        num_inference_steps: T.
        decided, made_for: see `dpcache.method.Runnable`.

    Attributes:
        package: the library's package; empty for diffusers.
        partial: whether it also skips parts of steps: the budget is then spent in full-step equivalents, by FLOPs.
    """

    num_inference_steps: int
    decided: Mapping[str, object] = field(default_factory=dict, kw_only=True)
    made_for: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    package: ClassVar[str] = ""
    partial: ClassVar[bool] = False
    statistics: ClassVar[None] = None
    example: ClassVar[None] = None

    def build(self, pipe: "DiffusionPipeline | None" = None, calibration: "Calibration | None" = None) -> Self:
        """Itself: it is its own recipe."""
        return self

    def keeps_branches_apart(self, transformer: torch.nn.Module) -> bool:
        """Whether it may be enabled where the pipeline runs guidance branches one after the other."""
        return True

    @abstractmethod
    def start(self, pipe: "DiffusionPipeline", transformer: torch.nn.Module) -> None:
        """Switch the library's cache on."""

    @abstractmethod
    def stop(self, pipe: "DiffusionPipeline", transformer: torch.nn.Module) -> None:
        """Switch it off."""

    def session(self, pipe: "DiffusionPipeline", observe: Callable | None = None) -> "LibrarySession":
        if isinstance(pipe, torch.nn.Module):
            raise SettingError(f"{type(self).__name__} needs a pipeline, whose scheduler tells the steps")
        transformer, shared = denoiser(pipe), dict(vars(type(pipe)))
        with without_offload(transformer):
            before = {
                module: (_names(module), list(module._modules), vars(module).get("forward"))
                for module in transformer.modules()
            }
            try:
                self.start(pipe, transformer)
            except Exception:
                restore(before)
                restore_class(type(pipe), shared)
                raise

        def end():
            with without_offload(transformer):
                self.stop(pipe, transformer)
                restore(before)

        try:
            session = LibrarySession(pipe, self)
        except Exception:
            end()
            raise
        session.apart = self.keeps_branches_apart(transformer)
        session.on_detach.append(end)
        return session


def _names(module: torch.nn.Module) -> set[str]:
    return vars(module).keys() | module._modules.keys()


def restore(before: dict[torch.nn.Module, tuple]) -> None:
    """Remove every attribute and submodule that a library has left on the model's modules, and restore the order of
    submodules, which cache-dit changes. `before`: for every module its names, the order of its submodules and its own
    `forward`."""
    for module, (names, order, forward) in before.items():
        for name in _names(module) - names:
            delattr(module, name)
        for name in order:
            module._modules[name] = module._modules.pop(name)
        if forward is not None:
            module.forward = forward


def restore_class(kind: type, before: dict) -> None:
    """Undo a library's changes to the class of a pipeline, as cache-dit makes them; otherwise they would apply to all
    pipelines of this class, even those loaded later. `before`: the attributes of the class."""
    for name in vars(kind).keys() - before.keys():
        delattr(kind, name)
    for name, value in before.items():
        if vars(kind).get(name) is not value:
            setattr(kind, name, value)


@dataclass(frozen=True, eq=False)
class DiffusersCache(LibraryCache):
    """A cache of diffusers: `config` makes its configuration."""

    @abstractmethod
    def config(self, pipe: "DiffusionPipeline") -> object:
        """The configuration, of diffusers' class for the cache."""

    def start(self, pipe: "DiffusionPipeline", transformer: torch.nn.Module) -> None:
        if not hasattr(transformer, "enable_cache"):
            raise SettingError(f"diffusers offers none of its caches for {type(transformer).__name__}")
        config = self.config(pipe)
        try:
            transformer.enable_cache(config)
        except ValueError as error:  # of blocks that it does not know
            raise SettingError(
                f"diffusers offers none of its caches for {type(transformer).__name__}: {error}"
            ) from error

    def stop(self, pipe: "DiffusionPipeline", transformer: torch.nn.Module) -> None:
        transformer.disable_cache()


@dataclass(frozen=True, eq=False)
class AttentionReuse(DiffusersCache):
    """A cache that skips only attention, in all but every N-th step and within a range of timesteps.

    Args:
        skip_range: N.
        timesteps: the range, of 0 to 1000.
    """

    skip_range: int
    timesteps: tuple[int, int]
    partial = True

    def keeps_branches_apart(self, transformer: torch.nn.Module) -> bool:
        return False


def every_nth(
    make: Callable[[int], AttentionReuse], budget: int, num_inference_steps: int, skip_range: int | None
) -> AttentionReuse | Search:
    """`make(skip_range)`, or the recipe that finds the range that spends the budget. If even a model without attention
    spends more than the budget, the range is 2, the libraries' default."""
    check_budget(budget, num_inference_steps)
    if skip_range is not None:
        return make(skip_range)
    return Search(make, budget, num_inference_steps, first=2, setting="skip_range", whole=True, alone=True)


class LibrarySession(Session):
    """Observes which steps a library's cache computes (those in which the last block's attention runs), and how much of
    them."""

    def __init__(self, pipe: "DiffusionPipeline", library: LibraryCache):
        self.library, transformer = library, denoiser(pipe)
        inside = {
            module
            for name, attention in transformer_blocks(transformer)[-1].named_modules()
            if "attn" in name
            for module in attention.modules()
        }
        self.attention = next((layer for layer in matrix_layers(transformer) if layer in inside), None)
        if self.attention is None:
            raise SettingError(f"the last block of {type(transformer).__name__} has no attention to watch")
        super().__init__(pipe, full(library.num_inference_steps))
        self.partial, self.beginning = library.partial, False

    def check_other_caches(self, part: Part) -> None:
        """The library's own is meant to be there."""

    def ended(self) -> None:
        if not self.beginning:
            super().ended()

    def watching(self, part: Part) -> LayerFlops:
        return LayerFlops(part.module, self.library.partial)

    def hooks(self, part: Part) -> list[tuple[torch.nn.Module, Hook]]:
        return [(part.module, CallHook(self, part))]

    def begin(self) -> None:
        super().begin()
        (part,), scheduler = self.parts, self.pipe().scheduler
        self.beginning = True
        reset_caches(part.module)  # what a generation that broke off has left
        self.beginning = False
        skipped = len(scheduler.timesteps) - self.schedule.num_inference_steps  # of a run that starts from an image
        sigmas = getattr(scheduler, "sigmas", None)
        self.times = scheduler.timesteps.tolist()[skipped:]  # once: on a GPU every look waits for it
        self.sigmas = None if sigmas is None else sigmas.tolist()[skipped:]

    def forwarded(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """What `forward` returns. Raises SettingError where the library's own code does not run on this model."""
        try:
            return forward(*args, **kwargs)
        except (TypeError, AssertionError) as error:
            place, package = traceback.extract_tb(error.__traceback__)[-1].filename, self.library.package
            if not package or package not in Path(place).parts:
                raise
            raise SettingError(f"{package} does not run on {self.parts[0]}: {error}") from error

    def run(self, branch: Branch, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Tells the library the sampler's position, runs the call, and observes what is computed."""
        if len(self.branches) > 1 and not self.apart:
            raise SettingError(
                f"{type(self.library).__name__} has one cache for all guidance branches, but this pipeline runs them "
                "one after the other"
            )
        (part,), step, steps = self.parts, branch.step, self.schedule.num_inference_steps
        self.timestep = self.times[step]
        position = {"step_index": step, "num_inference_steps": steps, "timestep": self.timestep}
        if self.sigmas is not None:
            position["sigma"] = self.sigmas[step]
        named = getattr(part.module, "cache_context", None)
        with named(branch.name, **position) if named else nullcontext(), part.watch.call(branch.signature):
            output = self.forwarded(forward, args, kwargs)
        if all(layer is not self.attention for layer, _ in part.watch.ran):
            branch.computed.pop()
            branch.skip = True
        return output
