"""The families' pipelines; what many tests need of one is made once."""

import functools

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import dpcache
from dpcache.sampler import generate
from dpcache.session import Report
from helpers.commands import compose
from helpers.families import FAMILIES, Family

T, K = 8, 5


@functools.cache
def settings(method: str, budget: int = K):
    """Of a method that is trained for minutes, those of a trial."""
    found = compose(f"method={method}", f"budget={budget}", f"num_inference_steps={T}")
    return OmegaConf.merge(found.method, found.about.trial)


class Case:
    """A family's pipeline; what many tests need of it is made once."""

    def __init__(self, family: Family):
        self.family, self.pipe = family, family.make()

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """Latents without any cache."""
        return self.latents()

    @functools.cached_property
    def _calibration(self):
        prompts = self.family.prompts[-2:]
        return dpcache.calibrate(self.pipe, prompts, T, (), seeds=[8, 9], **self.family.call)

    def calibration(self, statistics):
        """With these among what was measured."""
        self._calibration.measure(self.pipe, statistics)
        return self._calibration

    def build(self, recipe):
        """The method, as run.py makes it."""
        statistics = recipe.statistics
        return recipe.build(self.pipe, None if statistics is None else self.calibration(statistics))

    @functools.cache  # noqa: B019, cases live as long as the tests
    def method(self, name: str, budget: int = K):
        """With the settings of its file."""
        return self.build(instantiate(settings(name, budget)))

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
