"""Prompts from a local file or a known set, with their images if the model takes images."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpcache.errors import SettingError
from dpcache.prompts import Prompt

ROOT = Path(__file__).parents[1]
COLUMNS = ("prompt", "prompts", "caption", "captions", "text")
"""Names of the column that holds the prompts, in any case; the first of these that a file has."""

SETS = {
    "drawbench": ("sayakpaul/drawbench", "train", "Prompts"),
    "partiprompts": ("nateraw/parti-prompts", "train", "Prompt"),
    "coco": ("phiyodr/coco2017", "validation", "captions"),
}
"""Known sets as (repository on the hub, split, column): DrawBench's 200 prompts, PartiPrompts, and the captions of
MS-COCO's validation images, the first one of each image."""


def read(setting: str, source: str | Path, images: Sequence[str] = ()) -> list[str]:
    """The prompts of a file (txt: one a line; csv, tsv, jsonl: in one of `COLUMNS`), or of one of `SETS`. A relative
    path is looked up in the current folder, and then in the project's.

    Args:
        setting: the name under which the user gave `source`, for messages.
        images: arguments of the pipeline that take an image. The file has a column of each name, with the image's file;
            a relative path is looked up in the folder of the prompt file. Other columns are not looked at.

    Returns:
        Strings, with `images` `dpcache.Prompt`s.

    Raises:
        SettingError: a file that cannot be read, with the line that is wrong, or a set that cannot be downloaded.
    """
    if source in SETS and not images:
        return _set(setting, source)
    path = Path(source).expanduser()
    path = path if path.exists() or not (ROOT / path).exists() else ROOT / path
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        wanted = _wanted(images) if images else f"known sets: {', '.join(SETS)}"
        raise SettingError(f"{setting}={source} is not a readable UTF-8 text file: {error} ({wanted})") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingError(f"{setting}={source} is not a readable UTF-8 text file: line {line}: {error}") from None
    parse = {".csv": _table, ".tsv": _table, ".jsonl": _jsonl}.get(path.suffix.lower(), _lines)
    if images and parse is _lines:
        raise SettingError(f"{setting}={source} has no images ({_wanted(images)})")
    try:
        return [_prompt(row, line, images, path, f"{setting}={source}, line {line}") for line, row in parse(text, path)]
    except _Wrong as error:
        raise SettingError(f"{setting}={source}, line {error.args[0]}: {error.args[1]}") from None


class _Wrong(Exception):
    """(line, what is wrong with it)"""


def _wanted(images: Sequence[str]) -> str:
    return f"the model takes a csv, tsv or jsonl file with columns for the prompt and its {', '.join(images)}"


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line


def _table(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
    rows = csv.reader(io.StringIO(text, newline=""), dialect, strict=True)
    header = None
    try:
        for row in rows:
            if header is None:
                header = row
                _column(row, COLUMNS, rows.line_num)
            elif row and len(row) != len(header):
                raise _Wrong(rows.line_num, f"{len(row)} fields, but the header has {len(header)}")
            elif row:
                columns = {}
                for name, value in zip(header, row):
                    columns.setdefault(name, value)
                yield rows.line_num, columns
    except csv.Error as error:
        raise _Wrong(rows.line_num, str(error)) from None


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise _Wrong(number, f"not JSON: {error}") from None


def _column(names: Sequence[str], wanted: Sequence[str], line: int) -> str:
    """The first of the columns that are wanted."""
    found = {name.strip().lower(): name for name in reversed(names)}
    for name in wanted:
        if name in found:
            return found[name]
    raise _Wrong(line, f"none of {', '.join(wanted)} is among its columns {', '.join(names)}")


def _prompt(row, line: int, images: Sequence[str], path: Path, source: str) -> str:
    """Of a row, a dictionary of columns or the prompt alone."""
    columns = row if isinstance(row, dict) else {COLUMNS[0]: row}
    text = columns[_column(list(columns), COLUMNS, line)]
    if not isinstance(text, str) or not text.strip():
        raise _Wrong(line, f"{text!r} is not a prompt")
    if not images:
        return text.strip()
    files = {name: columns[_column(list(columns), [name], line)] for name in images}
    for name, file in files.items():
        if not isinstance(file, str) or not file.strip():
            raise _Wrong(line, f"{name}={file!r} is not the file of an image")
    folder = path.parent
    return Prompt(text.strip(), source=source, **{name: folder / file.strip() for name, file in files.items()})


def _set(setting: str, name: str) -> list[str]:
    repository, split, column = SETS[name]
    try:
        from datasets import load_dataset
    except ImportError:
        raise SettingError(f"{setting}={name} needs the package datasets: pip install -e '.[prompts]'") from None
    try:
        values = load_dataset(repository, split=split)[column]
    except Exception as error:  # the hub, a proxy or the local cache may raise anything
        call = f"load_dataset('{repository}', split='{split}')"
        raise SettingError(
            f"{setting}={name} cannot be had ({type(error).__name__}: {error}); once, with a connection: "
            f'python -c "from datasets import load_dataset; {call}"'
        ) from None
    return [(value if isinstance(value, str) else value[0]).strip() for value in values]
