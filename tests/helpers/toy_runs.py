"""Runs of a model that answers errors linearly, with real schedulers."""

import inspect

import diffusers
import numpy as np
import torch

from dpcache.linear_sampler import read_sampler
from dpcache.recorded import Recorded

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
LINEAR = {
    "Euler, flow": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, 1),
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False}, 1),
    "DDIM, velocity": (diffusers.DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}, 1),
    "DDPM": (diffusers.DDPMScheduler, {"clip_sample": False}, 1),
    "DPM-Solver++ 2": (diffusers.DPMSolverMultistepScheduler, {}, 2),
    "DPM-Solver++ 3": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}, 3),
    "DPM-Solver++, flow": (diffusers.DPMSolverMultistepScheduler, FLOW, 2),
    "SDE-DPM-Solver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, 2),
    "UniPC 2": (diffusers.UniPCMultistepScheduler, {}, 3),
    "UniPC 3": (diffusers.UniPCMultistepScheduler, {"solver_order": 3}, 4),
    "UniPC, flow": (diffusers.UniPCMultistepScheduler, FLOW, 3),
}


def ready(kind, config, steps):
    """A scheduler with its timesteps set, and the arguments of its steps beside prediction and latents."""
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    noisy = "generator" in inspect.signature(scheduler.step).parameters
    return scheduler, [{"timestep": time} | ({"generator": None} if noisy else {}) for time in scheduler.timesteps]


class ToyRun:
    """A real sampling loop of a toy model with a real scheduler, with a plan or (None) with every step computed.

    The model is v = rate(s) x + a vector that changes from step to step, so it answers every error of x with rate(s)
    times the error.
    """

    def __init__(self, name, rates, seed=0, size=40):
        kind, config, _ = LINEAR[name]
        self.make = lambda: ready(kind, config, len(rates))
        self.rates = rates
        random = torch.Generator().manual_seed(seed)
        self.own = torch.randn(len(rates), size, generator=random, dtype=torch.float64).cumsum(0) / 4
        self.start = torch.randn(1, size, generator=random, dtype=torch.float64)
        self.sampler = read_sampler(*self.make())

    def __call__(self, plan=None, predictor=None):
        """Predictions (T, size) and latents (T+1, size)."""
        scheduler, calls = self.make()
        x, used, latents = self.start, [], [self.start]
        for s, call in enumerate(calls):
            if plan is None or s in plan:
                used.append(self.rates[s] * x + self.own[s])
            else:
                keys = [key for key in plan if key < s]
                weights = list(predictor.weights(keys, s))
                seen = weights.pop() * x if predictor.sees_input else 0
                used.append(seen + sum(w * used[k] for w, k in zip(weights, keys[-len(weights) :])))
            x = scheduler.step(used[-1], sample=x, return_dict=False, **call)[0]
            latents.append(x)
        return torch.cat(used).numpy(), torch.cat(latents).numpy()

    def recorded(self):
        v, x = self()
        return Recorded(v[None], x[None], self.sampler)

    def error(self, plan, predictor):
        truth, moved = self()[1][-1], self(plan, predictor)[1][-1]
        return np.linalg.norm(moved - truth) / np.linalg.norm(truth)


def rates(steps):
    return np.linspace(0.9, 0.1, steps)
