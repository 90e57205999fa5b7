"""Method = Schedule x Site x Predictor, what makes one, and how one is put on a pipeline."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from dpcache import storage
from dpcache._diffusers import hook_on
from dpcache.circumstances import check_use
from dpcache.denoisers import denoisers
from dpcache.errors import SettingError
from dpcache.predictors import Predictor
from dpcache.schedules import OnlineSchedule, Schedule, Staggered
from dpcache.session import Report, Session
from dpcache.sites import Site, as_site

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline

    from dpcache.calibration import Calibration
    from dpcache.denoisers import Pipe
    from dpcache.statistics import Statistic


class Runnable(Protocol):
    """What can be enabled on a pipeline: a `Method`, or the cache of another library.

    Attributes:
        num_inference_steps: steps that the sampler has to be asked for.
        decided: what calibration has chosen, for `result.json`: names and values that JSON can hold.
        made_for: the model, scheduler, guidance, ... that it was calibrated with; empty: it works with any.
    """

    num_inference_steps: int
    decided: Mapping[str, object]
    made_for: Mapping[str, str]

    def session(self, pipe: "Pipe", observe: Callable | None = None) -> Session:
        """Start caching. Raises SettingError where the pipeline does not allow it."""
        ...


class Recipe(Protocol):
    """A method before its calibration: what a file of `conf/method` names, and all that the evaluation uses until the
    method is built. A `Method` is also a recipe: its `build` returns itself.

    Attributes:
        num_inference_steps: steps that the sampler has to be asked for.
        statistics: what is to be measured on the calibration prompts; empty: only the prompts are needed; None: no
            calibration is needed.
        example: a method whose cache takes as much memory as the built method's, for estimates of memory; None: not
            known.
    """

    num_inference_steps: int
    statistics: "tuple[Statistic, ...] | None"
    example: "Method | None"

    def build(self, pipe: "DiffusionPipeline", calibration: "Calibration | None") -> Runnable:
        """The method, ready to be enabled. To build it, `pipe` may be run on the calibration's prompts."""
        ...


class CalibratedRecipe(ABC):
    """Base of the recipes of methods that need a calibration."""

    @property
    def calibrated_steps(self) -> int:
        """The number of steps T that its calibration must have."""
        return self.num_inference_steps

    def build(self, pipe: "DiffusionPipeline", calibration: "Calibration") -> Runnable:
        """The method, which remembers what it was made for.

        Raises SettingError for a calibration of another number of steps, class of model or scheduler than `pipe` has,
        and as `fit` does.
        """
        calibration.check_use(pipe, self.calibrated_steps)
        return calibration.sign(self.fit(pipe, calibration))

    @abstractmethod
    def fit(self, pipe: "DiffusionPipeline", calibration: "Calibration") -> Runnable:
        """The method, with the settings that this calibration leads to. `pipe` may be run on the calibration's prompts.
        Raises SettingError for a calibration that lacks a statistic."""


@runtime_checkable
class PlansOverCosts(Protocol):
    """A recipe whose steps follow from a cost tensor alone. So its `build` does not run `pipe`, which may be None."""

    def costs(self, calibration: "Calibration") -> "np.ndarray":
        """The cost tensor: its axes have T + 1 entries, except for the first, which has T."""
        ...


@dataclass(frozen=True, eq=False)
class Method:
    """A caching method, composed of its three parts. It stores nothing about a run.

    Args:
        schedule: which steps are computed.
        site: what is kept of them: one of `dpcache.sites`, or its short name.
        predictor: how a skipped step is filled in.
        decided: what calibration has chosen, for `result.json`.
        made_for: what it was calibrated with, see `dpcache.circumstances`; empty: it was not calibrated.

    Raises SettingError if the predictor needs the model's input and the site does not provide it, or if the schedule
    has lists for parts of the model that the site does not keep separately.
    """

    schedule: Schedule | OnlineSchedule
    site: Site
    predictor: Predictor
    decided: Mapping[str, object] = field(default_factory=dict)
    made_for: Mapping[str, str] = field(default_factory=dict)
    statistics: ClassVar[None] = None

    def __post_init__(self):
        object.__setattr__(self, "site", as_site(self.site))
        if self.predictor.sees_input and not self.site.sees_input:
            raise SettingError(f"site={self.site.name}: a predictor that sees the model's input takes site=output")
        if isinstance(self.schedule, Staggered) and not self.site.apart_in_time:
            raise SettingError(f"site={self.site.name} computes all that it keeps at the same steps")

    @property
    def num_inference_steps(self) -> int:
        """T: the number of steps that the sampler has to be asked for."""
        return self.schedule.num_inference_steps

    @property
    def example(self) -> "Method":
        """Itself, see `Recipe`."""
        return self

    def build(self, pipe: "DiffusionPipeline | None" = None, calibration: "Calibration | None" = None) -> "Method":
        """Itself, see `Recipe`."""
        return self

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file, atomically. Raises SettingError for a part that is no dataclass of plain
        values."""
        storage.save({len(getattr(self.schedule, "steps", ())): self}, path)

    @classmethod
    def load(cls, path: str | Path, budget: int | None = None) -> Runnable:
        """What `save` or `stage=calibrate` has written.

        Args:
            budget: which one, of a file that holds several.

        Raises SettingError if it is no method file or does not hold that budget, FileNotFoundError if there is none.
        """
        methods = storage.load(path)
        if budget is None and len(methods) == 1:
            return next(iter(methods.values()))
        if budget not in methods:
            raise SettingError(f"{path} holds methods for budget={', '.join(map(str, methods))}, not {budget}")
        return methods[budget]

    def session(self, pipe: "Pipe", observe: Callable | None = None) -> Session:
        """Start caching on a pipeline, or on its transformer alone. Raises SettingError where the model does not offer
        the site. `observe`: see `Session`."""
        return Session(pipe, self, observe)


_sessions: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # pipeline, or model alone -> its session


def session_of(pipe: "Pipe") -> Session | None:
    """The session that is enabled on a pipeline, or on another pipeline with the same transformer; None: there is
    none."""
    if pipe in _sessions:
        return _sessions[pipe]
    hooks = (hook_on(module) for module in denoisers(pipe).values())
    return next((hook.session for hook in hooks if hook is not None), None)


def enable(pipe: "Pipe", method: Runnable, observe: Callable | None = None) -> None:
    """Cache with `method` from now on.

    Args:
        pipe: a diffusers pipeline: its scheduler tells the steps; or a transformer alone: its timestep argument tells
            them.
        method: a `Method`, or another `Runnable`. Build a recipe before.
        observe: see `dpcache.session.Session`.

    Raises SettingError if a method is already enabled, or where the model does not offer the method's site.
    """
    if not hasattr(method, "session"):
        raise SettingError(
            f"{type(method).__name__} is not built yet: call its build(pipe, calibration), and enable what that returns"
        )
    check_use(pipe, method.made_for)
    if session_of(pipe) is not None:
        raise SettingError("a method is already enabled on this pipeline: call dpcache.disable(pipe) first")
    _sessions[pipe] = method.session(pipe, observe)


def disable(pipe: "Pipe") -> Report:
    """Undo `enable`: the transformer is as it was before. Returns what the method did.

    Raises SettingError if nothing is enabled.
    """
    session = _known(pipe)
    for key in [key for key, value in _sessions.items() if value is session]:
        del _sessions[key]
    session.detach()
    return session.report()


@contextmanager
def cached(pipe: "Pipe", method: Runnable, observe: Callable | None = None) -> Iterator[Session]:
    """Calls `enable` at the start of a `with` block and `disable` at its end. Yields the session, whose `report()`
    stays valid."""
    enable(pipe, method, observe)
    session = session_of(pipe)
    try:
        yield session
    finally:
        disable(pipe)


def report(pipe: "Pipe") -> Report:
    """What the method that is enabled on `pipe` has done so far. Raises SettingError if none is."""
    return _known(pipe).report()


def _known(pipe) -> Session:
    session = session_of(pipe)
    if session is None:
        raise SettingError("no method is enabled on this pipeline")
    return session
