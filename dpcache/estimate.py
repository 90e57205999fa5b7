"""What a method will keep in memory, known before there are any weights: a few dry steps on the device "meta"."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from dpcache.method import Method, cached, report
from dpcache.models.architectures import Architecture
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced, OnlineSchedule
from dpcache.sites import modulated_input


class _Probing(OnlineSchedule):
    """Keeps what an online schedule's probe looks at, and computes every step."""

    def start(self):
        return {"previous": None}

    def decide(self, state, step, block, args, kwargs):
        state["previous"] = modulated_input(block, args, kwargs)
        return True


@dataclass(frozen=True)
class _Keeping(Reuse):
    """Keeps as many features as it is told to."""

    history: int


@torch.no_grad()
def history_bytes(
    architecture: Architecture, transformer: torch.nn.Module, method: Method, call: Mapping, batch_size: int = 1
) -> int:
    """Bytes that `method`, prepared or not, keeps on the device while sampling, all guidance branches together.

    Args:
        transformer: `architecture.build()`, on the device "meta".
        call: the pipeline's arguments.

    Raises ValueError for a model that does not offer the site, or whose arguments are not known.
    """
    steps = method.history
    schedule = _Probing(steps) if isinstance(method.schedule, OnlineSchedule) else EvenlySpaced(steps, steps)
    inputs = architecture.inputs(call, batch_size, dtype=transformer.dtype)
    with cached(transformer, Method(schedule, method.site, _Keeping(steps))):
        for _ in range(steps):
            for branch in architecture.branches(call):
                with transformer.cache_context(branch) if branch != "default" else nullcontext():
                    transformer(**inputs)
        return report(transformer).history_bytes
