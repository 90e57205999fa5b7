"""Does it matter more which steps are computed, or how the others are predicted? ``python -m scripts.cross``

Combines the steps of every planning method with the predictors of other methods. All pairs run at site=output, where
every predictor is a weighted sum of the model's predictions at computed steps. So a method's steps are used as it plans
them, whatever site the method itself uses, and some predictors are used at another site than in their papers. The table
has the mean PSNR of each pair against the T-step run. For the column "for itself", `dpcache_sim` has planned for this
predictor alone.

What is finished is kept in a file, so that nothing is run twice.
"""

import argparse
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import OmegaConf
from tqdm import tqdm

from baselines.full import full
from dpcache.by_name import METHODS, recipe
from dpcache.calibration import Calibration, calibrate
from dpcache.errors import SettingError
from dpcache.lsq import LEAST_SQUARES
from dpcache.method import Method
from dpcache.models.pretrained import load
from dpcache.predictors import short_names
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced, Schedule, Staggered
from dpcache.simulated import CLOSED_LOOP, SimulatedRuns, make_method, simulator_of
from eval.files import write_text
from eval.methods import records
from eval.metrics import Samples
from eval.metrics.fidelity import psnr
from eval.schema import Group

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dpcache.simulator import Simulator

T, OWN = 50, "for itself"
PREDICTORS = (
    *("taylor0", "taylor1", "lagrange2", "hermite2", "foca", "ab2"),
    *("resilphase", "meancache", "l2p", "lsq3", "closed3"),
)


def planners(budget: int) -> list[str]:
    """Even spacing, and all methods that plan K of the T steps: the methods of the groups `plain` and `planned` that
    need a calibration and whose example, before the calibration, has evenly spaced steps."""
    found = ["uniform_skip"]
    for name, about in records().items():
        if about.group in (Group.plain, Group.planned) and not about.own_grid:
            made = recipe(name, budget, T)
            if made.statistics is not None and made.example and isinstance(made.example.schedule, EvenlySpaced):
                found.append(name)
    return found


class Cross:
    """Plans and scores of one model and budget.

    Args:
        model: a file of `conf/model`.
        prompts: how many to score; the first ones of the model's list, with seeds from 0 as in runs. Calibration takes
            the list's last ten.
        path: of the file that keeps what is finished.
    """

    def __init__(self, model: str, budget: int, prompts: int, path: Path):
        self.budget, self.prompts, self.path = budget, prompts, path
        self.settings = OmegaConf.to_container(OmegaConf.load(f"conf/model/{model}.yaml"))
        self.lines = Path(self.settings["prompts"]).read_text().splitlines()
        self.kept = json.loads(path.read_text()) if path.exists() else {"plans": {}, "scores": {}}
        self.references: dict[int, Samples] = {}  # of the T-step run, by the batch's first prompt

    @cached_property
    def pipe(self) -> "DiffusionPipeline":
        """The pipeline, on the CPU."""
        pipe = load(self.settings["path"], self.settings["dtype"], "cpu")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration, with the calibration prompts and seeds of runs."""
        size, call = self.settings["batch_size"], self.settings["call"]
        seeds = range(100000, 100010)
        return calibrate(self.pipe, self.lines[-10:], T, (), seeds=[*seeds], batch_size=size, **call)

    @cached_property
    def simulator(self) -> "Simulator":
        """The simulator of the calibration's prompts."""
        self.calibration.measure(self.pipe, [SimulatedRuns()])
        return simulator_of(self.calibration)

    def built(self, name: str, **settings) -> tuple[Method, float]:
        """A method by its name, and its cost in full trajectories of one prompt."""
        made, self.calibration.reran = recipe(name, self.budget, T, **settings), 0.0
        if made.statistics is None:
            return made.build(self.pipe, None), 0.0
        self.calibration.measure(self.pipe, made.statistics)
        method = made.build(self.pipe, self.calibration)
        return method, self.calibration.took(made.statistics) + self.calibration.reran

    def plan(self, name: str, predictor: str | None = None) -> list[int]:
        """The steps of a method; with `predictor`, the steps of `dpcache_sim` for this predictor alone.

        Raises SettingError for a method that does not have one list of K of the T steps.
        """
        key = name if predictor is None else f"{name} {predictor}"
        if key not in self.kept["plans"]:
            method, took = self.built(name, **({} if predictor is None else {"predictors": [predictor]}))
            schedule = getattr(method, "schedule", None)
            one_list = isinstance(schedule, Schedule) and not isinstance(schedule, Staggered)
            if not one_list or schedule.num_inference_steps != T or len(schedule.steps) != self.budget:
                raise SettingError(f"planners={name}: its steps are no list of {self.budget} of the {T} steps")
            self.kept["plans"][key] = {"steps": schedule.steps, "trajectories": took}
            self._keep()
        return self.kept["plans"][key]["steps"]

    def method(self, name: str, steps: Sequence[int]) -> Method:
        """A method of these steps with a predictor: the predictor of the method `name`, which gets the steps if it has
        such a setting, or a predictor that `dpcache_sim` knows by name."""
        if not (METHODS / f"{name}.yaml").is_file():
            return make_method(self.simulator, name, steps)
        takes_steps = "steps" in OmegaConf.load(METHODS / f"{name}.yaml").method
        method, _ = self.built(name, **({"steps": list(steps)} if takes_steps else {}))
        return Method(Schedule(list(steps), T), "output", method.predictor)

    def scores(self, name: str, steps: Sequence[int]) -> list[float]:
        """PSNR in dB of every prompt."""
        known = self.kept["scores"].setdefault(f"{name} {list(steps)}", [])
        if len(known) < self.prompts:
            method = self.method(name, steps)
        while len(known) < self.prompts:
            made = self._sample(method, len(known))
            if len(known) not in self.references:
                self.references[len(known)] = self._sample(full(T), len(known))
            known += psnr(made, self.references[len(known)]).tolist()
            self._keep()
        return known[: self.prompts]

    def _sample(self, method: Method, first: int) -> Samples:
        """The batch that begins with this prompt."""
        prompts = self.lines[first : min(first + self.settings["batch_size"], self.prompts)]
        seeds = range(first, first + len(prompts))
        return Samples(sample(self.pipe, method, prompts, seeds, **self.settings["call"]).images, None, prompts)

    def _keep(self):
        write_text(self.path, json.dumps(self.kept))


def shares(means: np.ndarray) -> tuple[float, float, float]:
    """The shares of a table's variance that its rows, its columns and their pairing explain; their sum is 1."""
    off = means - means.mean()
    rows, columns = off.mean(1, keepdims=True), off.mean(0, keepdims=True)
    return tuple(float((part**2).mean() / (off**2).mean()) for part in (rows, columns, off - rows - columns))


def tables(cross: Cross, plans: Sequence[str], names: Sequence[str]) -> str:
    """The plans and the cross, as Markdown. What is not kept yet is run."""
    means = np.array([[np.mean(cross.scores(name, cross.plan(plan))) for plan in plans] for name in names])
    known = cross.kept["plans"]
    lines = ["| plan | trajectories | steps |", "|---|---:|---|"]
    lines += [f"| {p} | {known[p]['trajectories']:.0f} | {', '.join(map(str, known[p]['steps']))} |" for p in plans]
    lines += ["", f"| | {' | '.join(plans)} | {OWN} | mean |", f"|---|{'---:|' * (len(plans) + 2)}"]
    for name, row in zip(names, means):
        own = f"{np.mean(cross.scores(name, cross.plan('dpcache_sim', name))):.1f}" if planned_alone(name) else "–"
        lines.append(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in row)} | {own} | {row.mean():.1f} |")
    lines.append(f"| mean | {' | '.join(f'{mean:.1f}' for mean in means.mean(0))} | | {means.mean():.1f} |")
    explained = shares(means)
    parts = ", ".join(f"{part} {share:.0%}" for part, share in zip(("predictors", "plans", "pairing"), explained))
    return "\n".join([*lines, "", f"Shares of the variance: {parts}"])


def planned_alone(name: str) -> bool:
    """Whether `dpcache_sim` knows the predictor."""
    return name in {*CLOSED_LOOP, *LEAST_SQUARES, *short_names()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_flux", help="a file of conf/model")
    parser.add_argument("--budget", type=int, default=9)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--planners", nargs="+", help="methods; default: uniform_skip and all that plan")
    parser.add_argument("--predictors", nargs="+", default=PREDICTORS, help="methods, or names that dpcache_sim knows")
    parser.add_argument("--folder", type=Path, default=Path("outputs/cross"), help="keeps what is finished")
    args = parser.parse_args()
    cross = Cross(args.model, args.budget, args.prompts, args.folder / f"{args.model}-K{args.budget}.json")
    plans = args.planners or planners(args.budget)
    for plan in tqdm(plans, desc="planning"):
        cross.plan(plan)
    for name in tqdm(args.predictors, desc="predictors"):
        for plan in plans:
            cross.scores(name, cross.plan(plan))
    print(tables(cross, plans, args.predictors))


if __name__ == "__main__":
    main()
