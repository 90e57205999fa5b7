"""The board as files: `leaderboard.csv`, `leaderboard.md` and `report.html`, one page that needs no other file."""

import base64
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from PIL import Image
from safetensors import SafetensorError, safe_open

from eval.failures import unfinished
from eval.files import write_text
from eval.methods import FULL, about, order, styles
from eval.metrics import MAIN
from eval.pictures import still
from eval.results import SETTING, SPEED, against_full, column, metric_names, newest
from eval.statistics import LEVEL
from eval.tables import table

MEMORY = {"history": "cache memory", "peak_device": "peak device memory", "peak_rss": "peak RSS"}
VERSIONS = ("processor", "python", "torch", "diffusers", "git")
LARGEST = 512  # pixels on the longer side; larger images would make a page of hundreds of megabytes


def write(folder: str | Path, out: str | Path, frame: pd.DataFrame, prompts: int = 8) -> list[Path]:
    """Writes the three files into `out`, each whole or not at all, and returns their paths.

    Args:
        folder: where the runs are; runs that failed are looked for here.
        frame: `eval.results.collect(folder)`.
        prompts: rows of the image wall, which make up most of the page's size.
    """
    out, failed, frame = Path(out), unfinished(folder), board(frame)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "leaderboard.csv": csv(frame, folder),
        "leaderboard.md": markdown(frame, failed),
        "report.html": page(frame, failed, prompts),
    }
    for name, text in files.items():
        write_text(out / name, text)
    return [out / name for name in files]


def board(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the board: of repeated runs the newest, with `equal_compute`, false where the computed steps are not
    the budget.

    `full` has no budget: it is one row per setting and seed, with all T steps as its budget.
    """
    full = frame["method"] == FULL
    frame = newest(frame.assign(budget=frame["budget"].where(~full, frame["num_inference_steps"])))
    frame = frame.assign(equal_compute=(frame["computed_steps"] - frame["budget"]).abs() <= 0.5)
    return frame.loc[_order(frame, [*SETTING, "budget"])]


def _order(frame: pd.DataFrame, first: list[str]) -> list:
    """The frame's index sorted by the columns `first`, then by method."""
    rows = {r.Index: (*(getattr(r, c) for c in first), order(r.label), r.seed) for r in frame.itertuples()}
    return sorted(rows, key=rows.get)


def csv(frame: pd.DataFrame, folder: str | Path) -> str:
    """One line per row with every number as it stands in `result.json`; `path` is relative to `folder`."""
    first = ["model", "num_inference_steps", "method", "label", "budget", "computed_steps", "equal_compute", "seed"]
    rest = [name for name in frame if name not in {*first, "scores", "written", "path"}]
    paths = [Path(path).relative_to(folder).as_posix() for path in frame["path"]]
    frame = frame[first + rest].assign(path=paths)
    return frame.map(lambda v: json.dumps(v) if isinstance(v, (list, dict)) else v).to_csv(index=False)


def markdown(frame: pd.DataFrame, failed: list[dict]) -> str:
    """A table for every metric and speed, then what readers must know: unequal compute and failed runs."""
    wanted = [*metric_names(frame), *(name for name in (*SPEED, "computed_steps") if name in frame)]
    parts = ["# Leaderboard", *(table(frame, name) for name in wanted)]
    if unequal := [
        f"- {r.label}, K = {r.budget}: {r.computed_steps:g} steps computed, not at equal compute"
        for r in frame[~frame["equal_compute"]].itertuples()
    ]:
        parts += ["### Unequal compute", "\n".join(unequal)]
    if failed:
        lines = (f"- {f['run']}: {'unfinished' if f['error'] is None else _code(f['error'])}" for f in failed)
        parts += ["### Failed", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def page(frame: pd.DataFrame, failed: list[dict], prompts: int) -> str:
    """The report: the template `report.html` with the data in it."""
    text = json.dumps(_data(frame, failed, prompts), allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # nothing in a prompt or an error can end the element that holds the data
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # the only script that may run
    return template.replace("{{script}}", f"sha256-{digest}").replace("{{data}}", text)


def _data(frame: pd.DataFrame, failed: list[dict], prompts: int) -> dict:
    names, images, walls, runs = [name for name in metric_names(frame) if name in frame], {}, [], {}

    def embed(image: Image.Image | None) -> int | None:
        return None if image is None else images.setdefault(_uri(image), len(images))

    for (model, steps, seed), part in frame.groupby([*SETTING, "seed"]):
        wall, shown = _wall(part, embed, prompts)
        walls.append({"model": model, "steps": int(steps), "seed": int(seed)} | wall)
        runs |= {row.Index: _run(row, names) | shown[row.Index] for row in part.itertuples()}
    versions = [name for name in VERSIONS if name in frame]
    machines = frame[versions].fillna("unknown").drop_duplicates()
    return {
        "written": f"{datetime.fromtimestamp(frame['written'].max(), UTC):%Y-%m-%d}",
        "full": FULL,
        "metrics": [_metric(name) for name in names],
        "level": LEVEL,
        "memory": {name: label for name, label in MEMORY.items() if name in frame and frame[name].notna().any()},
        "methods": _styles(frame),
        "machines": sorted(", ".join(f"{n} {row[n]}" for n in versions) for row in machines.to_dict("records")),
        "processors": len(set(machines.get("processor", []))),
        "walls": walls,
        "runs": [runs[index] for index in frame.index],
        "images": list(images),
        "failed": failed,
    }


def _wall(part: pd.DataFrame, embed: Callable, prompts: int) -> tuple[dict, dict]:
    """Of runs of one setting and seed: the prompts and reference images of the wall, and every run's images and scores
    in the same order."""
    # The same position in the prompt list means the same noise, so a row of the wall is a position and a prompt.
    held = {row.Index: list(enumerate(_scores(row).get("prompts", []))) for row in part.itertuples()}
    common = Counter(item for items in held.values() for item in items)
    rows = sorted(sorted(common, key=lambda item: (-common[item], item))[:prompts])
    reference, stored, shown = [None] * len(rows), {}, {}
    for row in part.itertuples():
        folder, name, has = Path(row.path).parent, getattr(row, "reference", None), set(held[row.Index])
        places = {place: item[0] for place, item in enumerate(rows) if item in has}
        images = {place: embed(_sample(folder, index)) for place, index in places.items()}
        for index in places.values():
            if (name, index) not in stored:
                stored[name, index] = embed(_reference(folder, name, index))
        against = images if row.method == FULL else {p: stored[name, index] for p, index in places.items()}
        for place, image in against.items():
            reference[place] = image if reference[place] is None else reference[place]
        shown[row.Index] = {
            "images": [images.get(place) for place in range(len(rows))],
            "other_reference": any(i is not None and i != reference[place] for place, i in against.items()),
            "scores": {
                name: [_number(values[places[place]]) if place in places else None for place in range(len(rows))]
                for name, values in _scores(row).items()
                if name != "prompts"
            },
        }
    return {"prompts": [prompt for _, prompt in rows], "reference": reference}, shown


def _run(row, names: list[str]) -> dict:
    """What the page says about one run, apart from its images."""
    total = int(row.num_inference_steps)
    unavailable = getattr(row, "metrics_unavailable", None)
    batches = getattr(row, "schedules", None)
    grid = int(row.budget) if about(row.method).own_grid else total
    counts = Counter(step for batch in batches for step in batch) if isinstance(batches, list) else {}
    return {
        "model": row.model,
        "steps": total,
        "method": row.method,
        "label": row.label,
        "full": row.method == FULL,
        "budget": int(row.budget),
        "computed": _number(row.computed_steps),
        "equal": bool(row.equal_compute),
        "seed": int(row.seed),
        "n": max((int(n) for name in names if (n := _number(getattr(row, f"{name}_n"))) is not None), default=None),
        "metrics": {
            name: [_number(getattr(row, column)) for column in (name, f"{name}_lo", f"{name}_hi")] for name in names
        },
        "unavailable": unavailable if isinstance(unavailable, dict) else {},
        "speed": {name: _number(getattr(row, name, None)) for name in SPEED},
        "unreliable": reason if isinstance(reason := getattr(row, "unreliable", None), str) else None,
        "memory": {name: _number(getattr(row, name, None)) for name in MEMORY},
        "schedule": [round(counts.get(step, 0) / len(batches), 3) for step in range(grid)] if counts else [],
    }


def _metric(name: str) -> dict:
    """What the page must know about a metric; "higher": whether that is better, None where this is not known."""
    title, higher = column(name).title, column(name).higher_is_better
    return {
        "name": name,
        "label": title[:1].upper() + title[1:],
        "higher": higher,
        "trivial": against_full(name),
        "main": name == MAIN,
    }


def _styles(frame: pd.DataFrame) -> dict[str, dict]:
    """Of every label, in the order of the board: its colours, its shape, and what its method is."""
    found = {}
    for label, style in styles(frame["label"]).items():
        known = about(label)
        says = [str(part) for part in (known.title, known.year, known.paper) if part]
        found[label] = style._asdict() | {"about": ", ".join(says)}
    return found


def _number(value) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _scores(row) -> dict:
    return row.scores if isinstance(row.scores, dict) else {}


def _sample(folder: Path, index: int) -> Image.Image | None:
    path = next((folder / "images").glob(f"{index:04d}-*.png"), None)
    return path and Image.open(path)


def _reference(folder: Path, name, index: int) -> Image.Image | None:
    """The full-step image that a run was compared with, from the shared store that its `result.json` names."""
    if not isinstance(name, str):  # of a result from before they named it
        return None
    for parent in folder.parents:
        for path in sorted((parent / "references" / Path(name).name).glob("batch_*.safetensors")):
            try:
                with safe_open(path, "np") as file:
                    images = file.get_slice("images")
                    count = images.get_shape()[0]
                    if index < count:
                        return Image.fromarray(still(images[index : index + 1][0]))
            except SafetensorError:  # damaged: the next run makes it again
                return None
            index -= count
    return None


def _uri(image: Image.Image) -> str:
    """The image as a data URI, without loss while it is small."""
    small, file = max(image.size) <= LARGEST // 2, io.BytesIO()
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST))
    image.save(file, "WEBP", lossless=small, quality=90)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
