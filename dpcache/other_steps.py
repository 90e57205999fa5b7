"""Carries a calibration of T steps to another number of steps.

A simulator consists of full-step runs and of the model's response to errors. The full-step runs are made anew, for a
few prompts. To learn the response takes many accelerated runs, but it is a property of the model: in units of 1 /
(distance to the end), it is a curve over that distance, whatever the steps. So the response is interpolated. Then steps
and weights are found in the new simulator, and the weights are learnt in real runs, as usual.

Two things are lost: the part of an answer that has another direction than its error (`dpcache.simulator.fit_mixing`),
and the information of further prompts. The table "What is a calibration good for?" in notebooks/README.md has what both
cost.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dpcache.calibration import Calibration
from dpcache.circumstances import describe
from dpcache.errors import SettingError
from dpcache.recorded import Recorded, record
from dpcache.simulated import SimulatedRuns, simulator_of
from dpcache.simulator import Simulator
from dpcache.statistics import Statistic

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)


def carried_response(simulator: Simulator, recorded: Recorded) -> np.ndarray:
    """lambda, (T',): the response of a simulator of T steps, interpolated to the T' steps of other recorded runs."""
    known, wanted = (runs.remaining.mean(0) for runs in (simulator.recorded, recorded))
    order = np.argsort(known)
    return np.interp(wanted, known[order], (simulator.response * known)[order]) / wanted


def carry(
    pipe: "DiffusionPipeline",
    calibration: Calibration,
    num_inference_steps: int,
    statistics: Sequence[Statistic],
    prompts: int = 3,
) -> Calibration:
    """A calibration for another number of steps, in place of one that was made with it.

    It runs `prompts` of the calibration's prompts with all of the new steps. A new calibration would run all prompts,
    and accelerated runs as well.

    Args:
        statistics: what the recipe needs: `SimulatedRuns`, of site=output alone.
        prompts: the number of prompts; the finalists among the plans are then run on these prompts only.

    Raises SettingError for other statistics, which cannot be carried, and where the calibration was made for another
    model or call than this pipeline's.
    """
    T, call = calibration.num_inference_steps, calibration.made_from["call"]
    carried = [statistic for statistic in statistics if isinstance(statistic, SimulatedRuns) and not statistic.stack]
    if others := [statistic.name for statistic in statistics if statistic not in carried]:
        raise SettingError(
            f"num_inference_steps={num_inference_steps}: this calibration was made for {T}, and {', '.join(others)} "
            "cannot be carried to another number of steps: calibrate for it"
        )
    simulators = [simulator_of(calibration, statistic.probes, statistic.finer) for statistic in statistics]
    calibration.check(describe(pipe, T, **call))
    log.warning(
        "the calibration of %s steps is carried to %s: see notebooks/README.md for what that may cost",
        *(T, num_inference_steps),
    )
    made = replace(
        calibration,
        made_for=calibration.made_for | {"num_inference_steps": str(num_inference_steps)},
        made_from=calibration.made_from
        | {name: calibration.made_from[name][:prompts] for name in ("prompts", "seeds")},
        arrays={},
        latents=np.zeros(0),
        trajectories={},
        reran=0.0,
    )
    for statistic, simulator in zip(statistics, simulators):
        recorded, _, _, latents = record(
            pipe, made.batches(), num_inference_steps, (), made.count, statistic.finer, **call
        )
        if statistic.finer == 1:
            made.latents = latents
        made.arrays[statistic.name] = Simulator(recorded, carried_response(simulator, recorded)).pack()
        made.trajectories[statistic.name], made.reran = made.reran, 0.0
    return made
