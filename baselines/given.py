"""Lists of steps from settings, for methods that plan theirs otherwise."""

from collections.abc import Sequence

from dpcache.errors import SettingError
from dpcache.schedules import Schedule


def given(steps: Sequence[int], budget: int, num_inference_steps: int) -> Schedule:
    """Raises SettingError unless there are `budget` steps, which increase from 0 and end below T."""
    if len(steps) != budget:
        raise SettingError(f"steps has {len(steps)} entries: set budget={len(steps)}, not {budget}")
    return Schedule(steps, num_inference_steps)
