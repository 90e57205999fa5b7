"""Generated samples on disk: one file per batch, each written atomically, so that a killed run goes on where it was.

A folder of full-step references is shared by every run that needs it; a lock lets one process make it while the
others wait.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from eval.metrics.base import Samples


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` + ".lock": one process at a time, freed by the system if its holder is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, path)


def collect(
    folder: Path,
    prompts: list[str],
    batch_size: int,
    make: Callable[[slice], tuple],
    description: str,
) -> tuple[Samples, list[list[int]]]:
    """Samples for `prompts`, read from `folder` where they are and made where they are not.

    Args:
        make: `make(slice) -> (images uint8 (B, H, W, 3), latents (B, ...), computed steps)` for these prompts.

    Returns:
        All samples, and the computed steps of every batch.
    """
    batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    parts = []
    with locked(folder / "batches"):
        for index, chunk in enumerate(tqdm(batches, desc=description, unit="batch", leave=False)):
            path = folder / f"batch_{index:04d}.safetensors"
            part = _read(path)
            if part is None:
                images, latents, steps = make(chunk)
                arrays = {"images": torch.as_tensor(images).contiguous(), "latents": latents.contiguous()}
                temporary = path.with_name(f".{path.name}.part")
                save_file(arrays, temporary, {"computed": json.dumps(steps)})
                os.replace(temporary, path)
                part = arrays["images"], arrays["latents"], steps
            parts.append(part)
    images, latents, computed = zip(*parts)
    return Samples(torch.cat(images), torch.cat(latents), list(prompts)), list(computed)


def _read(path: Path):
    try:
        with safe_open(path, "pt") as file:
            steps = json.loads(file.metadata()["computed"])
            return file.get_tensor("images"), file.get_tensor("latents"), steps
    except (FileNotFoundError, SafetensorError):  # not there, or damaged: made again
        return None
