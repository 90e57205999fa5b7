"""What a process keeps from one job of a sweep for the next: the pipeline, metrics' networks, references.

No result may depend on whether something was loaded for this job or for an earlier one. So a thing that was kept is
used again only for exactly the settings that it was made with, and a pipeline only in the state in which it was loaded.
After an unexpected error nothing is used again.
"""

import copy
import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dpcache.circumstances import fingerprint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

T = TypeVar("T")


class Kept:
    """One thing of each kind, with the settings that it was made with."""

    def __init__(self):
        self._things: dict[str, tuple[str, Any]] = {}

    def get(self, kind: str, settings: object, make: Callable[[], T]) -> T:
        """The thing of this kind, if it was made with the same settings; else it is dropped, and what `make` makes is
        kept in its place. Memory never holds both.

        Args:
            settings: all that `make` depends on, as JSON can hold it.
        """
        key = json.dumps(settings, sort_keys=True, default=str)
        if kind not in self._things or self._things[kind][0] != key:
            self.drop(kind)
            self._things[kind] = key, make()
        return self._things[kind][1]

    def drop(self, kind: str) -> None:
        """Forget it, if there is one."""
        self._things.pop(kind, None)


PROCESS = Kept()
"""Of this process: a sweep's own, or one worker of joblib or Ray."""


class Loaded:
    """A pipeline, and what was made with it; both are dropped together.

    Attributes:
        kept: references and counts of FLOPs.
        fingerprints: of every model in the pipeline, by its name: transformers, text encoders, VAE, ...; as "files"
            also of the other files of a local folder, such as tokenizers.
        too_large: by what was sampled, the smallest batch that did not fit into the device's memory.
    """

    def __init__(self, pipe: "DiffusionPipeline"):
        self.pipe, self.kept, self.too_large = pipe, Kept(), {}
        models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        self.fingerprints = {name: fingerprint(model) for name, model in models.items()}
        self.fingerprints |= _other_files(pipe.name_or_path)
        self._schedulers = {
            name: copy.deepcopy(part) for name, part in pipe.components.items() if hasattr(part, "set_timesteps")
        }

    def restore(self) -> None:
        """Restores the state in which the pipeline was loaded: schedulers carry a state from call to call, and an
        interrupted call leaves models on the device that should be offloaded."""
        self.pipe.maybe_free_model_hooks()
        for name, scheduler in self._schedulers.items():
            setattr(self.pipe, name, copy.deepcopy(scheduler))


def _other_files(folder: str | Path | None) -> dict[str, str]:
    """A digest (16 hex digits) of the files in a pipeline's folder that are not weights: settings of the pipeline,
    tokenizers and image processors. Empty for a pipeline from the hub, where a change has a revision of its own."""
    if folder is None or not Path(folder, "model_index.json").exists():
        return {}
    folder, digest = Path(folder), hashlib.sha256()
    files = [folder / "model_index.json", *(file for kind in _READ for file in folder.glob(f"*/*{kind}"))]
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode() + file.read_bytes())
    return {"files": digest.hexdigest()[:16]}


_READ = (".json", ".txt", ".model", ".jinja")


def free_memory() -> None:
    """Frees memory that nothing refers to any more, on a GPU too. It has no effect while an exception that is being
    handled refers to the memory."""
    gc.collect()
    torch.cuda.empty_cache()
