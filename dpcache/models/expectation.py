"""Checks of embedded models: a file beside the weights holds a few numbers that the model should produce for one prompt
on few steps.

Some versions of the libraries load a component wrongly without a message. The check finds this before such a model is
used. `python scripts/expectations.py` writes the files.
"""

import copy
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dpcache.errors import SettingError
from dpcache.sampler import generate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FILE = "expectation.json"
# Of the norm of the expected values. In float32 other machines and versions differ by 1e-5, and where pixels are
# rounded by up to 4e-3; a text encoder with one wrong matrix by 0.7 and more.
TOLERANCE = 0.005
NUMBERS = 64  # of each output that are kept


def make(pipe: "DiffusionPipeline", settings: dict) -> dict[str, np.ndarray]:
    """The final latents and the image (pixels from 0 to 255) of one prompt, in float32 on the CPU, whatever the
    pipeline's dtype. The pipeline stays as it is.

    Args:
        settings: `prompt`, `seed`, `num_inference_steps` and `call`, further arguments of the pipeline.
    """
    pipe = copy.deepcopy(pipe)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.float(part.cpu())  # diffusers' own warns of parts that are kept in float32 anyway
    pipe.set_progress_bar_config(disable=True)
    batch = generate(
        pipe, [settings["prompt"]], [settings["seed"]], settings["num_inference_steps"], **settings["call"]
    )
    return {"latents": batch.latents.numpy(), "image": batch.images}


def check(folder: Path, made: Callable[[dict], dict[str, np.ndarray]]) -> None:
    """Compare what a model has made with what the file in its folder expects; without such a file do nothing.

    Args:
        made: gives the outputs by name, for the settings in the file.

    Raises SettingError if an output is missing, has another size, or deviates by more than `TOLERANCE`.
    """
    if not (folder / FILE).is_file():
        return
    expected = json.loads((folder / FILE).read_text())
    outputs = made(expected["settings"])
    for name, values in expected["outputs"].items():
        values, output = np.array(values), _some(outputs[name])
        error = np.linalg.norm(output - values) / np.linalg.norm(values) if output.shape == values.shape else np.inf
        if not error <= TOLERANCE:  # also where it is not a number
            raise SettingError(
                f"{folder.name} is loaded wrongly here: its {name} of the prompt {expected['settings']['prompt']!r} "
                f"deviate by {error:.2g} from what {FILE} beside its weights expects, more than {TOLERANCE}. "
                f"Here: {_versions()}; expected with: {expected['versions']}. "
                "Install versions that pyproject.toml allows; after a new training: python scripts/expectations.py"
            )


def write(folder: Path, settings: dict, outputs: dict[str, np.ndarray]) -> None:
    """Leave the file for `check` in `folder`."""
    numbers = {name: [float(f"{value:.5g}") for value in _some(output)] for name, output in outputs.items()}
    text = json.dumps({"settings": settings, "versions": _versions(), "outputs": numbers}, indent=1)
    (folder / FILE).write_text(text + "\n")


def _some(output: np.ndarray) -> np.ndarray:
    """Values from all over an array, as many as are kept."""
    flat = np.asarray(output, dtype=np.float64).ravel()
    return flat[np.linspace(0, flat.size - 1, min(NUMBERS, flat.size)).astype(int)]


def _versions() -> str:
    return ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "diffusers", "transformers"))
