"""The models of a pipeline that a method works on."""

from typing import TYPE_CHECKING, TypeAlias

import torch

from dpcache._diffusers import unwrap_module
from dpcache.errors import SettingError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dpcache.steps import Loop

    Pipe: TypeAlias = DiffusionPipeline | torch.nn.Module | Loop
    """What a method can be enabled on: a pipeline, its transformer alone, or a sampling loop of one's own."""


def denoisers(pipe: "Pipe") -> dict[str, torch.nn.Module]:
    """The transformers (or the U-Net) that a pipeline denoises with, by their names in the pipeline; the name of a
    model without a pipeline is "".

    Raises SettingError if there is none.
    """
    if isinstance(pipe, torch.nn.Module):
        return {"": unwrap_module(pipe)}
    names = ("transformer", "transformer_2", "unconditional_transformer", "unet")
    found = {name: getattr(pipe, name, None) for name in names}
    found = {name: unwrap_module(module) for name, module in found.items() if module is not None}
    if not found:
        raise SettingError(f"{type(pipe).__name__} has neither a transformer nor a unet")
    return found


def denoiser(pipe: "DiffusionPipeline") -> torch.nn.Module:
    """The only one of `denoisers(pipe)`. Raises SettingError where there are more."""
    found = list(denoisers(pipe).values())
    if len(found) > 1:
        raise SettingError(f"this {type(pipe).__name__} has {len(found)} transformers, where one is needed")
    return found[0]
