"""Exports plans and methods for other programs.

DPCache's plan on a calibration, `python -m dpcache.export CALIBRATION --budget K --to cache_dit`:

- `cache_dit`: the steps mask of cache-dit (SCM), which SGLang, vLLM-Omni and ComfyUI pass through.
- `diffusers`: a few lines of Python that cache any diffusers pipeline with this schedule.
- `json`: the schedule and what it was planned for.

Any method in its file, `python -m dpcache.export METHOD --to pipeline`:

- `pipeline`: a few lines of Python that put it on a diffusers pipeline.
- `comfyui`: a node of ComfyUI, one file for its folder custom_nodes. It takes methods that keep the model's prediction
  (site=output) and need no calibration, because ComfyUI's models and samplers are not those of diffusers.
"""

import argparse
import json
import sys

from dpcache import storage
from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.planned import dpcache
from dpcache.sites import Output, OutputResidual

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


_PIPELINE = """import dpcache

method = dpcache.Method.load({path!r}{budget})
with dpcache.cached(pipe, method):
    pipe(prompt, num_inference_steps={T})
"""

_COMFYUI = '''"""A cached model: put this file into ComfyUI/custom_nodes, and install dpcache in ComfyUI's Python."""

import dpcache
import torch


class WholeModel(torch.nn.Module):
    """What dpcache puts its hook on: one call of the model, which a skipped step does not make. ComfyUI has it return
    the denoised latents x - sigma v; kept is v, the prediction itself."""

    def __init__(self):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, hidden_states, timestep, apply_model, conditioning):
        denoised = apply_model(hidden_states, timestep, **conditioning)
        return (hidden_states - denoised) / sigma_of(timestep, hidden_states)


def sigma_of(timestep, latents):
    """The noise level of each sample, which ComfyUI calls its timestep."""
    return timestep.reshape(-1, *[1] * (latents.ndim - 1))


class CachedModel:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "apply", "model_patches"

    @classmethod
    def INPUT_TYPES(cls):
        method = ("STRING", {{"default": {path!r}}})
        budget = ("INT", {{"default": {K}, "min": 1, "max": 1000}})
        return {{"required": {{"model": ("MODEL",), "method": method, "budget": budget}}}}

    def apply(self, model, method, budget):
        """The model with the method. The sampler has to take as many steps as the method was made for: {T}."""
        whole = WholeModel()
        dpcache.enable(whole, dpcache.Method.load(method, budget))

        def call(apply_model, options):
            latents, timestep = options["input"], options["timestep"]
            return latents - sigma_of(timestep, latents) * whole(latents, timestep, apply_model, options["c"])

        patched = model.clone()
        patched.set_model_unet_function_wrapper(call)
        return (patched,)


NODE_CLASS_MAPPINGS = {{"DPCacheModel": CachedModel}}
NODE_DISPLAY_NAME_MAPPINGS = {{"DPCacheModel": "Cached model (dpcache)"}}
'''


def export_method(path: str, to: str, budget: int | None = None) -> str:
    """The method of a file that `Method.save` or `stage=calibrate` has written, for `to`: pipeline or comfyui.

    Args:
        budget: which one, of a file that holds several.

    Raises SettingError if the file does not hold it, and for a method that ComfyUI's models and samplers cannot take.
    """
    method = Method.load(path, budget)
    T, site = method.num_inference_steps, getattr(method, "site", None)
    if to == "pipeline":
        return _PIPELINE.format(path=path, budget="" if budget is None else f", budget={budget}", T=T)
    if not isinstance(site, Output) or isinstance(site, OutputResidual):
        name = type(method).__name__ if site is None else f"site={site.name}"
        raise SettingError(
            f"{name}: ComfyUI's models are not those of diffusers, so only site=output can be kept there"
        )
    if method.made_for or type(method) is not Method:
        why = "was calibrated for a model" if method.made_for else "brings a scheduler"
        raise SettingError(f"this {type(method).__name__} {why} of diffusers, and ComfyUI has its own")
    K = next(iter(storage.load(path))) if budget is None else budget
    return _COMFYUI.format(path=path, K=K, T=T)


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
    parser.add_argument("file", help="of a calibration or a method, as runs leave them in outputs/calibrations")
    parser.add_argument("--budget", type=int, help="computed steps K; a method file that holds one needs none")
    parser.add_argument("--to", choices=["cache_dit", "diffusers", "json", "pipeline", "comfyui"], default="json")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--solver", choices=["paper", "exact"], default="paper")
    parser.add_argument("--order", type=int, default=2, help="of the calibration's Taylor predictor")
    a = parser.parse_args()
    try:
        if a.to in ("pipeline", "comfyui"):
            text = export_method(a.file, a.to, a.budget)
        elif a.budget is None:
            raise SettingError(f"--to {a.to} plans on a calibration: give it a --budget")
        else:
            text = export(Calibration.load(a.file), a.budget, a.to, a.warmup, a.solver, a.order)
        sys.stdout.write(text)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
