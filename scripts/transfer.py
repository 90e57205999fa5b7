"""What is a calibration good for? ``python -m scripts.transfer``

`dpcache_sim` is calibrated under some circumstances and used under others: another number of steps, guidance scale,
resolution, ... For each pair of circumstances the table has the PSNR in dB against the full-step images of unseen
prompts: of the method that was calibrated elsewhere, and of the method that was calibrated under the circumstances of
use; and the mean of their paired differences, with half the width of its 95 % bootstrap interval. `dpcache.other_steps`
carries a calibration to another number of steps.

Finished cells are kept in a file, so that nothing runs twice.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from dpcache.calibration import Calibration, calibrate
from dpcache.models.pretrained import load
from dpcache.other_steps import carry
from dpcache.quality import psnr
from dpcache.sampler import generate, sample
from dpcache.simulated import SimulatedPlan, SimulatedRuns
from eval.files import write_text
from eval.statistics import paired_difference
from scripts.rank_correlation import CALLS, lines

PREDICTORS = ("closed3", "closed2x")
SEED, OTHER_SEED, UNSEEN_SEED = 100_000, 200_000, 0
ALIKE = {"tiny_flux": "face", "tiny_dit": "sneaker", "tiny_video": "standing still"}  # a part of some prompts


@dataclass(frozen=True)
class Where:
    """Circumstances of a calibration or of a run.

    Attributes:
        steps: T.
        call: arguments of the pipeline in place of the model's own.
        alike: whether calibration prompts are all of one kind.
        seed: of the first calibration prompt.
        batch_size: of a run; None: all prompts at once.
    """

    steps: int = 50
    call: dict = field(default_factory=dict)
    alike: bool = False
    seed: int = SEED
    batch_size: int | None = None


USUAL = Where()
ROWS = {  # where a method is calibrated, and where it is used
    "28 steps": (USUAL, Where(steps=28)),
    "100 steps": (USUAL, Where(steps=100)),
    "guidance 1.5": (USUAL, Where(call={"guidance_scale": 1.5})),
    "guidance 5": (USUAL, Where(call={"guidance_scale": 5.0})),
    "larger": (
        USUAL,
        {"tiny_flux": Where(call={"height": 96, "width": 96}), "tiny_video": Where(call={"height": 48, "width": 48})},
    ),
    "calibrated on prompts of one kind": (Where(alike=True), USUAL),
    "calibrated with other noise": (Where(seed=OTHER_SEED), USUAL),
    "one prompt at a time": (USUAL, Where(batch_size=1)),
    "guidance 3": (USUAL, Where(call={"guidance_scale": 3.0})),
}


class Model:
    """One model's runs."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args, self.folder = name, args, args.folder
        self.pipe = load(name, "float32", "cpu")
        self.pipe.set_progress_bar_config(disable=True)
        self.path = args.folder / f"{name}-K{args.budget}-{args.calibration}-{args.prompts}.json"
        self.known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.full = cache(self._full)

    def call(self, where: Where) -> dict:
        return CALLS[self.name] | where.call

    def calibration(self, where: Where) -> Calibration:
        where = replace(where, batch_size=None)
        slug = "-".join(f"{value}".replace(" ", "") for value in asdict(where).values())
        path = self.folder / f"{self.name}-{self.args.calibration}-{slug}.safetensors"
        if path.exists():
            return Calibration.load(path)
        prompts = [
            line for line in lines(self.name)[self.args.prompts :] if not where.alike or ALIKE[self.name] in line
        ]
        prompts = prompts[-self.args.calibration :]
        settings = {"seeds": [where.seed + i for i in range(len(prompts))], "batch_size": len(prompts)}
        made = calibrate(self.pipe, prompts, where.steps, (SimulatedRuns(),), **settings, **self.call(where))
        made.save(path)
        return made

    def _full(self, steps: int, call: str) -> np.ndarray:
        prompts, seeds = self.unseen
        return generate(self.pipe, prompts, seeds, steps, **json.loads(call)).images

    @property
    def unseen(self) -> tuple[list[str], list[int]]:
        prompts = lines(self.name)[: self.args.prompts]
        return prompts, [UNSEEN_SEED + i for i in range(len(prompts))]

    def decibels(self, made: Where, used: Where) -> np.ndarray:
        """PSNR of the unseen prompts where `used`, with a method that was calibrated where `made`."""
        key = f"{made} | {used}"
        if key not in self.known:
            calibration, (prompts, seeds) = self.calibration(made), self.unseen
            recipe = SimulatedPlan(self.args.budget, used.steps, PREDICTORS)
            if made.steps != used.steps:
                calibration = carry(self.pipe, calibration, used.steps, recipe.statistics)
            method = recipe.build(self.pipe, calibration)
            reference = self.full(used.steps, json.dumps(self.call(used)))
            size = used.batch_size or len(prompts)
            images = [
                sample(self.pipe, method, prompts[i : i + size], seeds[i : i + size], **self.call(used)).images
                for i in range(0, len(prompts), size)
            ]
            found = psnr(np.concatenate(images), reference).tolist()
            self.known[key] = {"decibels": found, "decided": dict(method.decided)}
            write_text(self.path, json.dumps(self.known))
        return np.array(self.known[key]["decibels"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CALLS), choices=list(CALLS))
    parser.add_argument("--budget", type=int, default=9)
    parser.add_argument("--calibration", type=int, default=5, help="calibration prompts")
    parser.add_argument("--prompts", type=int, default=8, help="unseen prompts")
    parser.add_argument("--folder", type=Path, default=Path("outputs/transfer"), help="keeps calibrations and cells")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    models = {name: Model(name, args) for name in args.models}
    print("| used with | model | calibrated elsewhere | calibrated there | difference |\n|---|---|---:|---:|---:|")
    for row, (made, used) in ROWS.items():
        for name, model in models.items():
            where = used.get(name) if isinstance(used, dict) else used
            if where is None or (where.call.get("guidance_scale") and "guidance_scale" not in CALLS[name]):
                continue
            if model.call(where) == model.call(USUAL) and where.call:
                continue  # its own guidance scale
            there = replace(where, alike=False, seed=SEED, batch_size=None)
            elsewhere, own = model.decibels(made, where), model.decibels(there, there)
            off = paired_difference(elsewhere, own)
            low, high = off["ci95"]
            difference = f"{off['mean']:+.1f} ± {(high - low) / 2:.1f}"
            print(f"| {row} | {name} | {elsewhere.mean():.1f} | {own.mean():.1f} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
