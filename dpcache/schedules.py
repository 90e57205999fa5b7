"""When the transformer is really run: lists of computed steps, and the base of schedules that decide online.

Steps are indices 0..T-1 in sampling order, T = `num_inference_steps`, K = `budget` computed steps, M = `warmup`
steps that are always computed first.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpcache.errors import SettingError

if TYPE_CHECKING:
    import torch

    from dpcache.session import Branch


@dataclass(frozen=True)
class Schedule:
    """A fixed list of computed steps.

    Args:
        steps: computed steps, strictly increasing from 0.
        num_inference_steps: T.

    Raises SettingError for steps that do not increase strictly from 0 to below T.
    """

    steps: list[int]
    num_inference_steps: int

    def __post_init__(self):
        object.__setattr__(self, "steps", list(self.steps))
        legal = self.steps and self.steps[0] == 0 and self.steps[-1] < self.num_inference_steps
        if not legal or any(b <= a for a, b in zip(self.steps, self.steps[1:])):
            raise SettingError(
                f"steps={self.steps} must increase strictly from 0 and end below "
                f"num_inference_steps={self.num_inference_steps}"
            )


def check_budget(budget: int, num_inference_steps: int, warmup: int | None = None, least: int = 1) -> None:
    """Raises SettingError unless 1 <= warmup <= budget <= num_inference_steps, or least <= budget without a warm-up."""
    if warmup is not None:
        least, allowed = max(warmup, 1), f"warmup={warmup} (at least 1)"
    else:
        allowed = str(least)
    if not (warmup is None or warmup >= 1) or not least <= budget <= num_inference_steps:
        raise SettingError(f"budget={budget} must be between {allowed} and num_inference_steps={num_inference_steps}")


def given(steps: Sequence[int], budget: int, num_inference_steps: int) -> Schedule:
    """The schedule of a list of steps that was given in the settings of a method, which would otherwise plan its steps.

    Raises SettingError unless there are `budget` steps, which increase from 0 and end below T.
    """
    if len(steps) != budget:
        raise SettingError(f"steps has {len(steps)} entries: set budget={len(steps)}, not {budget}")
    return Schedule(steps, num_inference_steps)


class EvenlySpaced(Schedule):
    """M warm-up steps, then the other K - M spread evenly over the rest."""

    def __init__(self, budget: int, num_inference_steps: int, warmup: int = 1):
        check_budget(budget, num_inference_steps, warmup)
        length, count = num_inference_steps - warmup + 1, budget - warmup + 1
        spread = [warmup - 1 + i * length // count for i in range(count)]
        super().__init__([*range(warmup - 1), *spread], num_inference_steps)


class Interval(Schedule):
    """M warm-up steps, then every N-th step: the rules of the papers, which do not have a budget.

    The number of computed steps follows from N. A `budget` that differs from it is an error, so that tables compare at
    equal compute.

    Args:
        from_end: count the N-th steps back from the last step (FORA) instead of on from the last warm-up step
            (TaylorSeer).
    """

    def __init__(self, interval: int, budget: int, num_inference_steps: int, warmup: int = 1, from_end: bool = False):
        if interval < 1:
            raise SettingError(f"interval={interval} must be at least 1")
        last = num_inference_steps - 1
        every = range(last, warmup - 1, -interval) if from_end else range(warmup - 1, last + 1, interval)
        steps = sorted({*range(warmup), *every})
        if len(steps) != budget:
            raise SettingError(
                f"interval={interval} computes {len(steps)} steps: set budget={len(steps)}, not {budget}"
            )
        super().__init__(steps, num_inference_steps)


def with_first(steps: Iterable[int], first: int) -> list[int]:
    """The computed steps of a pipeline whose second model takes over at step `first`. This model has no features of its
    own to predict from yet. So `first` is computed, in place of the next computed step.

    Raises SettingError if there is no computed step from `first` on.
    """
    steps = sorted(steps)
    if first in steps:
        return steps
    later = [step for step in steps if step > first]
    if not later:
        raise SettingError(
            f"step {first} is the first of the pipeline's second model and has to be computed, but the schedule "
            "computes none from there on: raise the budget"
        )
    return sorted({*steps, first} - {later[0]})


@dataclass(frozen=True)
class Staggered(Schedule):
    """A fixed list of computed steps for each part of the model. Sites that keep parts of the model apart (`modules`,
    `blocks`) follow it; a predictor fills in each part from the steps at which that part was computed.

    Args:
        num_inference_steps: T.
        lists: the computed steps of each part, by the name under which the site keeps it ("3.attn1"), or by its kind,
            the last part of that name ("attn1"), for all parts of this kind without a list by name. A part without any
            list is computed at every step.

    Attributes:
        steps: those at which every part is computed.

    Raises SettingError for a list that does not increase strictly from 0 to below T.
    """

    steps: list[int] = field(init=False)
    lists: Mapping[str, Sequence[int]]

    def __post_init__(self):
        T = self.num_inference_steps
        lists = {name: Schedule(steps, T).steps for name, steps in self.lists.items()}
        object.__setattr__(self, "lists", lists)
        object.__setattr__(self, "steps", sorted(set(range(T)).intersection(*lists.values())))
        super().__post_init__()

    def refreshes(self, name: str, step: int) -> bool:
        """Whether the part is computed at this step, while some other parts are not."""
        own = self.lists.get(name, self.lists.get(kind(name)))
        return step not in self.steps and (own is None or step in own)

    def check(self, names: Iterable[str]) -> None:
        """Raises SettingError if a list is for a part that the site does not keep. `names`: of the parts that it
        keeps."""
        known = {*names, *map(kind, names)}
        if unknown := [name for name in self.lists if name not in known]:
            raise SettingError(
                f"steps of {', '.join(unknown)}: this model keeps {', '.join(dict.fromkeys(map(kind, sorted(names))))}"
            )


def kind(name: str) -> str:
    """The kind of a part that a site keeps: the last component of its name ("attn1" of "3.attn1")."""
    return name.rpartition(".")[2]


@dataclass(frozen=True)
class OnlineSchedule(ABC):
    """Base of schedules that decide at every step whether it is computed, from what they see there. The site sets the
    place of the decision: at `stack` and `residual` before the first block after the probed ones, at `modules` and
    `tokens` before the first block, at `output` and `output_residual` before the model runs.

    What a schedule remembers of a generation is a dataclass, `context.state`, one per guidance branch.

    Args:
        num_inference_steps: T.
    """

    num_inference_steps: int

    @abstractmethod
    def start(self) -> object:
        """The state for a new generation, a dataclass. Its tensors count as memory of the cache."""

    @abstractmethod
    def decide(self, context: "Branch", block: "torch.nn.Module", args: tuple, kwargs: dict) -> bool:
        """True if `context.step` is to be computed. If `context.keys` is empty, the step is always computed. `context`:
        the guidance branch. `args`, `kwargs`: of the call of `block` (at the output sites: of the model). With probed
        blocks, `context.stack_input` is the first block's input, (B, N, D)."""

    def learn(self, context: "Branch", name: str | int, feature: "torch.Tensor | tuple[torch.Tensor, ...]") -> None:  # noqa: B027, few look at it
        """Called with every feature that a computed step keeps, under its name. At the sites `stack` and `residual` it
        is also called with every block's image stream, under the block's index."""

    def scale(self, context: "Branch", weights: tuple[float, ...]) -> tuple[float, ...]:
        """The weights to use at a skipped step: the predictor's, corrected by what `decide` has seen."""
        return weights
