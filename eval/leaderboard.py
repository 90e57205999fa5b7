"""The board: every `result.json` below a folder as one table. `python -m eval.leaderboard FOLDER [--metric NAME]`.

The command also writes the board into the folder: `leaderboard.csv`, `leaderboard.md` and `report.html`.
"""

import argparse
from pathlib import Path

import pandas as pd

from dpcache.errors import SettingError
from eval import charts, report, tables
from eval.methods import FULL
from eval.metrics import FINE, MAIN
from eval.results import WORST, against_full, collect, column, main_metric, metric_names, numbers

GAIN = "speedup"


def main() -> None:
    """Prints the tables of a folder of runs and writes the board."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder below which result.json files are collected")
    parser.add_argument(
        "--metric", help="rank by this column and print it only; default: what compares with full steps, and speed"
    )
    parser.add_argument(
        "--league",
        type=int,
        nargs="+",
        metavar="K",
        help="print in place of the other tables one of all methods and budgets, with the fine reference at these K, "
        "and ranks and costs at the first",
    )
    parser.add_argument("--against", metavar="METHOD", help="also print paired differences to this method")
    parser.add_argument("--figure", type=Path, help=f"also draw the metric (default: {MAIN}) over the budget")
    parser.add_argument("--pareto", type=Path, help=f"also draw the metric (default: {MAIN}) over the --gain")
    parser.add_argument("--gain", default=GAIN, help=f"{GAIN}, or flops_speedup, which no other job disturbs")
    parser.add_argument(
        "--highlight",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="rows to colour and name in --pareto, with the front",
    )
    parser.add_argument("--out", type=Path, help="where the board is written; default: the folder itself")
    parser.add_argument("--prompts", type=int, default=8, help="prompts on the report's image wall; default: 8")
    arguments = parser.parse_args()
    frame = collect(arguments.folder)
    if frame.empty:
        parser.exit(1, f"no result.json below {arguments.folder}\n")
    metric = arguments.metric or main_metric(frame) or MAIN
    try:
        _check(frame, arguments)
        if arguments.league:
            print(tables.league(frame, arguments.league, metric), end="\n\n")
        else:
            _print(frame, metric, alone=arguments.metric is not None)
        if arguments.against:
            print(tables.paired_table(frame, arguments.against, metric))
        if arguments.figure:
            charts.figure(arguments.figure, frame, metric)
        if arguments.pareto:
            charts.pareto(arguments.pareto, frame, metric, arguments.gain, arguments.highlight)
        for path in report.write(arguments.folder, arguments.out or arguments.folder, frame, arguments.prompts):
            print(path)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


def _check(frame: pd.DataFrame, arguments: argparse.Namespace) -> None:
    """Raises SettingError for what no run has."""
    columns = list(dict.fromkeys([*metric_names(frame), *numbers(frame)]))
    gains = [name for name in numbers(frame) if column(name).higher_is_better]
    budgets = sorted(set(frame["budget"][frame["method"] != FULL]))
    if (metric := arguments.metric) and metric not in columns:
        raise SettingError(f"--metric {metric}: no run has it; choose from {', '.join(columns)}")
    if (arguments.pareto or arguments.gain != GAIN) and arguments.gain not in gains:
        raise SettingError(
            f"--gain {arguments.gain} is no column of these runs of which more is known to be better; "
            f"choose from {', '.join(gains)}"
        )
    if lost := sorted(set(arguments.league or ()) - set(budgets)):
        known = ", ".join(map(str, budgets))
        raise SettingError(f"--league {' '.join(map(str, lost))}: no run has this budget; choose from {known}")


def _print(frame: pd.DataFrame, metric: str, alone: bool) -> None:
    """The ranks, and a table of methods x budgets for the metric alone, or for all that compare with full steps, speed
    and computed steps."""
    names = metric_names(frame)
    if metric.removesuffix(WORST) in names and (ranking := tables.ranking(frame, metric)):
        print(ranking, end="\n\n")
    compared = [name for name in names if against_full(name) or name in FINE]
    measured = [name for name in ("speedup", "computed_steps") if name in frame]
    for name in [metric] if alone else [*compared, *measured]:
        print(tables.table(frame, name), end="\n\n")


if __name__ == "__main__":
    main()
