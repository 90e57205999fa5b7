"""Tries caching on every pipeline of diffusers that has a transformer, and writes a table: right, refused or wrong.

    python scripts/coverage.py coverage.md                        # all pipelines, some minutes
    python scripts/coverage.py coverage.md Flux Wan --workers 4   # those with one of these in the name

The pipelines are tiny and have random weights (tests/pipelines). Each runs in a process of its own, so that one that
crashes or hangs only loses its own rows. The script ends with status 1 if any cell is wrong.
"""

import argparse
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A library is called `coverage`, too: with this folder on the path, this file would be imported in its place.
sys.path = [str(Path(__file__).parents[1] / "tests"), *(p for p in sys.path if Path(p) != Path(__file__).parent)]

import diffusers  # noqa: E402
import torch  # noqa: E402

from pipelines import PIPELINES, UNBUILT, classes  # noqa: E402
from pipelines.oracle import SITES, outcomes  # noqa: E402

Rows = list[tuple[str, str, str]]  # case, site, outcome


def examine(name: str, sites: tuple[str, ...], results: Connection) -> None:
    """Sends every outcome of one pipeline as soon as it is known, and then None."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for outcome in outcomes(PIPELINES[name], sites):
        results.send(outcome)
    results.send(None)


def examine_all(names: list[str], sites: tuple[str, ...], workers: int, limit: float) -> dict[str, Rows]:
    """The outcomes of each pipeline, which may take `limit` seconds."""
    context = multiprocessing.get_context("fork")  # imported once here, and not again in every process
    waiting, running = list(reversed(names)), {}
    rows: dict[str, Rows] = {name: [] for name in names}
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop()
            results, end = context.Pipe(duplex=False)
            process = context.Process(target=examine, args=(name, sites, end), daemon=True)
            process.start()
            end.close()
            running[results] = name, process, time.monotonic()
        for results in wait(list(running), timeout=1):
            name, process, _ = running[results]
            try:
                outcome = results.recv()
            except EOFError:
                process.join()
                outcome = None
                rows[name].append(("", "", f"broken: the process ended with status {process.exitcode}"))
            if outcome is None:
                process.join()
                del running[results]
                print(f"{name}: {summary(rows[name])}", flush=True)
            else:
                rows[name].append(outcome)
        for results, (name, process, start) in list(running.items()):
            if time.monotonic() - start > limit:
                process.kill()
                process.join()
                del running[results]
                rows[name].append(("", "", f"broken: took more than {limit:g} s"))
                print(f"{name}: {summary(rows[name])}", flush=True)
    return rows


def kind(outcome: str) -> str:
    return outcome.partition(":")[0]


def summary(rows: Rows) -> str:
    counts = Counter(kind(outcome) for _, _, outcome in rows)
    return ", ".join(f"{counts[name]} {name}" for name in ("right", "refused", "wrong", "broken") if counts[name])


def table(rows: dict[str, Rows], sites: tuple[str, ...]) -> str:
    """Markdown: a row for each pipeline and way to call it, and below them the messages of refusals and errors."""
    words: dict[str, int] = {}
    lines = [f"| pipeline | call | {' | '.join(sites)} |", f"|---|---|{'---|' * len(sites)}"]
    for name, mine in rows.items():
        for case in dict.fromkeys(case for case, _, _ in mine):
            found = {site: outcome for other, site, outcome in mine if other == case}
            cells = []
            for site in sites:
                outcome = found.get(site, found.get("", ""))
                label = kind(outcome)
                if label not in ("", "right"):
                    label += f" {words.setdefault(outcome, len(words) + 1)}"
                cells.append(f"**{label}**" if label.startswith(("wrong", "broken")) else label)
            lines.append(f"| {name} | {case} | {' | '.join(cells)} |")
    lines += ["", "| | words |", "|---|---|"]
    lines += [f"| {kind(outcome)} {number} | {escaped(outcome)} |" for outcome, number in words.items()]
    return "\n".join(lines)


def escaped(outcome: str) -> str:
    return outcome.partition(": ")[2].replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="Markdown file to write")
    parser.add_argument("names", nargs="*", help="only pipelines with one of these in their name")
    parser.add_argument("--sites", nargs="+", default=list(SITES))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=180, help="seconds for one pipeline")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    here, sites = classes(), tuple(arguments.sites)
    names = sorted(
        name
        for name, record in PIPELINES.items()
        if record.kind in here and (not arguments.names or any(part in name for part in arguments.names))
    )
    if not names:
        parser.error(f"no pipeline has one of {', '.join(arguments.names)} in its name")
    rows = examine_all(names, sites, arguments.workers, arguments.limit)
    everything = [outcome for mine in rows.values() for outcome in mine]
    built = {PIPELINES[name].kind for name in names}
    head = f"{len(built)} of the {len(here)} pipelines with a transformer in diffusers {diffusers.__version__}: "
    text = [head + summary(everything), "", table(rows, sites)]
    if not arguments.names:
        text += ["", "| not built | why |", "|---|---|"]
        text += [f"| {name} | {UNBUILT.get(name, '?')} |" for name in here if name not in built]
    arguments.file.write_text("\n".join(text) + "\n")
    print(text[0])
    sys.exit(any(kind(outcome) in ("wrong", "broken") for _, _, outcome in everything))


if __name__ == "__main__":
    main()
