"""A planned schedule for other programs: `python -m dpcache.export CALIBRATION --budget K --to cache_dit`.

- `cache_dit`: the steps mask of cache-dit (SCM), which SGLang, vLLM-Omni and ComfyUI pass through.
- `diffusers`: a few lines of Python that cache any diffusers pipeline with this schedule.
- `json`: the schedule and what it was planned for.
"""

import argparse
import json
import sys

from dpcache.calibration import Calibration
from dpcache.planned import dpcache

_CACHE_DIT = """import cache_dit

# {K} of {T} steps are computed: {steps}
mask = {mask}
config = cache_dit.DBCacheConfig(
    Fn_compute_blocks=1, Bn_compute_blocks=0, steps_computation_mask=mask, steps_computation_policy="static"
)
calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order={order})
cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
pipe(prompt, num_inference_steps={T})
"""

_DIFFUSERS = """import dpcache
from dpcache.predictors import Taylor
from dpcache.schedules import Schedule

schedule = Schedule({steps}, num_inference_steps={T})
method = dpcache.Method(schedule, "stack", Taylor({order}, since={since}))
with dpcache.cached(pipe, method):
    pipe(prompt, num_inference_steps={T})
"""


def export(
    calibration: Calibration, budget: int, to: str, warmup: int = 3, solver: str = "paper", order: int = 2
) -> str:
    """DPCache's plan on `calibration`, written for `to`: cache_dit, diffusers or json.

    Raises SettingError for a budget out of range and for a calibration that does not hold the costs of Taylor(order).
    """
    T = calibration.num_inference_steps
    method = dpcache(budget, T, warmup, order, solver).build(None, calibration)
    steps = method.schedule.steps
    facts = {"K": budget, "T": T, "steps": steps, "order": order, "since": max(warmup - 2, 0)}
    mask = [int(step in steps) for step in range(T)]
    if to == "cache_dit":
        return _CACHE_DIT.format(mask=mask, **facts)
    if to == "diffusers":
        return _DIFFUSERS.format(**facts)
    plan = {"computed_steps": steps, "mask": mask, "budget": budget, "num_inference_steps": T}
    return json.dumps(plan | {"predictor": repr(method.predictor), "made_for": calibration.made_for}, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", help="a file of `Calibration.save`, as runs leave in outputs/calibrations")
    parser.add_argument("--budget", type=int, required=True, help="computed steps K")
    parser.add_argument("--to", choices=["cache_dit", "diffusers", "json"], default="json")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--solver", choices=["paper", "exact"], default="paper")
    parser.add_argument("--order", type=int, default=2, help="of the calibration's Taylor predictor")
    a = parser.parse_args()
    try:
        sys.stdout.write(export(Calibration.load(a.calibration), a.budget, a.to, a.warmup, a.solver, a.order))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
