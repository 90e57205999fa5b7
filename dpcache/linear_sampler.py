"""How the latents depend on the model's predictions: a scheduler's arithmetic, found by running the scheduler on unit
vectors.

Most samplers are linear in what they are given. With the predictions m_0 .. m_{T-1} (what `scheduler.step` takes, after
guidance) and the first latents x_0,

    x_s = P_s x_0 + sum_{r<s} R[s, r] m_r + n_s,

where n_s, the noise that some of them add, does not depend on x_0 or m. So an error of the predictions moves the
latents by dx_s = sum_r R[s, r] dm_r, for solvers of any order and any memory. For long simulations the same map is
written as a short recurrence, with p = 1 for one-step solvers (Euler, DDIM, DDPM), 2 for DPM-Solver++ of order 2, 3 for
UniPC of order 2:

    dx_{s+1} = sum_{j<p} carry[s, j] dx_{s-j} + drive[s, j] dm_{s-j}.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils._pytree import tree_map

from dpcache._diffusers import copy_of_scheduler
from dpcache.errors import SettingError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

LONGEST_MEMORY = 6
TOLERANCE = 1e-4  # relative; schedulers that count in float32 are off by 1e-6


@dataclass(frozen=True, eq=False)
class LinearSampler:
    """A scheduler's steps as a linear recurrence.

    Attributes:
        response: (T+1, T), R above: row s is how x_s depends on each prediction.
        start: (T+1,), P above.
        carry, drive: (T, p), the recurrence above.
        noisy: whether it adds noise.
    """

    response: np.ndarray
    start: np.ndarray
    carry: np.ndarray
    drive: np.ndarray
    noisy: bool

    @property
    def steps(self) -> int:
        """T."""
        return len(self.drive)

    def carried(self, step: int, moved: Sequence, predicted: Sequence) -> np.ndarray:
        """The part of dx_{step+1} that earlier steps determine: the recurrence without its term drive[step, 0] dm_step.

        Args:
            moved, predicted: dx_s and dm_s by s, arrays of one shape each; dx up to `step`, dm up to the one before.
        """
        left = self.carry[step, 0] * moved[step]
        for back in range(1, min(self.carry.shape[1], step + 1)):
            left = left + self.carry[step, back] * moved[step - back]
            left = left + self.drive[step, back] * predicted[step - back]
        return left

    def predictions_between(self, states: np.ndarray, unmoved: np.ndarray) -> np.ndarray:
        """The predictions (T, ...) that lead from each of the latents x_0 .. x_T, `states` (T+1, ...), to the next, if
        no noise is added. For a step that does not depend on its prediction, the prediction is taken from `unmoved`,
        (T, ...)."""
        found, first = np.zeros(unmoved.shape), states[0].astype(float)
        moved = [state - start * first for state, start in zip(states, self.start)]  # by the predictions
        for step, drive in enumerate(self.drive[:, 0]):
            found[step] = (moved[step + 1] - self.carried(step, moved, found)) / drive if drive else unmoved[step]
        return found


HANDED_BACK = "old_pred_original_sample"
"""The argument with which CogVideoX's scheduler is given what its last step has returned beside the latents."""


@torch.no_grad()
def read_sampler(scheduler: "SchedulerMixin", calls: Sequence[dict]) -> LinearSampler:
    """Run a copy of `scheduler` on unit vectors: element 0 of the latents starts at 1; element r + 1 gets the
    prediction 1 at step r, and 0 at all others.

    Args:
        scheduler: with its timesteps set, before its first step.
        calls: for every step, the arguments beside prediction and latents ("timestep" and others), by name.

    Raises SettingError for a scheduler whose step is not linear.
    """
    steps, name = len(calls), type(scheduler).__name__
    random = torch.randn(steps + 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Columns: unit vectors, one random combination of them, nothing. In row 0 the start, in row r + 1 prediction r.
    inputs = torch.cat([torch.eye(steps + 1, dtype=torch.float64), random, torch.zeros_like(random)], 1)
    # One generator for each column, all alike, so that a noisy scheduler adds the same to all.
    noise = [torch.Generator().manual_seed(0) for _ in range(steps + 3)]
    twin, shape = copy_of_scheduler(scheduler), (steps + 3, 1, 1, 1)
    vars(twin).update(_on_the_cpu(vars(twin)))  # a GPU's would not go with the unit vectors
    latents, trajectory, returned = inputs[0].reshape(shape), [inputs[0]], ()
    hands_back = HANDED_BACK in inspect.signature(twin.step).parameters
    for prediction, call in zip(inputs[1:], map(_on_the_cpu, calls)):
        if "generator" in call:
            call = call | {"generator": noise}
        if hands_back:
            call = call | {HANDED_BACK: returned[1] if returned else None, "return_dict": False}
        returned = twin.step(model_output=prediction.reshape(shape), sample=latents, **call)
        latents = returned[0]
        trajectory.append(latents.double().flatten())
    trajectory = torch.stack(trajectory).numpy()
    added, linear = trajectory[:, -1:], trajectory[:, :-1] - trajectory[:, -1:]
    matrix, combined = linear[:, :-1], linear[:, -1]
    expected = matrix @ random[:, 0].numpy()
    if not np.abs(combined - expected).max() <= TOLERANCE * np.abs(matrix).max():
        raise SettingError(f"{name}: the simulator takes schedulers whose step is linear in what it is given")
    start, response = matrix[:, 0], matrix[:, 1:]
    return LinearSampler(response, start, *_recurrence(response, name), bool(np.abs(added).max() > 0))


def _on_the_cpu(values: dict) -> dict:
    """With all tensors in it, and those in lists, on the CPU."""

    def moved(value):
        return value.cpu() if torch.is_tensor(value) else value

    held = {name: part for name, part in values.items() if isinstance(part, (torch.Tensor, list, tuple))}
    return values | {name: tree_map(moved, part) for name, part in held.items()}


def _recurrence(response: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The shortest memory p, and (carry, drive), that reproduce the response. Row s + 1 is a combination of the rows
    s, s-1, ... and of the predictions s, s-1, ... themselves."""
    steps = response.shape[1]
    for memory in range(1, LONGEST_MEMORY + 1):
        carry, drive = np.zeros((steps, memory)), np.zeros((steps, memory))
        for step in range(steps):
            back = min(memory, step + 1)
            lately = np.arange(step, step - back, -1)
            parts = np.concatenate([response[lately], np.eye(steps)[lately]])
            scale = np.linalg.norm(parts, axis=1)
            parts, scale = parts[scale > 0], np.where(scale > 0, scale, np.inf)
            found = np.zeros(len(scale))
            solution = np.linalg.lstsq((parts / scale[scale < np.inf, None]).T, response[step + 1], rcond=1e-9)[0]
            found[scale < np.inf] = solution
            carry[step, :back], drive[step, :back] = np.split(found / scale, 2)
        if np.abs(unroll(carry, drive) - response).max() <= TOLERANCE * np.abs(response).max():
            return carry, drive
    raise SettingError(f"{name}: its step depends on more than {LONGEST_MEMORY} steps before it")


def unroll(carry: np.ndarray, drive: np.ndarray) -> np.ndarray:
    """The response (T+1, T) of a recurrence (T, p)."""
    steps, memory = carry.shape
    response, unit = np.zeros((steps + 1, steps)), np.eye(steps)
    for step in range(steps):
        for back in range(min(memory, step + 1)):
            response[step + 1] += carry[step, back] * response[step - back] + drive[step, back] * unit[step - back]
    return response
