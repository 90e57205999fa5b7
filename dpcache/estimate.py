"""What a method will keep in memory, known before there are any weights: a few dry steps on the device "meta"."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from dpcache.method import Method, cached
from dpcache.models.architectures import Architecture
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, OnlineSchedule
from dpcache.steps import Loop


@dataclass(frozen=True)
class _Computing(OnlineSchedule):
    """Keeps what an online schedule keeps, and computes every step."""

    schedule: OnlineSchedule

    def start(self):
        return self.schedule.start()

    def learn(self, context, name, feature):
        self.schedule.learn(context, name, feature)

    def decide(self, context, block, args, kwargs):
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

    Args:
        transformer: `architecture.build()`, on the device "meta".
        call: the pipeline's arguments.

    Raises ValueError for a model that does not offer the site, or whose arguments are not known.
    """
    steps = method.predictor.history
    online = isinstance(method.schedule, OnlineSchedule)
    schedule = method.schedule
    schedule = _Computing(schedule.num_inference_steps, schedule) if online else EvenlySpaced(steps, steps)
    dry = Method(schedule, method.site, _Keeping(steps))
    branches = architecture.branches(call)
    inputs = [architecture.inputs(call, batch_size, dtype=transformer.dtype, branch=branch) for branch in branches]
    loop = Loop(transformer, dry.num_inference_steps)
    with cached(loop, dry) as session:
        for _ in range(steps):
            for arguments in inputs:  # unnamed calls of a step have a history each
                transformer(**arguments)
            loop.step()
        return session.report().history_bytes
