"""Does the simulator know which plan is better? ``python -m scripts.rank_correlation``

Random plans are simulated, and also run, at two sites, on prompts that the simulator has not seen. For each model, site
and budget the table has, over all plans and predictors, Spearman's rank correlation of the predicted and the real error
of the final latents, the root mean square of their difference in dB, and the mean of this difference (positive: the
simulator underestimates the error).

Real runs are kept in a file, so that nothing is run twice.
"""

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dpcache.method import Method
from dpcache.models.pretrained import load
from dpcache.output_layers import measure_output_layers
from dpcache.predictors import AdamsBashforth, Lagrange, LeastSquares, Taylor
from dpcache.recorded import random_probes, record
from dpcache.sampler import Batch, generate, sample
from dpcache.schedules import Schedule
from dpcache.simulator import Weights, decibels, fit_simulator
from eval.files import write_text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


CALLS = {
    "tiny_dit": {"guidance_scale": 2.0},
    "tiny_flux": {"height": 64, "width": 64, "max_sequence_length": 12},
    "tiny_video": {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 8, "guidance_scale": 3.0},
}
T, CALIBRATION, UNSEEN = 50, range(10), 200  # prompts of the model's list; each one's seed is its place there


class RealRuns:
    """Relative errors of the final latents on unseen prompts, kept in a JSON file."""

    def __init__(self, model: str, pipe: "DiffusionPipeline", prompts: int, folder: Path):
        self.pipe, self.call, self.which = pipe, CALLS[model], range(UNSEEN, UNSEEN + prompts)
        self.prompts = [lines(model)[i] for i in self.which]
        self.path = folder / f"{model}-{prompts}.json"
        self.known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.reference = None

    def __call__(self, site: str, name: str, predictor, plan: list[int]) -> list[float]:
        key = f"{site} {name} {plan}"
        if key not in self.known:
            if self.reference is None:
                self.reference = self.flat(generate(self.pipe, self.prompts, self.which, T, decode=False, **self.call))
            method = Method(Schedule(plan, T), site, predictor)
            moved = self.flat(sample(self.pipe, method, self.prompts, self.which, decode=False, **self.call))
            errors = (moved - self.reference).norm(dim=1) / self.reference.norm(dim=1)
            self.known[key] = errors.tolist()
            write_text(self.path, json.dumps(self.known))
        return self.known[key]

    @staticmethod
    def flat(batch: Batch) -> torch.Tensor:
        return batch.latents.double().flatten(1)


def lines(model: str) -> list[str]:
    """The model's prompts."""
    return Path(f"dpcache/models/{model}/prompts.txt").read_text().splitlines()


def random_plans(number: int, budget: int) -> list[list[int]]:
    """Random plans of `budget` steps, each beginning with step 0."""
    random = np.random.default_rng(100 + budget)
    return [[0, *sorted((random.choice(T - 1, budget - 1, replace=False) + 1).tolist())] for _ in range(number)]


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """The correlation of the ranks."""
    return float(np.corrcoef(one.argsort().argsort(), two.argsort().argsort())[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CALLS), choices=list(CALLS))
    parser.add_argument("--sites", nargs="+", default=["output", "stack"], choices=["output", "stack"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[5, 7, 9, 13, 17])
    parser.add_argument("--plans", type=int, default=24, help="random plans per budget, each with four predictors")
    parser.add_argument("--prompts", type=int, default=4, help="unseen prompts that each plan is run on")
    parser.add_argument("--probes", type=int, default=12, help="accelerated runs that the simulator learns from")
    parser.add_argument("--folder", type=Path, default=Path("outputs/rank_correlation"), help="keeps real runs")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)

    print("| model | site | K | real dB | Spearman | rms dB | mean dB |\n|---|---|---|---|---|---|---|")
    for model in args.models:
        pipe = load(model, "float32", "cpu")
        pipe.set_progress_bar_config(disable=True)
        real = RealRuns(model, pipe, args.prompts, args.folder)
        batches = [([lines(model)[i] for i in CALIBRATION], CALIBRATION)]
        recorded, answers, ends, _ = record(pipe, batches, T, random_probes(args.probes, T), **CALLS[model])
        simulator = fit_simulator(recorded, answers, ends)
        if "stack" in args.sites:
            simulator = replace(simulator, layers=measure_output_layers(pipe, recorded, batches, **CALLS[model]))
        for site, budget in product(args.sites, args.budgets):
            predictors = {"taylor1": Taylor(1), "lagrange2": Lagrange(2), "ab2": AdamsBashforth(2)}
            at_stack = site == "stack"
            predictors["lsq3"] = LeastSquares(simulator.layers.lengths, 3) if at_stack else recorded.least_squares(3)
            plans = random_plans(args.plans, budget)
            filled = [Weights(predictor, T).fill(plans) for predictor in predictors.values()]
            predicted = np.concatenate([decibels(simulator.errors(fill, at_stack=at_stack)) for fill in filled])
            pairs = product(predictors.items(), plans)
            measured = decibels(np.array([real(site, *named, plan) for named, plan in pairs]))
            off = predicted - measured
            print(
                f"| {model} | {site} | {budget} | {measured.min():.0f} to {measured.max():.0f} | "
                f"{spearman(predicted, measured):.3f} | {np.sqrt((off**2).mean()):.2f} | {off.mean():+.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
