"""What the coverage test knows of a pipeline class: how to build a tiny one with random weights, and how to call it.

A module of this package adds its pipelines with `pipeline(...)`, and with `unbuilt(...)` those that it does not build.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from unittest import mock

import diffusers
import torch

STEPS = 5  # of a call that does not say so itself


@dataclass(frozen=True)
class Case:
    """One way to call a pipeline.

    Attributes:
        arguments: of the call, besides `generator`, `num_inference_steps` and `output_type`, which `Record.call` adds
            where the pipeline takes them and they are not given.
        calls: how often a step calls a transformer, all of the pipeline's transformers together; None: not every step
            alike.
    """

    arguments: Mapping
    calls: int | None


@dataclass(frozen=True)
class Record:
    """A pipeline class of diffusers.

    Attributes:
        name: of the class; after a comma, which of several records of the class.
        builder: makes a tiny pipeline of the class that it is given.
        cases: ways to call it, by name: "plain" without guidance, "guided" with a negative prompt, and others.
        patches: what stands in for names of the class's module during a call, where these ask for large pictures.
    """

    name: str
    builder: Callable[[type], diffusers.DiffusionPipeline]
    cases: Mapping[str, Case]
    patches: Mapping[str, object]

    @property
    def kind(self) -> str:
        """The name of the class."""
        return self.name.partition(",")[0]

    def build(self) -> diffusers.DiffusionPipeline:
        """The same weights each time, none of them zero."""
        torch.manual_seed(0)
        pipe = self.builder(getattr(diffusers, self.kind))
        pipe.set_progress_bar_config(disable=True)
        for name, component in pipe.components.items():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
                if "transformer" in name or "controlnet" in name:
                    fill(component)
        return pipe

    def call(self, pipe, case: str):
        """The pipeline's output, from the same noise each time."""
        arguments = {"num_inference_steps": STEPS, "output_type": "latent", "generator": torch.Generator()}
        known = inspect.signature(type(pipe).__call__).parameters
        arguments = {name: value for name, value in arguments.items() if name in known}
        arguments |= copy.deepcopy(dict(self.cases[case].arguments))
        torch.manual_seed(0)
        if isinstance(arguments.get("generator"), torch.Generator):
            arguments["generator"].manual_seed(0)
        with torch.no_grad(), mock.patch.dict(vars(sys.modules[type(pipe).__module__]), self.patches):
            return pipe(**arguments)


PIPELINES: dict[str, Record] = {}
UNBUILT: dict[str, str] = {}


def pipeline(name: str, builder: Callable, patches: Mapping[str, object] | None = None, **cases: Case) -> None:
    """Add the pipeline class `name`, see `Record`. Raises ValueError if it is there already."""
    if name in PIPELINES or name in UNBUILT:
        raise ValueError(f"{name} has two records")
    PIPELINES[name] = Record(name, builder, cases, patches or {})


def unbuilt(name: str, reason: str) -> None:
    """Say why the pipeline class `name` is not built. Raises ValueError if it has a record."""
    if name in PIPELINES or name in UNBUILT:
        raise ValueError(f"{name} has two records")
    UNBUILT[name] = reason


def fill(module: torch.nn.Module) -> None:
    """Weights that are zero at first, such as those of output layers and gates, and weights that are not set at all
    become random: else a wrong prediction could not be seen."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        largest = parameter.abs().max().item() if parameter.numel() else 1.0
        if not 0 < largest < 100:  # also where it is not a number
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)


def classes() -> list[str]:
    """The names of diffusers' pipeline classes that take a transformer."""
    found = []
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if "Pipeline" in name else None
        if not (inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline)):
            continue
        if any("transformer" in parameter for parameter in inspect.signature(kind.__init__).parameters):
            found.append(name)
    return found


def assemble(kind: type, **parts) -> diffusers.DiffusionPipeline:
    """A pipeline of these parts, without those that `kind` does not take; whatever else it has to have is None."""
    parameters = inspect.signature(kind.__init__).parameters
    needed = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty and name != "self"]
    return kind(**dict.fromkeys(needed) | {name: part for name, part in parts.items() if name in parameters})
