"""The board as files: `leaderboard.csv`, `leaderboard.md` and `report.html`, one page that needs no other file."""

import base64
import hashlib
import io
import json
import logging
import math
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from PIL import Image
from safetensors import SafetensorError, safe_open

from eval.failures import unfinished
from eval.files import write_text
from eval.methods import COLORS, FULL, about, styles
from eval.metrics import MAIN
from eval.pictures import still
from eval.ranks import Difference, board, differences
from eval.results import SETTING, SPEED, WORST, against_full, column, main_metric, metric_names
from eval.schema import Group
from eval.statistics import LEVEL
from eval.statistics import WORST as PERCENTILE
from eval.tables import ranking, table

log = logging.getLogger(__name__)

MEMORY = {"history": "cache memory", "peak_device": "peak device memory", "peak_rss": "peak RSS"}
VERSIONS = ("processor", "python", "torch", "diffusers", "git")
ROOM = 12 * 2**20  # bytes of images on a page, so that a browser still opens it at once
LARGEST, SMALLEST = 512, 128  # pixels on the longer side


def write(folder: str | Path, out: str | Path, frame: pd.DataFrame, prompts: int = 8) -> list[Path]:
    """Writes the three files into `out`, each whole or not at all, and returns their paths.

    Args:
        folder: where the runs are; runs that failed are looked for here.
        frame: `eval.results.collect(folder)`.
        prompts: of how many prompts the page shows images; fewer where they would take more than `ROOM`.
    """
    out, failed, frame = Path(out), unfinished(folder), board(frame, _main(frame))
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "leaderboard.csv": csv(frame, folder),
        "leaderboard.md": markdown(frame, failed),
        "report.html": page(frame, failed, prompts),
    }
    for name, text in files.items():
        write_text(out / name, text)
    return [out / name for name in files]


def _main(frame: pd.DataFrame) -> str:
    return main_metric(frame) or MAIN


def csv(frame: pd.DataFrame, folder: str | Path) -> str:
    """One line per row with every number as it stands in `result.json`; `path` is relative to `folder`."""
    first = ["model", "num_inference_steps", "method", "label", "budget", "computed_steps", "equal_compute", "seed"]
    rest = [name for name in frame if name not in {*first, "scores", "written", "path"}]
    paths = [Path(path).relative_to(folder).as_posix() for path in frame["path"]]
    frame = frame[first + rest].assign(path=paths)
    return frame.map(lambda v: json.dumps(v) if isinstance(v, (list, dict)) else v).to_csv(index=False)


def markdown(frame: pd.DataFrame, failed: list[dict]) -> str:
    """Ranks, a table for every metric and speed, then what readers must know: unequal compute and failed runs."""
    wanted = [*metric_names(frame), *(name for name in (*SPEED, "computed_steps") if name in frame)]
    parts = ["# Leaderboard", *filter(None, [ranking(frame, _main(frame))]), *(table(frame, name) for name in wanted)]
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
    names, main = [name for name in metric_names(frame) if name in frame], _main(frame)
    parts = [list(part.itertuples()) for _, part in frame.groupby([*SETTING, "seed"])]
    items = [_items(part, prompts, main) for part in parts]
    images, apart, boards = _Images((len(frame) + len(parts)) * prompts), differences(frame, main), []
    shown = {index: [] for index in frame.index}
    references = _embed(parts, items, images, shown, prompts)
    for part, its, (reference, other) in zip(parts, items, references):
        boards.append(
            {
                "model": part[0].model,
                "steps": int(part[0].num_inference_steps),
                "setup": part[0].setup,
                "seed": int(part[0].seed),
                "prompts": [prompt for _, prompt in its],
                "reference": reference,
                "runs": [
                    _run(row, names, main, its, len(reference), apart[row.Index])
                    | {"images": shown[row.Index], "other_reference": row.Index in other}
                    for row in part
                ],
            }
        )
    versions = [name for name in VERSIONS if name in frame]
    machines = frame[versions].fillna("unknown").drop_duplicates()
    return {
        "written": f"{datetime.fromtimestamp(frame['written'].max(), UTC):%Y-%m-%d}",
        "full": FULL,
        "metrics": [_metric(name) | {"main": name == main} for name in names],
        "level": LEVEL,
        "percentile": PERCENTILE,
        "memory": {name: label for name, label in MEMORY.items() if name in frame and frame[name].notna().any()},
        "methods": _styles(frame),
        "groups": {group.value: COLORS[group] for group in Group if group.value in set(frame["group"])},
        "machines": sorted(", ".join(f"{n} {row[n]}" for n in versions) for row in machines.to_dict("records")),
        "processors": len(set(machines.get("processor", []))),
        "boards": boards,
        "images": list(images.uris),
        "lossless": images.lossless,
        "failed": failed,
    }


def _items(part: list, worst: int, main: str) -> list[tuple[int, str]]:
    """Position and text of the prompts of one setting and seed. Prompts that most runs have come first; among these,
    the prompts that are among the `worst` ones of most runs by the `main` metric.

    The same position means the same noise, so runs can be compared on every item that they share.
    """
    common, bad, sign = Counter(), Counter(), 1 if column(main).higher_is_better else -1
    for row in part:
        items = list(enumerate(row.scores.get("prompts", [])))
        common.update(items)
        if row.method != FULL and main in row.scores:
            bad.update(sorted(items, key=lambda item: sign * row.scores[main][item[0]])[:worst])
    return sorted(common, key=lambda item: (-common[item], -bad[item], item))


def _run(
    row, names: list[str], main: str, items: list[tuple[int, str]], shown: int, apart: dict[str, Difference]
) -> dict:
    """What the page says about one run, apart from its images. Scores are in the order of `items`: those of the `main`
    metric for all items, those of other metrics for the first `shown` items, which have images."""
    total = int(row.num_inference_steps)
    unavailable, batches = getattr(row, "metrics_unavailable", None), getattr(row, "schedules", None)
    cost = getattr(row, "calibration_trajectories", None)
    grid = int(row.budget) if about(row.method).own_grid else total
    counts = Counter(step for batch in batches for step in batch) if isinstance(batches, list) else {}
    return {
        "label": row.label,
        "group": row.group,
        "full": row.method == FULL,
        "budget": int(row.budget),
        "computed": _number(row.computed_steps),
        "equal": bool(row.equal_compute),
        "rank": None if pd.isna(row.rank) else int(row.rank),
        "n": max((int(n) for name in names if (n := _number(getattr(row, f"{name}_n"))) is not None), default=None),
        "metrics": {
            name: [_number(getattr(row, end, None)) for end in (name, f"{name}_lo", f"{name}_hi", f"{name}{WORST}")]
            for name in names
        },
        "apart": {group: [d.label, *map(_number, d[1:])] for group, d in apart.items()},
        "unavailable": unavailable if isinstance(unavailable, dict) else {},
        "speed": {name: _number(getattr(row, name, None)) for name in (*SPEED, "flops_speedup")},
        "unreliable": reason if isinstance(reason := getattr(row, "unreliable", None), str) else None,
        "memory": {name: _number(getattr(row, name, None)) for name in MEMORY},
        "calibration": {name: _number(value) for name, value in cost.items()} if isinstance(cost, dict) else None,
        "schedule": [round(counts.get(step, 0) / len(batches), 3) for step in range(grid)] if counts else [],
        "command": row.command if isinstance(row.command, str) else None,
        "scores": {
            name: [
                _number(values[item[0]]) if _has(row, item) else None
                for item in items[: None if name == main else shown]
            ]
            for name, values in row.scores.items()
            if name != "prompts"
        },
    }


class _Images:
    """Images as data URIs, each stored once, and so small that all of them together take no more than `ROOM`."""

    def __init__(self, expected: int):
        self.share, self.uris, self.taken, self.lossless = ROOM / max(expected, 1), {}, 0, True

    def add(self, image: Image.Image | None) -> int | None:
        """The image's place among the `uris`."""
        if image is None:
            return None
        image, file = image.convert("RGB"), io.BytesIO()
        lossless = max(image.size) <= LARGEST // 2 and 2 * math.prod(image.size) <= self.share  # bytes
        side = min(max(round(math.sqrt(4 * self.share)), SMALLEST), LARGEST)  # a quarter of a byte for a pixel
        if not lossless:
            image.thumbnail((side, side))
        image.save(file, "WEBP", lossless=lossless, quality=85)
        uri = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
        self.lossless &= lossless
        self.taken += len(uri) * (uri not in self.uris)
        return self.uris.setdefault(uri, len(self.uris))


def _embed(parts: list, items: list, images: _Images, shown: dict, prompts: int) -> list[tuple[list, set]]:
    """Puts the images of the first `prompts` of every part's items into `shown`, prompt by prompt as long as there is
    room. Returns of every part the full-step images and the indices of rows that were compared with others."""
    references = [([], set()) for _ in parts]
    files = {row.Index: _files(Path(row.path).parent) for part in parts for row in part}
    for place in range(prompts):
        if images.taken * (place + 1) > ROOM * max(place, 1):
            break
        for part, its, (reference, others) in zip(parts, items, references):
            if place < len(its):
                index, stored, first = its[place][0], {}, None
                for row in part:
                    name, own, against = getattr(row, "reference", None), None, None
                    if _has(row, its[place]):
                        own = against = images.add(_image(files[row.Index].get(index)))
                        if row.method != FULL:
                            if name not in stored:
                                stored[name] = images.add(_reference(Path(row.path).parent, name, index))
                            against = stored[name]
                    shown[row.Index].append(own)
                    first = against if first is None else first
                    if against not in (None, first):
                        others.add(row.Index)
                reference.append(first)
    return references


def _has(row, item: tuple[int, str]) -> bool:
    """Whether a run sampled a prompt at this position."""
    index, prompt = item
    return row.scores.get("prompts", [])[index : index + 1] == [prompt]


def _metric(name: str) -> dict:
    """What the page must know about a metric; "higher": whether that is better, None where this is not known."""
    known = column(name)
    return {
        "name": name,
        "label": known.title[:1].upper() + known.title[1:],
        "short": known.label,
        "unit": known.unit and f" {known.unit}",
        "higher": known.higher_is_better,
        "trivial": against_full(name),
    }


def _styles(frame: pd.DataFrame) -> dict[str, dict]:
    """Of every label, in the order of the board: its colours, its shape, and what its method is."""
    found = {}
    for label, style in styles(frame["label"]).items():
        known = about(label)
        says = ", ".join(str(part) for part in (known.title, known.year) if part)
        found[label] = style._asdict() | {"about": says, "paper": known.paper}
    return found


def _number(value) -> float | None:
    """A number rounded to eight digits: more than its accuracy, and half as long as all digits."""
    return float(f"{value:.8g}") if isinstance(value, (int, float)) and math.isfinite(value) else None


def _files(folder: Path) -> dict[int, Path]:
    """A run's images by the position of their prompts."""
    paths = (folder / "images").glob("*.png")
    return {int(found[0]): path for path in paths if (found := re.match(r"\d+(?=-)", path.name))}


def _image(path: Path | None) -> Image.Image | None:
    """An image that a run has kept. One that cannot be read is named, and left out."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError) as error:  # all three of PIL, for different kinds of damage
        log.warning("left out of the report: %s cannot be read: %s", path, error)
        return None


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
