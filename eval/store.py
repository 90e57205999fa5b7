"""Generated samples on disk: one file per batch, each written atomically, so that a killed run can continue where it
stopped.

Processes that need the same batches (jobs of a sweep with the same reference, or one run under `accelerate launch`)
share the work through these files alone: each batch has a lock, and the process that holds it makes the batch.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from dpcache.errors import SettingError
from dpcache.prompts import Prompt, identity
from eval.files import atomic
from eval.metrics.base import Samples


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` + ".lock": one process at a time, freed by the system if its holder is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


def load_or_make(
    folder: Path,
    prompts: list[str],
    batch_size: int,
    make: Callable[[slice], tuple],
    description: str,
) -> tuple[Samples, list]:
    """Samples for `prompts`: batches that are in `folder` are read, the others are made. Batches of another size are
    removed; a run that ran out of memory and was then killed may have left them.

    Args:
        make: `make(slice) -> (images uint8 (B, ...), latents (B, ...), record)` for these prompts. The record holds
            further facts about the batch, as JSON can hold them.

    Returns:
        All samples, and every batch's record.

    Raises SettingError if the folder holds samples of other prompts or images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("batch_*.safetensors"):
        if _read_batch_size(path, batch_size) != batch_size:
            path.unlink(missing_ok=True)
    check_prompts(folder, prompts, batch_size)
    starts = range(0, len(prompts), batch_size)
    batches = {_batch(folder, index): slice(start, start + batch_size) for index, start in enumerate(starts)}
    for patience in (0, -1):  # first the batches that no other process makes, then wait for those that others make
        for path, chunk in tqdm(batches.items(), desc=description, unit="batch", leave=False):
            if not _whole(path):
                with suppress(Timeout), FileLock(f"{path}.lock", timeout=patience):
                    if not _whole(path):
                        images, latents, steps = make(chunk)
                        arrays = {"images": torch.as_tensor(images).contiguous(), "latents": latents.contiguous()}
                        # As tensors, because safetensors writes several entries of metadata in any order.
                        arrays["made_from"] = torch.frombuffer(_made_from(prompts[chunk]), dtype=torch.uint8)
                        arrays["batch_size"] = torch.tensor(batch_size)
                        with atomic(path) as part:
                            save_file(arrays, part, {"computed": json.dumps(steps)})
                    Path(f"{path}.lock").unlink(
                        missing_ok=True
                    )  # a process that waits for the lock then finds the batch
    return _read(list(batches), prompts)


def stored(folder: Path, prompts: list[str]) -> Samples:
    """The samples that `load_or_make` has written to `folder`. Raises FileNotFoundError unless they are complete."""
    paths = [_batch(folder, index) for index in range(len(list(folder.glob("batch_*.safetensors"))))]
    missing = [path.name for path in paths if not _whole(path)]
    if missing or not paths:
        raise FileNotFoundError(f"{folder} has no {'samples' if not paths else f'whole {missing[0]}'}")
    try:
        return _read(paths, prompts)[0]
    except ValueError:  # another number of them than of prompts
        raise FileNotFoundError(f"{folder} does not hold the samples of all {len(prompts)} prompts") from None


def check_prompts(folder: Path, prompts: list[str], batch_size: int) -> None:
    """Raises SettingError if a batch in the folder was made from other prompts or images than these.

    Args:
        prompts: for prompts without images only the text is compared; results hold all prompts in this form.
        batch_size: for batches that do not record it, because an earlier version made them.
    """
    with_images = any(isinstance(prompt, Prompt) for prompt in prompts)
    for path in sorted(folder.glob("batch_*.safetensors")):
        if _whole(path):
            index, size = int(path.stem.removeprefix("batch_")), _read_batch_size(path, batch_size)
            with safe_open(path, "np") as file:
                known = file.get_tensor("made_from").tobytes() if "made_from" in set(file.keys()) else None
            known = json.loads(known or "null")
            if known is not None and not with_images:
                known = [prompt if isinstance(prompt, str) else prompt[0] for prompt in known]
            if known not in (None, identity(prompts[index * size : (index + 1) * size])):
                raise SettingError(
                    f"{path} was made from other prompts or images: its command with overwrite=true makes it again"
                )


def _made_from(prompts: list[str]) -> bytearray:
    return bytearray(json.dumps(identity(prompts)).encode())


def _batch(folder: Path, index: int) -> Path:
    return folder / f"batch_{index:04d}.safetensors"


def _whole(path: Path) -> bool:
    """Whether the batch is there and not damaged."""
    try:
        with safe_open(path, "np") as file:
            return "computed" in (file.metadata() or {})
    except (FileNotFoundError, SafetensorError):
        return False


def _read_batch_size(path: Path, unknown: int) -> int:
    """How many samples a batch has if it is not the last one; `unknown` where the file is damaged or does not say."""
    try:
        with safe_open(path, "np") as file:
            return int(file.get_tensor("batch_size")) if "batch_size" in set(file.keys()) else unknown
    except (FileNotFoundError, SafetensorError):
        return unknown


def _read(paths: Sequence[Path], prompts: list[str]) -> tuple[Samples, list]:
    computed = []
    for path in paths:
        with safe_open(path, "np") as file:
            computed.append(json.loads(file.metadata()["computed"]))
    return Samples(_joined(paths, "images"), _joined(paths, "latents"), list(prompts)), computed


def _joined(paths: Sequence[Path], name: str) -> torch.Tensor:
    """The batches' tensors as one, in an unnamed temporary file, so that it need not fit into memory."""
    shapes = []
    for path in paths:
        with safe_open(path, "np") as file:
            shapes.append(file.get_slice(name).get_shape())
            dtype = file.get_slice(name)[:0].dtype
    with tempfile.TemporaryFile(dir=paths[0].parent) as file:
        whole = np.memmap(file, dtype, "w+", shape=(sum(shape[0] for shape in shapes), *shapes[0][1:]))
    end = 0
    for path, shape in zip(paths, shapes, strict=True):
        begin, end = end, end + shape[0]
        with safe_open(path, "np") as file:
            whole[begin:end] = file.get_tensor(name)
    return torch.from_numpy(whole)
