"""No cache, but a higher-order solver on a grid of K steps: a plain alternative that papers on caching leave out.

DPM-Solver++ (Lu et al., arXiv 2211.01095) and UniPC (Zhao et al., arXiv 2302.04867), as diffusers has them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from baselines.fewer_steps import fewer_steps
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.session import Session

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

    from dpcache.session import Session


@dataclass(frozen=True, eq=False)
class OtherScheduler(Method, ABC):
    """Replaces the pipeline's scheduler by another one while the method is enabled."""

    @abstractmethod
    def scheduler_for(self, own: "SchedulerMixin") -> "SchedulerMixin":
        """The scheduler that replaces the pipeline's `own`, which is not changed."""

    def session(self, pipe: "DiffusionPipeline", observe: Callable | None = None) -> "Session":
        own = getattr(pipe, "scheduler", None)
        if own is None:
            raise SettingError(f"{type(self).__name__} needs a pipeline, whose scheduler it replaces")
        pipe.scheduler = twin = self.scheduler_for(own)
        try:
            session = _OtherSchedulersSession(pipe, self, observe)
        except Exception:
            pipe.scheduler = own
            raise

        def restore() -> None:
            if pipe.scheduler is twin:  # else it was replaced meanwhile
                pipe.scheduler = own

        session.on_detach.append(restore)
        return session


class _OtherSchedulersSession(Session):
    """The session of a method that has replaced the pipeline's scheduler by its own."""

    def begin(self) -> None:
        if self.pipe().scheduler is not self.scheduler:
            raise SettingError(
                f"pipe.scheduler has been replaced while {type(self.method).__name__} is enabled, which brings a "
                "scheduler of its own: call dpcache.disable(pipe), and enable the method again"
            )
        super().begin()


@dataclass(frozen=True, eq=False)
class Solver(OtherScheduler):
    """A multistep scheduler of diffusers.

    For flow matching the own scheduler stays, but its steps are made by the solver. The noise levels are those that the
    pipeline gives. If the pipeline leaves them to the scheduler, they are evenly spaced from 1 to 0 before the shift,
    as in diffusers' versions of these solvers: the own scheduler's last level is next to 0, and a step of second order
    that ends there overshoots.

    For other schedulers the solver makes a grid of K steps from the settings of the own scheduler, with the own
    scheduler's noise at each time.

    Args:
        scheduler: name of its class.
        order: of the solver.
    """

    scheduler: str = field(kw_only=True)
    order: int = field(kw_only=True)

    def scheduler_for(self, own: "SchedulerMixin") -> "SchedulerMixin":
        """Raises SettingError for schedulers that are neither of flow matching nor compatible with `self.scheduler`,
        and for schedulers that clip the predicted sample."""
        kind, name = getattr(diffusers, self.scheduler), type(own).__name__
        if of_flow_matching(own):
            twin = variant(own, _MultistepSteps)
            flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            twin.make_solver = partial(kind, solver_order=self.order, **flow)
            return twin
        # CogVideoX's have the setting and do not look at it.
        clipped, fits = own.config.get("clip_sample") and not name.startswith("CogVideoX"), kind in own.compatibles
        if clipped or not fits:
            why = ": clip_sample=True" if fits else ""
            raise SettingError(f"{kind.__name__} cannot take the place of this model's {name}{why}")
        twin = kind.from_config(own.config, solver_order=self.order)
        left = own.alphas_cumprod  # of the image in the latents; a solver divides by it
        twin.alphas_cumprod = left.where(left > 0, left.where(left > 0, 1.0).min() / 4)
        return twin


def of_flow_matching(scheduler: "SchedulerMixin") -> bool:
    """Whether the scheduler's `sigmas` are the noise levels of flow matching from 1 to 0 (Mochi's are the share of the
    image), and its predictions the slope of the latents. Cosmos 2 sets other sigmas, up to 80, in a scheduler of flow
    matching."""
    config, multistep = scheduler.config, (diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler)
    if isinstance(scheduler, multistep):
        return config.prediction_type == "flow_prediction"
    return isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler) and (config.get("sigma_max") or 1) <= 1


def variant(scheduler: "SchedulerMixin", behaviour: type) -> "SchedulerMixin":
    """A copy of `scheduler`, of a class that derives from `behaviour` and from the scheduler's own class. Listeners to
    the steps of `scheduler` do not hear the copy's."""
    own = type(scheduler)

    @wraps(own.set_timesteps)  # pipelines look for arguments such as `mu`
    def set_timesteps(self, *args, **kwargs):
        return super(kind, self).set_timesteps(*args, **kwargs)

    kind = type(own.__name__, (behaviour, own), {"set_timesteps": set_timesteps})
    twin = kind.__new__(kind)
    vars(twin).update({name: value for name, value in vars(scheduler).items() if name not in ("step", "set_timesteps")})
    return twin


class OtherSteps(ABC):
    """Base of classes that make a scheduler step in another way, see `variant`."""

    @abstractmethod
    def advance(self, prediction: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents after this step."""

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """For Bria's pipeline, which calls it if it does not know the class."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:
        if per_token_timesteps is not None:
            raise SettingError("this call gives tokens times of their own, but the method steps all of them together")
        counts = of_flow_matching(self)  # its place on the grid, from which pipelines tell how noisy a given image is
        if counts and self.step_index is None:
            self._init_step_index(timestep)
        latents = self.advance(model_output, timestep, sample)
        if counts:
            self._step_index += 1
        return SchedulerOutput(latents) if return_dict else (latents,)


class SolversGrid(OtherSteps):
    """A scheduler of flow matching whose noise levels are those for `Solver`."""

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None, **given
    ) -> None:
        left_to_it = given.get("sigmas") is None and given.get("timesteps") is None
        if left_to_it and isinstance(self, diffusers.FlowMatchEulerDiscreteScheduler):
            given["sigmas"] = np.linspace(1, 1 / self.config.num_train_timesteps, num_inference_steps + 1)[:-1]
        super().set_timesteps(num_inference_steps, device, **given)


class _MultistepSteps(SolversGrid):
    """With the steps of another solver, which `make_solver` makes anew for each run."""

    def _init_step_index(self, timestep):
        super()._init_step_index(timestep)
        self.solver = self.make_solver()
        self.solver.set_timesteps(len(self.timesteps))
        levels = 1 - self.sigmas if self.config.get("invert_sigmas") else self.sigmas
        self.solver.sigmas = levels.cpu().clamp(max=1 - 1e-6)  # it divides by what is left of the image
        self.solver.set_begin_index(self.step_index)

    def advance(self, prediction: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        towards_noise = -prediction if self.config.get("invert_sigmas") else prediction
        return self.solver.step(towards_noise, timestep, latents, return_dict=False)[0]


def solver(budget: int, num_inference_steps: int, scheduler: str, order: int = 2) -> Method:
    """One model call a step, K steps.

    Args:
        scheduler: a multistep scheduler of diffusers: DPMSolverMultistepScheduler or UniPCMultistepScheduler.
        order: 1 to 3.
    """
    if scheduler not in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        raise SettingError(f"scheduler={scheduler} is not one of DPMSolverMultistepScheduler, UniPCMultistepScheduler")
    plain = fewer_steps(budget, num_inference_steps)
    return Solver(plain.schedule, plain.site, plain.predictor, scheduler=scheduler, order=order)
