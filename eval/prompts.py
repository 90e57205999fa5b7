"""Prompts from a local file or a known set."""

import csv
import io
import json
from pathlib import Path

from dpcache.errors import SettingError

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


def read(setting: str, source: str | Path) -> list[str]:
    """The prompts of a file (txt: one a line; csv, tsv, jsonl: in one of `COLUMNS`), or of one of `SETS`. A relative
    path is looked up in the current folder, and then in the project's.

    Args:
        setting: the name under which the user gave `source`, for messages.

    Raises:
        SettingError: a file that cannot be read, with the line that is wrong, or a set that cannot be downloaded.
    """
    if source in SETS:
        return _set(setting, source)
    path = Path(source).expanduser()
    path = path if path.exists() or not (ROOT / path).exists() else ROOT / path
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise SettingError(
            f"{setting}={source} is not a readable UTF-8 text file: {error} (known sets: {', '.join(SETS)})"
        ) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingError(f"{setting}={source} is not a readable UTF-8 text file: line {line}: {error}") from None
    parse = {".csv": _table, ".tsv": _table, ".jsonl": _jsonl}.get(path.suffix.lower(), _lines)
    try:
        return parse(text, path)
    except _Wrong as error:
        raise SettingError(f"{setting}={source}, line {error.args[0]}: {error.args[1]}") from None


class _Wrong(Exception):
    """(line, what is wrong with it)"""


def _lines(text: str, path: Path) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _table(text: str, path: Path) -> list[str]:
    dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
    rows = csv.reader(io.StringIO(text, newline=""), dialect, strict=True)
    prompts, header = [], None
    try:
        for row in rows:
            if header is None:
                header, column = row, _column(row, rows.line_num)
            elif row and len(row) != len(header):
                raise _Wrong(rows.line_num, f"{len(row)} fields, but the header has {len(header)}")
            elif row:
                prompts.append(_prompt(row[header.index(column)], rows.line_num))
    except csv.Error as error:
        raise _Wrong(rows.line_num, str(error)) from None
    return prompts


def _jsonl(text: str, path: Path) -> list[str]:
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _Wrong(number, f"not JSON: {error}") from None
            if isinstance(row, dict):
                row = row[_column(list(row), number)]
            prompts.append(_prompt(row, number))
    return prompts


def _column(names: list[str], line: int) -> str:
    found = {name.strip().lower(): name for name in reversed(names)}
    for name in COLUMNS:
        if name in found:
            return found[name]
    raise _Wrong(line, f"none of {', '.join(COLUMNS)} is among its columns {', '.join(names)}")


def _prompt(value, line: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Wrong(line, f"{value!r} is not a prompt")
    return value.strip()


def _set(setting: str, name: str) -> list[str]:
    repository, split, column = SETS[name]
    try:
        from datasets import load_dataset
    except ImportError:
        raise SettingError(f"{setting}={name} needs the package datasets: pip install 'dpcache[prompts]'") from None
    try:
        values = load_dataset(repository, split=split)[column]
    except Exception as error:  # the hub, a proxy or the local cache may raise anything
        call = f"load_dataset('{repository}', split='{split}')"
        raise SettingError(
            f"{setting}={name} cannot be had ({type(error).__name__}: {error}); once, with a connection: "
            f'python -c "from datasets import load_dataset; {call}"'
        ) from None
    return [(value if isinstance(value, str) else value[0]).strip() for value in values]
