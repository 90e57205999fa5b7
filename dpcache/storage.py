"""A method as one file: its parts with all their settings, in safetensors, never pickle.

A part is a frozen dataclass, so only its fields are stored: numbers and names as JSON in the file's metadata, arrays as
tensors of the file. One file may hold a method for each of several budgets.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dpcache.errors import SettingError

_KIND = "method 1"
_PACKAGES = ("dpcache", "baselines")  # whose classes a file may name; others have to be imported before it is loaded


def write(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """One safetensors file, atomically; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part, dict(metadata))
    os.replace(part, path)


def read(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file whose "format" in the metadata is `dpcache` and `kind`.

    Raises FileNotFoundError if there is no file, ValueError if it has another format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{kind.split()[0]} file {path} does not exist")
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != f"dpcache {kind}":
        raise ValueError(f"its format is {metadata.get('format')!r}, not 'dpcache {kind}'")
    return load_file(path), metadata


def save(methods: Mapping[int, object], path: str | Path) -> None:
    """Write methods, by budget, to one file, atomically.

    Raises SettingError for a part that is no dataclass of plain values.
    """
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps({str(budget): _plain(method, arrays) for budget, method in methods.items()})
    write(path, arrays or {"none": np.zeros(0)}, {"format": f"dpcache {_KIND}", "methods": text})


def load(path: str | Path) -> dict[int, object]:
    """The methods in a file, by budget.

    Raises SettingError if it is no such file or names a class that is not known here, FileNotFoundError if there is
    none.
    """
    try:
        arrays, metadata = read(path, _KIND)
        return {int(budget): _object(made, arrays) for budget, made in json.loads(metadata["methods"]).items()}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise SettingError(f"{path} is not a method file: {error}") from None


def _plain(value, arrays: dict[str, np.ndarray]):
    """`value` as JSON holds it; its arrays are added to `arrays`."""
    if is_dataclass(value):
        kind = next(kind for kind in type(value).__mro__ if "__dataclass_fields__" in vars(kind))
        below = type(value).__mro__[: type(value).__mro__.index(kind)]
        if lost := {name for part in below for name in vars(part) if not name.startswith("_")}:
            raise SettingError(
                f"{type(value).__name__} cannot be stored in a method file, which would lose its "
                f"{', '.join(sorted(lost))}: make it a dataclass"
            )
        settings = {field.name: _plain(getattr(value, field.name), arrays) for field in fields(kind) if field.init}
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "settings": settings}
    if isinstance(value, np.ndarray):
        name = f"array{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {"pairs": [[_plain(key, arrays), _plain(item, arrays)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, arrays) for item in value]}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item, arrays) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise SettingError(f"a {type(value).__name__} cannot be stored in a method file: parts are dataclasses of values")


def _object(value, arrays: dict[str, np.ndarray]):
    """What `_plain` was given."""
    if isinstance(value, list):
        return [_object(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_object(item, arrays) for item in value["tuple"])
    if "array" in value:
        return arrays[value["array"]]
    if "pairs" in value:
        return {_object(key, arrays): _object(item, arrays) for key, item in value["pairs"]}
    kind = _part(value["class"])
    return kind(**{name: _object(item, arrays) for name, item in value["settings"].items()})


def _part(name: str) -> type:
    """The dataclass of that name. Nothing else is ever called."""
    module, _, kind = name.partition(":")
    if module.split(".")[0] in _PACKAGES:
        import_module(module)
    found = getattr(sys.modules.get(module), kind, None)
    if not (isinstance(found, type) and is_dataclass(found)):
        raise ValueError(f"it names {name}, which is not known here: import its module first")
    return found
