"""ResilPhase: Plug-and-Play Phase Mapping and Noise-Resilient Macro-Trajectory Extrapolation (ECCV 2026), as in the
authors' code."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.predictors import Predictor
from dpcache.schedules import EvenlySpaced


def resilphase(
    budget: int,
    num_inference_steps: int,
    order: int = 1,
    warmup: int = 3,
    mapping: str = "balanced",
    alpha: float = 0.55,
) -> Method:
    """What all blocks add is extrapolated on an axis that is bent at its ends, between evenly spaced steps.

    We could not read the paper. For FLUX and HunyuanVideo the authors compute every 6th step after three warm-up steps,
    with order 1 and the balanced axis; for DiT every 4th step after two, with order 4 and the Chebyshev axis.

    Args:
        order, mapping, alpha: see `PhaseAxis`.
    """
    return Method(EvenlySpaced(budget, num_inference_steps, warmup), "residual", PhaseAxis(order, mapping, alpha))


@dataclass(frozen=True)
class PhaseAxis(Predictor):
    """The polynomial through the last `order + 1` keys, in a coordinate of its own.

    balanced: the coordinate is tanh(alpha u), with u the step's distance to the mean of the keys, in units of the
        farthest key's distance. So the extrapolation flattens. chebyshev: the keys lie at the Chebyshev nodes, the
        oldest at the largest node; the step's coordinate is on the line through the last two.

    Args:
        order: 0 and more.
        mapping: "balanced" or "chebyshev".
        alpha: of the balanced axis, above 0.
    """

    order: int = 1
    mapping: str = "balanced"
    alpha: float = 0.55
    by_distance = True

    def __post_init__(self):
        if self.order < 0 or self.mapping not in ("balanced", "chebyshev") or not self.alpha > 0:
            raise SettingError(
                f"order={self.order}, mapping={self.mapping}, alpha={self.alpha}: must be at least 0, balanced or "
                "chebyshev, and above 0"
            )

    @property
    def history(self) -> int:
        return self.order + 1

    def weights(self, keys: Sequence[int], step: int) -> tuple[float, ...]:
        keys = keys[-self.history :]
        if len(keys) == 1:
            return (1.0,)
        nodes, target = self._balanced(keys, step) if self.mapping == "balanced" else self._chebyshev(keys, step)
        return tuple(math.prod((target - other) / (node - other) for other in nodes if other != node) for node in nodes)

    def _balanced(self, keys: Sequence[int], step: int) -> tuple[list[float], float]:
        """Places of the keys and of the step."""
        mean = sum(keys) / len(keys)
        farthest = max(abs(key - mean) for key in keys)
        *nodes, target = (math.tanh(self.alpha * (s - mean) / farthest) for s in (*keys, step))
        return nodes, target

    def _chebyshev(self, keys: Sequence[int], step: int) -> tuple[list[float], float]:
        nodes = [math.cos((2 * a + 1) * math.pi / (2 * len(keys))) for a in range(len(keys))]
        slope = (nodes[-1] - nodes[-2]) / (keys[-1] - keys[-2])
        return nodes, nodes[-1] + slope * (step - keys[-1])
