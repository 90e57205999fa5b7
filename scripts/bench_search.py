"""Times the search for plans of `dpcache_sim`, which runs no model: ``python -m scripts.bench_search``.

The simulator is made of a few prompts of an embedded model first. The seconds are of the processor, so that other
programs on the machine count little.
"""

import argparse
import time

import torch

from dpcache.calibration import calibrate
from dpcache.models.pretrained import load
from dpcache.simulated import SimulatedPlan, SimulatedRuns, simulator_of
from scripts.rank_correlation import CALLS, lines

SIZES = ((50, 9), (50, 17), (250, 25))  # T and K


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_dit", choices=list(CALLS))
    parser.add_argument("--prompts", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)

    pipe, prompts, simulators = load(args.model, "float32", "cpu"), lines(args.model)[-args.prompts :], {}
    pipe.set_progress_bar_config(disable=True)
    print("| T | K | directions | seconds |\n|---|---|---|---|")
    for steps, budget in SIZES:
        if steps not in simulators:
            settings = {"batch_size": args.prompts, **CALLS[args.model]}
            calibration = calibrate(pipe, prompts, steps, (SimulatedRuns(),), **settings)
            simulators[steps] = simulator_of(calibration)
        start = time.process_time()
        SimulatedPlan(budget, steps).search(simulators[steps])
        seconds, directions = time.process_time() - start, simulators[steps].recorded.directions.shape[1]
        print(f"| {steps} | {budget} | {directions} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
