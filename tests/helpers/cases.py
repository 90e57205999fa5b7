"""The families' pipelines; what many tests need of one is made once."""

import functools

import torch
from hydra.utils import instantiate

import dpcache
from dpcache.sampler import generate
from dpcache.session import Report
from helpers.commands import compose
from helpers.families import FAMILIES, Family

T, K = 8, 5


@functools.cache
def settings(method: str, budget: int = K):
    return compose(f"method={method}", f"budget={budget}", f"num_inference_steps={T}").method


class Case:
    """A family's pipeline; what many tests need of it is made once."""

    def __init__(self, family: Family):
        self.family, self.pipe = family, family.make()

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """Latents without any cache."""
        return self.latents()

    @functools.cache  # noqa: B019, cases live as long as the tests
    def calibration(self, **options):
        prompts = self.family.prompts[-2:]
        return dpcache.calibrate(self.pipe, prompts, T, seeds=[8, 9], **options, **self.family.call)

    @functools.cache  # noqa: B019
    def method(self, name: str, budget: int = K):
        """With the settings of its file, and prepared as run.py does."""
        method = instantiate(settings(name, budget))
        calibration = self.calibration(**method.calibration_options) if method.needs_calibration else None
        method.prepare(self.pipe, calibration)
        return method

    def latents(self, which=(0, 1), steps: int = T, **call) -> torch.Tensor:
        """Of some prompts, each with a seed of its own, in one batch."""
        prompts, call = [self.family.prompts[i] for i in which], {**self.family.call, "decode": False, **call}
        return generate(self.pipe, prompts, which, steps, **call).latents

    def run(self, method, which=(0, 1), **call) -> tuple[torch.Tensor, Report]:
        """The same with `method`, and what it reports of it."""
        with dpcache.cached(self.pipe, method):
            latents = self.latents(which, method.num_inference_steps, **call)
            return latents, dpcache.report(self.pipe)


@functools.cache
def case(name: str) -> Case:
    return Case(FAMILIES[name])
