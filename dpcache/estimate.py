"""The memory that a method's cache will take, before any weights are loaded: from a step on the device "meta"."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dpcache.method import Method, cached
from dpcache.models.architectures import Architecture
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, OnlineSchedule
from dpcache.steps import Loop

if TYPE_CHECKING:
    from dpcache.session import Branch


@dataclass(frozen=True)
class _Computing(OnlineSchedule):
    """Keeps what an online schedule keeps, and computes every step."""

    schedule: OnlineSchedule

    def start(self) -> object:
        return self.schedule.start()

    def learn(self, context: "Branch", name: str | int, feature: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        self.schedule.learn(context, name, feature)

    def decide(self, context: "Branch", block: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
        with suppress(RuntimeError):  # from the second step on it may want numbers, of which there are none
            self.schedule.decide(context, block, args, kwargs)
        return True


@dataclass(frozen=True)
class _Keeping(Reuse):
    """Keeps as many features as it is told to."""

    history: int


@torch.no_grad()
def history_bytes(
    architecture: Architecture, transformer: torch.nn.Module, method: Method, call: Mapping, batch_size: int = 1
) -> int:
    """Bytes that `method` keeps on the device while sampling, all guidance branches together.

    For a fixed schedule one computed step is enough: it shows what every computed step keeps. The state of an online
    schedule may grow until its history is full, so as many steps are run as the history holds.

    Args:
        transformer: `architecture.build()`, on the device "meta".
        call: the pipeline's arguments.

    Raises SettingError for a model that does not offer the site, or whose arguments are not known.
    """
    history, schedule = method.predictor.history, method.schedule
    online = isinstance(schedule, OnlineSchedule)
    steps = history if online else 1
    schedule = _Computing(schedule.num_inference_steps, schedule) if online else EvenlySpaced(1, 1)
    dry = Method(schedule, method.site, _Keeping(history))
    branches = architecture.branches(call)
    inputs = [architecture.inputs(call, batch_size, dtype=transformer.dtype, branch=branch) for branch in branches]
    loop = Loop(transformer, dry.num_inference_steps)
    with cached(loop, dry) as session:
        for _ in range(steps):
            for arguments in inputs:  # unnamed calls of a step have a history each
                transformer(**arguments)
            loop.step()
        histories = [h for branch in session.branches.values() for kept in branch.histories.values() for h in kept]
        missing = sum((history - steps) * kept.buffers[kept.newest].nbytes for kept in histories)
        return session.report().history_bytes + missing
