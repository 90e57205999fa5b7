"""A calibration of T steps, carried to another number of steps.

The model's predictions v(t) are a smooth curve in the scheduler's time t, and another grid runs along nearly the same
one. So the predictions at the times t'_0 .. t'_{T'-1} of the other grid are taken as interpolated between those that
were recorded, v' = P v with a matrix P (T', T) that depends on the times alone. What a simulator knows of them follows
without the model: their Gram matrix is P G P', and the response curve is interpolated likewise. The scheduler's
arithmetic on the other grid is read off anew, and steps and weights are then found in the new simulator.

What is lost: two grids do not follow quite the same trajectory, and between the recorded times there is the
interpolation's error. The table "What is a calibration good for?" in notebooks/README.md has what both cost.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dpcache.calibration import Calibration
from dpcache.circumstances import describe
from dpcache.errors import SettingError
from dpcache.linear_sampler import LinearSampler
from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.schedules import EvenlySpaced
from dpcache.simulated import SimulatedRuns, simulator_of
from dpcache.simulator import Simulator, read_steps
from dpcache.statistics import Statistic

log = logging.getLogger(__name__)


def interpolation(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """P, (T', T): of values at the times `known` (T,), which rise or fall, those at the times `wanted` (T',). Each is
    on the cubic through the four nearest known ones; beyond the ends on the line through the last two.

    Raises SettingError for times that do not rise or fall throughout.
    """
    known, wanted = np.asarray(known, float), np.asarray(wanted, float)
    steps = np.diff(known)
    if len(known) < 2 or not ((steps > 0).all() or (steps < 0).all()):
        raise SettingError("a scheduler whose times do not fall throughout: calibrate for each number of steps")
    matrix = np.zeros((len(wanted), len(known)))
    for row, time in zip(matrix, wanted):
        inside = known.min() <= time <= known.max()
        near = np.sort(np.argsort(np.abs(known - time), kind="stable")[: 4 if inside else 2])
        for at in near:
            others = known[near[near != at]]
            row[at] = np.prod((time - others) / (known[at] - others))
    return matrix


def resample(simulator: Simulator, known: np.ndarray, wanted: np.ndarray, sampler: LinearSampler) -> Simulator:
    """The simulator for another grid.

    Args:
        known, wanted: the scheduler's times of the recorded steps, (T,), and of the others, (T',).
        sampler: the scheduler's arithmetic on the other grid.
    """
    recorded, P = simulator.recorded, interpolation(known, wanted)
    with_start = np.pad(P, ((0, 1), (0, 1)))
    with_start[-1, -1] = 1  # x_0 is the same noise
    remaining = recorded.remaining @ P.T
    remaining = np.maximum(remaining, recorded.remaining.min() / 10)  # a line beyond the end may cross zero
    response = P @ (simulator.response * recorded.remaining.mean(0)) / remaining.mean(0)
    gram = with_start @ recorded.gram @ with_start.T
    return Simulator(replace(recorded, gram=gram, remaining=remaining, sampler=sampler), response)


def carry(
    pipe, calibration: Calibration, num_inference_steps: int, statistics: Sequence[Statistic], prompts: int = 3
) -> Calibration:
    """A calibration for another number of steps, in place of one that was made with it.

    It runs `prompts` of the calibration's prompts with all of the new steps, to compare finalists with, where a
    calibration of its own runs all of them, and accelerated runs besides.

    Args:
        statistics: what the recipe needs: `SimulatedRuns`.
        prompts: how many; with these alone finalists are then confirmed.

    Raises SettingError for other statistics, which cannot be interpolated, and where the calibration was made for
    another model or call than this pipeline's.
    """
    T, call = calibration.num_inference_steps, calibration.made_from["call"]
    if others := [statistic.name for statistic in statistics if not isinstance(statistic, SimulatedRuns)]:
        raise SettingError(
            f"num_inference_steps={num_inference_steps}: this calibration was made for {T}, and {', '.join(others)} "
            "cannot be carried to another number of steps: calibrate for it"
        )
    for statistic in statistics:
        calibration[statistic]  # before anything is run
    calibration.check(describe(pipe, T, **call))
    log.warning(
        "the calibration of %s steps is carried to %s: see notebooks/README.md for what that may cost",
        *(T, num_inference_steps),
    )
    cut = {name: calibration.made_from[name][:prompts] for name in ("prompts", "seeds")}
    made = replace(
        calibration,
        made_for=calibration.made_for | {"num_inference_steps": str(num_inference_steps)},
        made_from=calibration.made_from | cut,
        arrays={},
        trajectories={},
        reran=0.0,
    )
    (first, seed), *_ = zip(cut["prompts"], cut["seeds"])
    (known, _), (wanted, sampler) = (read_steps(pipe, first, seed, steps, **call) for steps in (T, num_inference_steps))
    made.latents, _ = made.rerun(
        pipe, Method(EvenlySpaced(num_inference_steps, num_inference_steps), "output", Reuse())
    )
    for statistic in statistics:
        simulator = resample(simulator_of(calibration, statistic.probes), known, wanted, sampler)
        made.arrays[statistic.name] = simulator.pack()
        made.trajectories[statistic.name] = made.reran + 1 / T + 1 / num_inference_steps  # `read_steps` calls once
    made.reran = 0.0
    return made
