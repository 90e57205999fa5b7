"""Arguments of a module's call, which a caller may give by place or by name."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from dpcache._diffusers import unwrap_module


def argument_names(module: torch.nn.Module) -> list[str]:
    """The names of the arguments of the class's `forward`; the module itself may have another `forward`."""
    return list(inspect.signature(type(unwrap_module(module)).forward).parameters)[1:]


def argument(place: int, name: str, args: tuple, kwargs: Mapping) -> Any:
    """An argument of a call, by name or by place."""
    return kwargs[name] if name in kwargs else args[place]
