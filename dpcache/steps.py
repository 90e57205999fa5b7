"""Tells which call of the model is which step: for a pipeline by its scheduler, for a model alone by its timestep
argument.

A step lasts from one call of the scheduler's `step` to the next. Its index counts the steps that this generation really
runs. These are fewer than the scheduler's timesteps if a pipeline starts from an image (`strength`).
"""

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from dpcache._diffusers import StepListener, interrupted, watch_steps
from dpcache.arguments import argument, argument_names
from dpcache.errors import SettingError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

log = logging.getLogger(__name__)


class Steps(Protocol):
    """Finds the step of every call."""

    def locate(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[bool, int]:
        """Whether this call of `module` begins a new generation, and its step. Raises SettingError where the calls do
        not fit the method's number of steps."""

    def repeated(self, name: str) -> None:
        """A guidance branch of this name is called again within the step. Raises SettingError where that cannot be
        another branch."""

    def ended(self) -> None:
        """The pipeline's call is over: the next one begins a new generation. Raises SettingError where steps are
        missing."""

    def detach(self) -> None:
        """Leave the scheduler as it was."""


class SchedulerSteps(StepListener):
    """Steps of a pipeline, told by its scheduler. `pipe` needs `scheduler`, with `timesteps` and `step`.

    Args:
        num_inference_steps: of the method.
        on_step_end: called at the end of every step.
        check_model: called at every step of the scheduler, also if the model was not.
    """

    def __init__(
        self,
        pipe: "DiffusionPipeline | Loop",
        num_inference_steps: int,
        on_step_end: Callable[[], None],
        check_model: Callable[[], None],
    ):
        self.pipe, self.num_inference_steps = weakref.ref(pipe), num_inference_steps
        self.on_step_end, self.check_model = on_step_end, check_model
        self.scheduler = pipe.scheduler
        self.unwatch = watch_steps(self.scheduler, self, copies=True)
        self.timesteps, self.step, self.called = None, 0, False

    def locate(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[bool, int]:
        pipe = self.pipe()
        if pipe is None:
            raise SettingError("the pipeline that the method was enabled on is gone: enable it on the one that is run")
        if pipe.scheduler is not self.scheduler:
            self.detach()
            self.scheduler = pipe.scheduler
            self.unwatch = watch_steps(self.scheduler, self, copies=True)
            self.timesteps = None
        began = self.timesteps is not self.scheduler.timesteps  # every pipeline call makes a new grid
        if began:
            self._check(pipe)
            self.timesteps, self.step = self.scheduler.timesteps, 0
        if self.step >= self.num_inference_steps:
            raise SettingError(
                f"this {type(pipe).__name__} runs more steps than the num_inference_steps={self.num_inference_steps} "
                "that the method was made for"
            )
        self.called = True
        return began, self.step

    def repeated(self, name: str) -> None:
        """Nothing to check: the scheduler tells where steps end."""

    def after_step(self, scheduler: "SchedulerMixin", output: "SchedulerOutput | tuple") -> None:
        self.check_model()
        if self.called:  # pipelines may step several schedulers, or copies of one, after one call of the model
            self.on_step_end()
            self.step, self.called = self.step + 1, False

    def _check(self, pipe) -> None:
        asked, made_for = getattr(self.scheduler, "num_inference_steps", None), self.num_inference_steps
        total, begin = len(self.scheduler.timesteps), getattr(self.scheduler, "begin_index", None)
        runs = (getattr(pipe, "num_timesteps", None) or total) if begin is None else total - begin
        if runs == made_for:
            return
        if runs == asked:
            raise SettingError(
                f"num_inference_steps={asked} in the pipeline call, but the method was made for "
                f"num_inference_steps={made_for}"
            )
        raise SettingError(
            f"this {type(pipe).__name__} with its {type(self.scheduler).__name__} runs {runs} steps "
            f"(num_inference_steps={asked}), but the method was made for num_inference_steps={made_for}: it counts the "
            "steps that are really run"
        )

    def ended(self) -> None:
        ran = self.step + self.called
        complete = self.timesteps is None or interrupted(self.pipe()) or ran == self.num_inference_steps
        stepped = self.step > 0
        self.timesteps, self.step, self.called = None, 0, False
        if not complete and not stepped:
            raise SettingError(
                "the model was run, but not the scheduler of the pipeline that the method was enabled on: enable the "
                "method on the pipeline that is run"
            )
        if not complete:
            raise SettingError(
                f"this {type(self.pipe()).__name__} ran {ran} steps, but the method was made for "
                f"num_inference_steps={self.num_inference_steps}: it counts the steps that are really run"
            )

    def detach(self) -> None:
        self.unwatch()


class TimestepSteps:
    """Steps of a model without a pipeline, told by its timestep argument. Another value is another step. The first
    value again, or a change in the other direction than before, begins another generation. On a GPU the host waits for
    the value at every call; with a pipeline it need not.

    No call tells that a generation is over. So a mistake at its end is reported when the next generation begins, or
    when the method is disabled. Too few steps are a warning, not an error, because a generation that was interrupted
    looks the same.

    Args:
        num_inference_steps: of the method.
        on_step_end: called at the end of every step.
    """

    NAMES = ("timestep", "timesteps", "t", "sigma")

    def __init__(self, module: torch.nn.Module, num_inference_steps: int, on_step_end: Callable[[], None]):
        self.module, self.num_inference_steps, self.on_step_end = module, num_inference_steps, on_step_end
        names = argument_names(module)
        self.name = next((name for name in self.NAMES if name in names), None)
        if self.name is None:
            raise SettingError(
                f"{type(module).__name__} has no timestep argument that tells its steps: enable the method on the "
                "pipeline"
            )
        self.place = names.index(self.name)
        self.first = self.last = None
        self.step, self.direction = 0, 0.0

    def locate(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[bool, int]:
        time = argument(self.place, self.name, args, kwargs)
        time = torch.as_tensor(time).detach().float().flatten().cpu()
        if self.last is not None and torch.equal(time, self.last):
            return False, self.step  # another branch
        began = self.last is None or torch.equal(time, self.first)
        if not began:
            move = float(time.mean() - self.last.mean())
            began = self.num_inference_steps == 1 or move * self.direction < 0
        if self.last is not None:
            self.on_step_end()
        if began:
            self._warn_of_missing_steps()
            self.first, self.step, self.direction = time, 0, 0.0
        else:
            self.step, self.direction = self.step + 1, move
        if self.step >= self.num_inference_steps:
            self.first = self.last = None
            raise SettingError(
                f"this {type(module).__name__} is called at more steps than the "
                f"num_inference_steps={self.num_inference_steps} that the method was made for"
            )
        self.last = time
        return began, self.step

    def _warn_of_missing_steps(self) -> None:
        if self.last is not None and self.step + 1 < self.num_inference_steps:
            log.warning(
                "this %s was run at %s values of %s, but the method was made for num_inference_steps=%s: the run broke "
                "off, or its steps were miscounted because two of them have the same value, which a dpcache.steps.Loop "
                "tells apart",
                *(type(self.module).__name__, self.step + 1, self.name, self.num_inference_steps),
            )

    def repeated(self, name: str) -> None:
        self.first = self.last = None
        raise SettingError(
            f"the guidance branch {name!r} is called twice at one value of {self.name}: a new run begins where the "
            "last one broke off, or two steps have the same value. Run it again, or use a dpcache.steps.Loop"
        )

    def ended(self) -> None:
        ran, began = self.step + 1, self.last is not None
        self.first = self.last = None
        self.step, self.direction = 0, 0.0
        if began and ran < self.num_inference_steps:
            raise SettingError(
                f"the pipeline called the model at {ran} steps, but the method was made for "
                f"num_inference_steps={self.num_inference_steps}"
            )

    def detach(self) -> None:
        self._warn_of_missing_steps()
        if self.last is not None and self.step + 1 == self.num_inference_steps:
            try:
                self.on_step_end()
            except SettingError as error:  # the model has returned long ago
                log.warning("%s", error)


class Loop:
    """Stands for the pipeline and its scheduler in a sampling loop of one's own: `dpcache.enable(loop, method)`, and
    `loop.step()` at the end of every step.

    Args:
        transformer: the model that is called.
        num_inference_steps: of a generation; after so many steps a new one begins.
    """

    def __init__(self, transformer: torch.nn.Module, num_inference_steps: int):
        self.transformer, self.scheduler, self.num_inference_steps = transformer, self, num_inference_steps
        self.restart()

    def restart(self) -> None:
        """The next step is the first of a generation."""
        self.timesteps, self.done = range(self.num_inference_steps), 0

    def step(self) -> None:
        """The end of a step: call it after the sampler has made its update."""
        self.done += 1
        if self.done == self.num_inference_steps:
            self.restart()
