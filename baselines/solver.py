"""No cache, and a higher-order solver on a grid of only K steps: the plain alternative that caching papers leave out.

DPM-Solver++ (Lu et al., arXiv 2211.01095) and UniPC (Zhao et al., arXiv 2302.04867), as diffusers has them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import diffusers

from baselines.fewer_steps import fewer_steps
from dpcache.errors import SettingError
from dpcache.method import Method


@dataclass(frozen=True, eq=False)
class OtherScheduler(Method, ABC):
    """The pipeline's scheduler gives way to another one for as long as the method is enabled."""

    @abstractmethod
    def scheduler_for(self, own):
        """The one in place of the pipeline's own, which is left as it is."""

    def session(self, pipe, observe=None):
        own = getattr(pipe, "scheduler", None)
        if own is None:
            raise SettingError(f"{type(self).__name__} needs a pipeline, whose scheduler it replaces")
        pipe.scheduler = self.scheduler_for(own)
        try:
            session = super().session(pipe, observe)
        except Exception:
            pipe.scheduler = own
            raise
        session.on_detach.append(lambda: setattr(pipe, "scheduler", own))
        return session


@dataclass(frozen=True, eq=False)
class Solver(OtherScheduler):
    """A scheduler of diffusers.

    Args:
        scheduler: name of its class.
        settings: what it is configured with beyond the pipeline's own scheduler.
    """

    scheduler: str = field(kw_only=True)
    settings: Mapping[str, object] = field(kw_only=True)

    def scheduler_for(self, own):
        """Raises SettingError for schedulers that are neither of flow matching nor such as `self.scheduler`."""
        kind, settings = getattr(diffusers, self.scheduler), dict(self.settings)
        if type(own).__name__.startswith("FlowMatch"):
            kind = type(kind.__name__, (_ForFlowMatch, kind), {})
            settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            settings |= {"flow_shift": own.config.shift, "use_dynamic_shifting": own.config.use_dynamic_shifting}
        elif kind not in own.compatibles:
            raise SettingError(f"{kind.__name__} cannot take the place of this model's {type(own).__name__}")
        return kind.from_config(own.config, **settings)


class _ForFlowMatch:
    """Stands before the class of a scheduler that takes the place of one of flow matching."""

    def scale_noise(self, sample, timestep, noise):
        """What pipelines that start from an image, or keep a part of one, ask schedulers of flow matching for:
        (1 - sigma) sample + sigma noise, where sigma is the noise level of this time."""
        return self.add_noise(sample, noise, timestep)


def solver(budget: int, num_inference_steps: int, scheduler: str, order: int = 2) -> Method:
    """One model call a step, K steps.

    Args:
        scheduler: a multistep scheduler of diffusers: DPMSolverMultistepScheduler or UniPCMultistepScheduler.
        order: 1 to 3.
    """
    if scheduler not in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        raise SettingError(f"scheduler={scheduler} is not one of DPMSolverMultistepScheduler, UniPCMultistepScheduler")
    plain = fewer_steps(budget, num_inference_steps)
    settings = {"solver_order": order}
    return Solver(plain.schedule, plain.site, plain.predictor, scheduler=scheduler, settings=settings)
