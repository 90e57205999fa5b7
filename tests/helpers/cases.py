"""The families' pipelines; what many tests need of one is made once."""

import functools

import torch
from hydra.utils import instantiate

import dpcache
from dpcache.sampler import generate, sample
from helpers.commands import compose
from helpers.families import FAMILIES, Family

T, K = 8, 5


@functools.cache
def settings(method: str, budget: int, *given: str):
    return compose(f"method={method}", f"budget={budget}", f"num_inference_steps={T}", *given).method


class Case:
    """A family's pipeline; what many tests need of it is made once."""

    def __init__(self, family: Family):
        self.family, self.pipe = family, family.make()

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """Latents without any cache."""
        return self.latents()

    @functools.cache  # noqa: B019, cases live as long as the tests
    def calibration(self, site: str):
        prompts, call = self.family.prompts[-2:], self.family.call
        return dpcache.calibrate(self.pipe, prompts, T, site=site, measure_gains=True, seeds=[8, 9], **call)

    @functools.cache  # noqa: B019
    def method(self, name: str, budget: int = K):
        """With the settings of its file, and prepared as run.py does."""
        method = instantiate(settings(name, budget))
        site = method.calibration_options.get("site", "stack")
        method.prepare(self.pipe, self.calibration(site) if method.needs_calibration else None)
        return method

    def latents(self, method=None, which=(0, 1), **call) -> torch.Tensor:
        """Of some prompts, each with a seed of its own, in one batch."""
        prompts, call = [self.family.prompts[i] for i in which], {**self.family.call, "decode": False, **call}
        if method is None:
            return generate(self.pipe, prompts, which, T, **call).latents
        return sample(self.pipe, method, prompts, which, **call).latents


@functools.cache
def case(name: str) -> Case:
    return Case(FAMILIES[name])
