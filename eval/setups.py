"""Which runs of a folder can be compared with each other, and names for what sets the others apart."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml

from eval.methods import FULL
from eval.schema import UNHASHED

SHAPING = ("path", "dtype", "vae_dtype", "vae_tiling", "scheduler", "call")
"""Settings of a model that change its full-step samples."""


def name_setups(rows: Iterable[dict]) -> None:
    """Gives every row its `setup`. Runs are compared only with others of the same model, steps and setup.

    Within a setup all runs have the same prompts and settings of the model, and those of one seed the same reference
    and fine reference; runs without a fine reference are comparable with all others. The name is empty where a model
    has a single setup, otherwise it says what differs, as far as the runs' folders tell: `guidance_scale=4`.
    """
    for part in _grouped(rows, lambda row: (row["model"], row["num_inference_steps"])):
        kinds = _kinds(part)
        known = [_known(kind) for kind in kinds] if len(kinds) > 1 else [{}]
        prompts = {(one.get("num_prompts"), one.get("prompts")) for one in known}
        if len({number for number, _ in prompts}) == len(prompts):  # their number tells them apart
            for one in known:
                one.pop("prompts", None)
        named = zip(kinds, _differences(known, ", "))
        for alike in _grouped(named, lambda kind: (kind[1], kind[0][0]["seed"])):
            references = _differences([_references(kind) for kind, _ in alike], ", ")
            for (kind, name), reference in zip(alike, references):
                for row in kind:
                    row["setup"] = ", ".join(filter(None, (name, reference.split(", ")[0])))


def _kinds(rows: Sequence[dict]) -> list[list[dict]]:
    """Runs of the same reference, prompts and fine reference; runs without a fine one are with those that have the only
    one, and after them."""
    fine = defaultdict(set)
    for row in rows:
        fine[row.get("reference")] |= {row.get("fine_reference")} - {None}

    def key(row: dict) -> tuple:
        others = fine[row.get("reference")]
        return row.get("reference"), *(others if len(others) == 1 else [row.get("fine_reference")]), _prompts(row)

    return _grouped(sorted(rows, key=lambda row: row.get("fine_reference") is None), key)


def name_variants(rows: Iterable[dict]) -> None:
    """If runs of different settings share a label, adds the differing settings to it, so that no run hides another.
    Full-step runs keep their labels."""
    by_label = _grouped(rows, lambda row: (row["model"], row["num_inference_steps"], row["setup"], row["label"]))
    for part in by_label:
        if part[0]["method"] == FULL or not any(_clash(place) for place in _grouped(part, _place)):
            continue
        for row, name in zip(part, _differences([_settings(row) for row in part], " ")):
            row["label"] = f"{row['label']} {name}".strip()
        for place in _grouped(part, lambda row: (row["label"], *_place(row))):
            if _clash(place):
                for row in place:
                    row["label"] += f" config_hash={str(row.get('config_hash'))[:6]}"


def _place(row: dict) -> tuple:
    return row["budget"], row["seed"]


def _clash(rows: Sequence[dict]) -> bool:
    return len({row.get("config_hash") for row in rows}) > 1


def _grouped(rows: Iterable, key: Callable) -> list[list]:
    """The rows by key, in the order in which the keys come up."""
    found = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return list(found.values())


def _differences(known: Sequence[dict], separator: str) -> list[str]:
    """For each dictionary, the entries `key=value` whose values differ between the dictionaries that have the key."""
    values = defaultdict(set)
    for one in known:
        for key, value in one.items():
            values[key].add(value)
    return [separator.join(f"{key}={value}" for key, value in one.items() if len(values[key]) > 1) for one in known]


def _prompts(row: dict) -> tuple[int, str] | None:
    """How many prompts a run has, and six digits of a hash of their texts."""
    if texts := row["scores"].get("prompts"):
        return len(texts), hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:6]
    return None


def _references(kind: Sequence[dict]) -> dict[str, str]:
    return {name: str(kind[0].get(name))[:8] for name in ("reference", "fine_reference")}


def _known(kind: Sequence[dict]) -> dict[str, str]:
    """What is known of runs that have the same reference and can differ from runs that have another one."""
    found = next(filter(None, map(_settings, kind)), {})
    prefixes = tuple(f"model.{name}" for name in SHAPING)
    known = {
        key.removeprefix("model.").removeprefix("call."): value
        for key, value in found.items()
        if key.startswith(prefixes)
    }
    if kind[0].get("fine_reference") and (steps := found.get("reference.num_inference_steps")):
        known["reference.num_inference_steps"] = steps
    if size := kind[0].get("batch_size"):
        known["batch_size"] = str(size)
    if prompts := _prompts(kind[0]):
        known["num_prompts"], known["prompts"] = str(prompts[0]), prompts[1]
    return known


def _settings(row: dict) -> dict[str, str]:
    """The settings that shaped a run, as its folder keeps them; empty where they are gone."""
    try:
        text = (Path(row["path"]).parent / ".hydra" / "config.yaml").read_text()
        settings = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        shaping = {key: value for key, value in settings.items() if key not in (*UNHASHED, "budget", "seed")}
    except (OSError, yaml.YAMLError, AttributeError):
        return {}
    return {key.removeprefix("method."): value for key, value in _flat(shaping) if key != "method._target_"}


def _flat(settings: dict, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as they are written on a command line: `model.dtype`, `[psnr,ssim]`."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
            yield f"{prefix}{name}", text.replace('"', "")
