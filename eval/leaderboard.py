"""The board: every `result.json` below a folder as one table. `python -m eval.leaderboard FOLDER [--metric psnr]`.

The command also writes the board into the folder: `leaderboard.csv`, `leaderboard.md` and `report.html`.
"""

import argparse
import json
import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from eval.methods import FULL, order, styles
from eval.metrics import METRICS, Column
from eval.pictures import STYLE, save
from eval.statistics import doubt, paired_difference

log = logging.getLogger(__name__)

SETTING = ["model", "num_inference_steps"]  # results of different settings never share a table
SPEED = ("speedup", "transformer_speedup", "efficiency")  # as timed; runs say where their rounds disagree
MEASURED = {
    column.name: column
    for column in (
        Column(name="speedup", label="speed-up", higher_is_better=True),
        Column(name="transformer_speedup", label="transformer speed-up", higher_is_better=True),
        Column(name="efficiency", label="efficiency", higher_is_better=True),
        Column(name="flops_speedup", label="speed-up by FLOPs", higher_is_better=True),
        Column(name="computed_steps", label="computed steps", digits=1, higher_is_better=False),
    )
}
MARKERS = "osD^vPX"
LEVEL = 0.01  # gains that differ by less are level: no machine measures them closer


def flatten(result: dict) -> dict:
    """One `result.json` as flat columns.

    metrics: `psnr`, `psnr_lo`, `psnr_hi`, `psnr_n`; FLOPs: `flops_full`, `flops_cached`, ... and `flops_speedup`, the
    first over the second; timing, memory and
    versions: their scalars under their own names (`speedup`, `peak_rss`, `torch`); the range of timed rounds as
    `speedup_lo`, `speedup_hi`; everything else as it is, without the scores of every prompt.
    """
    groups = ("metrics", "timing", "memory", "versions", "per_prompt", "flops")
    row = {key: value for key, value in result.items() if key not in groups}
    for name, value in result["metrics"].items():
        row[name], (row[f"{name}_lo"], row[f"{name}_hi"]), row[f"{name}_n"] = value["mean"], value["ci95"], value["n"]
    if flops := result.get("flops"):
        row |= {f"flops_{name}": value for name, value in flops.items()}
        row["flops_speedup"] = flops[FULL] / flops["cached"]
    for group in ("timing", "memory", "versions"):
        row |= {k: v for k, v in result.get(group, {}).items() if not isinstance(v, (list, dict))}
    if "efficiency" in row:
        row["unreliable"] = doubt(result["timing"])
    for name in SPEED:
        if found := result.get("timing", {}).get(f"{name}_range"):
            row[f"{name}_lo"], row[f"{name}_hi"] = found
    return row


def collect(folder: str | Path) -> pd.DataFrame:
    """One row per `result.json` below `folder`: the columns of `flatten`, the `label` that names the run on the board
    (the run's own, without the changed settings that all runs of its method share), the `scores` of every prompt,
    `path` and `written` (seconds, mtime).

    Files that cannot be read or are not results of this project are skipped with a warning that names them.
    """
    rows = []
    for path in sorted(Path(folder).rglob("result.json")):
        try:
            result = json.loads(path.read_text())
            row = flatten(result)
            if missing := {"method", "budget", "seed", "computed_steps", *SETTING} - row.keys():
                raise ValueError(f"lacks {sorted(missing)}")
            scores = result.get("per_prompt", {})
            rows.append(
                {"label": row["method"]} | row | {"scores": scores, "path": str(path), "written": path.stat().st_mtime}
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("skipped %s: %s: %s", path, type(error).__name__, error)
    for method in {row["method"] for row in rows}:
        same = [row for row in rows if row["label"].split()[0] == row["method"] == method]
        shared = set.intersection(*(set(row["label"].split()[1:]) for row in same)) if same else set()
        for row in same:
            row["label"] = " ".join(word for word in row["label"].split() if word not in shared)
    return pd.DataFrame(rows)


def column(name: str) -> Column:
    """What is known of a metric, of what a run measures, or of neither, as in results of other versions."""
    return METRICS.get(name) or MEASURED.get(name) or Column(name=name, label=name, higher_is_better=None)


def metrics(frame: pd.DataFrame) -> list[str]:
    """The metrics that a run of the frame has, or could not have, in the order of `METRICS`; unknown ones last."""
    names = [name[:-2] for name in frame if name.endswith("_n") and f"{name[:-2]}_lo" in frame]
    for reasons in frame.get("metrics_unavailable", ()):
        names += reasons if isinstance(reasons, dict) else ()
    known = [name for name in METRICS if name in names]
    return known + sorted(set(names) - set(known))


def _against_full(name: str) -> bool:
    return name in METRICS and METRICS[name].against_full


def front(gains: np.ndarray, values: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """Which of N points (gain, value) lie on the Pareto front, as booleans (N,). More gain is better.

    A point is beaten by one with a better value that is no slower, to within `LEVEL`, and by one with the same value
    that is faster.
    """
    gains, values = np.asarray(gains, dtype=float), np.asarray(values, dtype=float) * (1 if higher_is_better else -1)
    better, same = values[:, None] > values, values[:, None] == values  # [i, j]: i than j
    beats = (better & (gains[:, None] >= gains * (1 - LEVEL))) | (same & (gains[:, None] > gains))
    return ~beats.any(axis=0)


def _newest(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("written").drop_duplicates([*SETTING, "label", "budget", "seed"], keep="last")


def _boards(frame: pd.DataFrame, metric: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Per setting, its heading and a frame indexed by label with columns `budget, mean, lo, hi, unreliable`, the last
    one true for a speed whose rounds disagree.

    Of runs that repeat a (setting, label, budget, seed) the newest counts. Seeds are averaged, and their interval
    halves combined as independent errors; with one seed these are the run's own mean and interval.
    """
    if metric not in frame:
        raise ValueError(f"no result has {metric!r}; columns are {sorted(frame.columns)}")
    frame = _newest(frame).assign(mean=pd.to_numeric(frame[metric])).dropna(subset="mean")
    doubted = metric in SPEED and "unreliable" in frame
    frame = frame.assign(unreliable=frame["unreliable"].notna() if doubted else False)
    for end in ("lo", "hi"):
        bound = pd.to_numeric(frame[f"{metric}_{end}"]) if f"{metric}_{end}" in frame else np.nan
        frame[end] = (bound - frame["mean"]) ** 2
    for (model, total), part in frame.groupby(SETTING):
        board = part.groupby(["label", "budget"]).agg(
            mean=("mean", "mean"),
            lo=("lo", lambda squares: np.sqrt(squares.sum(skipna=False)) / len(squares)),
            hi=("hi", lambda squares: np.sqrt(squares.sum(skipna=False)) / len(squares)),
            unreliable=("unreliable", "any"),
        )
        board["lo"], board["hi"] = board["mean"] - board["lo"], board["mean"] + board["hi"]
        board = board.reset_index("budget").loc[sorted(part["label"].unique(), key=order)]
        yield f"{model}, {total} steps", board


def table(frame: pd.DataFrame, metric: str = "psnr") -> str:
    """Markdown tables, one per setting: methods x budgets, mean ± half the width of the 95 % interval, of speeds
    half the range of the timed rounds, or "not reliable" where these disagree.

    Runs in which the metric was unavailable are listed below with their reasons. Raises ValueError for a column that
    no result has.
    """
    digits = column(metric).digits

    def cell(row: pd.Series) -> str:
        if row["unreliable"]:
            return "not reliable"
        spread = (row["hi"] - row["lo"]) / 2
        return f"{row['mean']:.{digits}f}" + ("" if np.isnan(spread) else f" ± {spread:.{digits}f}")

    parts, lost = [], pd.DataFrame()
    if "metrics_unavailable" in frame:
        reasons = frame["metrics_unavailable"].map(lambda r: r.get(metric) if isinstance(r, dict) else None)
        lost = frame.assign(reason=reasons).dropna(subset="reason")
    # A metric that was unavailable in every run has no column, but its reasons must still be seen.
    for heading, board in _boards(frame, metric) if metric in frame or lost.empty else ():
        budgets = sorted(board["budget"].unique())
        lines = [["method", *(f"K = {budget}" for budget in budgets)], ["---"] + ["---:"] * len(budgets)]
        for label in dict.fromkeys(board.index):
            cells = {row["budget"]: cell(row) for _, row in board.loc[[label]].iterrows()}
            lines.append([label, *(cells.get(budget, "–") for budget in budgets)])
        parts.append(
            f"### {column(metric).title}: {heading}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        )
    parts += [
        f"- {metric} unavailable: {r.label}, K = {r.budget}, seed {r.seed}: {r.reason}" for r in lost.itertuples()
    ]
    return "\n\n".join(parts)


def paired_table(frame: pd.DataFrame, against: str, metric: str = "psnr") -> str:
    """Markdown table of every row's mean difference to the row `against` over the same prompts and noise, with its
    paired 95 % bootstrap interval. Raises ValueError if there is no such row."""
    frame = _newest(frame)
    if against not in set(frame["label"]):
        raise ValueError(f"no result of {against!r}; the board has {sorted(set(frame['label']))}")
    lines = [f"### {column(metric).title} against {against}, same prompts", ""]
    lines += ["| setting | K | method | difference | 95 % interval |", "|---|---:|---|---:|---|"]
    for (model, total, budget, _), part in frame.groupby([*SETTING, "budget", "seed"]):
        scores = {row.label: row.scores for row in part.itertuples()}
        base = scores.pop(against, {})
        for method in sorted(scores, key=order):
            ours = scores[method]
            if metric in base and metric in ours and base["prompts"] == ours["prompts"] and method != FULL:
                d = paired_difference(ours[metric], base[metric])
                low, high = d["ci95"] if d["n"] > 1 else (np.nan, np.nan)
                lines.append(
                    f"| {model}, {total} steps | {budget} | {method} | {d['mean']:+.3g} | [{low:+.3g}, {high:+.3g}] |"
                )
    return "\n".join(lines)


@matplotlib.rc_context(STYLE)
def figure(path: str | Path, frame: pd.DataFrame, metric: str = "psnr") -> Path:
    """Metric over budget, one panel per setting, one line per row of the board with its 95 % interval as a band; with
    one or two budgets a list of the rows, a mark with its interval for each budget.

    `full` is a level, or absent where the metric measures the distance to `full` itself.
    Raises ValueError for a column that no result has.
    """
    boards = [(heading, _without_full(board, metric)) for heading, board in _boards(frame, metric)]
    lists = [board["budget"].nunique() <= 2 for _, (board, _) in boards]
    rows = max([len(set(board.index)) for (_, (board, _)), short in zip(boards, lists) if short], default=0)
    plot = Figure(figsize=(5.2 * len(boards) + any(lists), max(3.2 * (not all(lists)), 0.8 + 0.25 * rows)))
    plot.set_layout_engine("constrained")
    for axes, short, (heading, (board, level)) in zip(plot.subplots(1, len(boards), squeeze=False)[0], lists, boards):
        (_list if short else _curves)(axes, board, column(metric).title)
        if level is not None:
            (axes.axvline if short else axes.axhline)(level, color="0.4", ls="--", lw=1, label="full")
        axes.set_title(heading)
        axes.grid(color="0.9", lw=0.6, axis="x" if short else "both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return save(plot, path)


def _without_full(board: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, float | None]:
    """The board without `full`, and the level of `full` where that says something."""
    full = board[board.index == FULL]["mean"]
    return board[board.index != FULL], None if _against_full(metric) or full.empty else full.mean()


def _curves(axes, board: pd.DataFrame, title: str) -> None:
    for label, style in styles(board.index).items():
        line = board.loc[[label]].sort_values("budget")
        axes.plot(
            line["budget"], line["mean"], ms=3, lw=1.2, label=label, color=style.light, marker=MARKERS[style.shape]
        )
        axes.fill_between(line["budget"], line["lo"], line["hi"], color=style.light, alpha=0.15, lw=0)
    axes.set(xlabel="budget K (computed steps)", ylabel=title)
    axes.xaxis.get_major_locator().set_params(integer=True)


@matplotlib.rc_context(STYLE)
def pareto(path: str | Path, frame: pd.DataFrame, metric: str = "psnr", gain: str = "speedup") -> Path:
    """Metric over speed-up (or another column `gain` of which more is better), one panel per setting, one line per row
    of the board; the dashed front goes through the runs that no other run beats in both, and names them. Runs whose
    timed rounds disagree have no place on a measured gain.

    Raises ValueError for a column that no result has, and for a metric of which nobody knows whether higher is better.
    """
    if (higher := column(metric).higher_is_better) is None:
        raise ValueError(f"metric={metric} has no Pareto front: whether higher is better is not known")
    boards = [(heading, _without_full(board, metric)[0]) for heading, board in _boards(frame, metric)]
    gains = {
        heading: board[~board["unreliable"]].set_index("budget", append=True)["mean"]
        for heading, board in _boards(frame, gain)
    }
    plot = Figure(figsize=(8.5 * len(boards), 5.4))
    plot.set_layout_engine("constrained")
    for axes, (heading, board) in zip(plot.subplots(1, len(boards), squeeze=False)[0], boards):
        points = board.set_index("budget", append=True)
        points = points.assign(gain=gains[heading].reindex(points.index)).dropna(subset="gain").reset_index("budget")
        for label, style in styles(points.index).items():
            line = points.loc[[label]].sort_values("gain")
            look = {"color": style.light, "marker": MARKERS[style.shape]}
            axes.plot(line["gain"], line["mean"], ms=4, lw=0.6, label=label, **look)
        best = points[front(points["gain"], points["mean"], higher)].sort_values("gain", ascending=False)
        axes.plot(best["gain"], best["mean"], "k--", lw=0.8, zorder=0)
        for label, row in best.iterrows():
            right, at = row["gain"] > points["gain"].mean(), (row["gain"], row["mean"])
            where = {"xytext": (-4 if right else 4, 4), "ha": "right" if right else "left"}
            axes.annotate(f"{label} {row['budget']:.0f}", at, textcoords="offset points", **where)
        axes.set(xlabel=column(gain).title, ylabel=column(metric).title, title=heading)
        axes.grid(color="0.9", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=6.5, ncols=1 + len(set(points.index)) // 24)
    return save(plot, path)


def _list(axes, board: pd.DataFrame, title: str) -> None:
    labels = list(dict.fromkeys(board.index))
    for budget, color in zip(sorted(board["budget"].unique()), matplotlib.color_sequences["tab10"]):
        part = board[board["budget"] == budget]
        spread = [(part["mean"] - part["lo"]).fillna(0), (part["hi"] - part["mean"]).fillna(0)]
        at = [labels.index(label) for label in part.index]
        axes.errorbar(part["mean"], at, xerr=spread, fmt="o", ms=4, lw=1.2, color=color, label=f"K = {budget}")
    names = [textwrap.fill(label, 48, break_long_words=False) for label in labels]
    axes.set(yticks=range(len(labels)), yticklabels=names, ylim=(len(labels) - 0.5, -0.5), xlabel=title)


def main() -> None:
    """Prints the tables of a folder of runs and writes the board."""
    from eval import report  # here: it builds on this module

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder below which result.json files are collected")
    parser.add_argument("--metric", help="print this column only; default: what compares with full steps, and speed")
    parser.add_argument("--against", metavar="METHOD", help="also print paired differences to this method")
    parser.add_argument("--figure", type=Path, help="also draw the metric (default: PSNR) over the budget")
    parser.add_argument("--pareto", type=Path, help="also draw the metric (default: PSNR) over the --gain")
    parser.add_argument("--gain", default="speedup", help="speedup, or flops_speedup, which no other job disturbs")
    parser.add_argument("--out", type=Path, help="where the board is written; default: the folder itself")
    parser.add_argument("--prompts", type=int, default=8, help="prompts on the report's image wall; default: 8")
    arguments = parser.parse_args()
    frame = collect(arguments.folder)
    if frame.empty:
        parser.exit(1, f"no result.json below {arguments.folder}\n")
    printed = [*filter(_against_full, metrics(frame)), "speedup", "computed_steps"]
    for metric in [arguments.metric] if arguments.metric else printed:
        try:
            text = table(frame, metric)
        except ValueError as error:
            text = str(error)
        print(text, end="\n\n")
    metric = arguments.metric or "psnr"
    if arguments.against:
        print(paired_table(frame, arguments.against, metric))
    if arguments.figure:
        figure(arguments.figure, frame, metric)
    if arguments.pareto:
        pareto(arguments.pareto, frame, metric, arguments.gain)
    for path in report.write(arguments.folder, arguments.out or arguments.folder, frame, arguments.prompts):
        print(path)


if __name__ == "__main__":
    main()
