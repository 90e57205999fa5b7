"""Pictures of the board: a metric over the budget, and over the speed-up with the Pareto front."""

import textwrap
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from eval.methods import FULL, styles
from eval.pictures import STYLE, save
from eval.results import against_full, boards, column
from eval.statistics import front

MARKERS = "osD^vPX"


@matplotlib.rc_context(STYLE)
def figure(path: str | Path, frame: pd.DataFrame, metric: str = "psnr") -> Path:
    """Metric over budget, one panel per setting, one line per row of the board with its 95 % interval as a band; with
    one or two budgets a list of the rows, a mark with its interval for each budget.

    `full` is a level, or absent where the metric measures the distance to `full` itself.
    Raises ValueError for a column that no result has.
    """
    panels = [(heading, _without_full(board, metric)) for heading, board in boards(frame, metric)]
    lists = [board["budget"].nunique() <= 2 for _, (board, _) in panels]
    rows = max([len(set(board.index)) for (_, (board, _)), short in zip(panels, lists) if short], default=0)
    plot = Figure(figsize=(5.2 * len(panels) + any(lists), max(3.2 * (not all(lists)), 0.8 + 0.25 * rows)))
    plot.set_layout_engine("constrained")
    for axes, short, (heading, (board, level)) in zip(plot.subplots(1, len(panels), squeeze=False)[0], lists, panels):
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
    return board[board.index != FULL], None if against_full(metric) or full.empty else full.mean()


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
    panels = [(heading, _without_full(board, metric)[0]) for heading, board in boards(frame, metric)]
    gains = {
        heading: board[~board["unreliable"]].set_index("budget", append=True)["mean"]
        for heading, board in boards(frame, gain)
    }
    plot = Figure(figsize=(8.5 * len(panels), 5.4))
    plot.set_layout_engine("constrained")
    for axes, (heading, board) in zip(plot.subplots(1, len(panels), squeeze=False)[0], panels):
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
