"""Pictures of the board: a metric over the budget, and over the speed-up with the Pareto front."""

import textwrap
from collections.abc import Collection
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dpcache.errors import SettingError
from eval.methods import FULL, about, order, styles
from eval.metrics import MAIN
from eval.pictures import STYLE, plain_ticks, save
from eval.results import against_full, boards, column
from eval.schema import Group
from eval.statistics import front

MARKERS = "osD^vPX"


@matplotlib.rc_context(STYLE)
def figure(path: str | Path, frame: pd.DataFrame, metric: str = MAIN) -> Path:
    """Metric over budget, one panel per setting, one line per row of the board with its 95 % interval as a band; with
    one or two budgets a list of the rows, a mark with its interval for each budget.

    The full-step run is a dashed line across the panel. The line is left out if the metric measures the distance to
    that run. Raises SettingError for a column that no result has.
    """
    panels = [(heading, _without_full(board, metric)) for heading, board in boards(frame, metric)]
    lists = [board["budget"].nunique() <= 2 for _, (board, _) in panels]
    rows = max([len(set(board.index)) for (_, (board, _)), short in zip(panels, lists) if short], default=0)
    lines = max([len(set(board.index)) for (_, (board, _)), short in zip(panels, lists) if not short], default=0)
    names = max(-(-lines // 20), 1)  # columns of the legend
    width = (5.2 + 1.8 * (names - 1)) * len(panels) + any(lists)
    plot = Figure(figsize=(width, max(3.2 * (not all(lists)), 0.8 + 0.25 * rows)))
    plot.set_layout_engine("constrained")
    for axes, short, (heading, (board, level)) in zip(plot.subplots(1, len(panels), squeeze=False)[0], lists, panels):
        (_list if short else _curves)(axes, board, column(metric).title)
        if level is not None:
            (axes.axvline if short else axes.axhline)(level, color="0.4", ls="--", lw=1, label=FULL)
        axes.set_title(heading)
        axes.grid(color="0.9", lw=0.6, axis="x" if short else "both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), ncols=1 if short else names)
    return save(plot, path)


def _without_full(board: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, float | None]:
    """The board without the full-step row, and that row's mean; None if the metric measures the distance to the
    full-step run."""
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
def pareto(
    path: str | Path, frame: pd.DataFrame, metric: str = MAIN, gain: str = "speedup", chosen: Collection[str] = ()
) -> Path:
    """Metric over speed-up (or another column `gain` of which more is better), one panel per setting, three to a line;
    better is up and to the right. Every row of the board is a line. Those with a run on the front and the `chosen` ones
    (rows or methods) have their group's colour, their names and their 95 % intervals, the others are grey. The dashed
    stairs are the front.
    Runs with an unreliable timing are left out where the gain is a measured speed.

    Raises SettingError for a column that no result has, for a `gain` of which more is not better, for a metric of which
    it is not known whether more is better, and for a chosen row that no result has.
    """
    if (higher := column(metric).higher_is_better) is None:
        raise SettingError(f"metric={metric} has no Pareto front: whether higher is better is not known")
    if not column(gain).higher_is_better:
        raise SettingError(f"gain={gain} is not a column of which more is known to be better")
    rows = set(frame["label"])
    if lost := [name for name in chosen if not any(name in (label, label.split()[0]) for label in rows)]:
        raise SettingError(f"no result of {', '.join(lost)}; the board has {sorted(rows)}")
    gains = {
        heading: board[~board["unreliable"]].set_index("budget", append=True)["mean"]
        for heading, board in boards(frame, gain)
    }
    panels = {}
    for heading, board in boards(frame, metric):
        points = _without_full(board, metric)[0].set_index("budget", append=True)
        points = points.assign(gain=gains[heading].reindex(points.index)) if heading in gains else points.iloc[:0]
        points = points.dropna(subset="gain").reset_index("budget") if len(points) else points
        if len(points):
            panels[heading] = points
    if not panels:
        raise SettingError(f"no run has both {metric} and {gain}")
    columns = min(len(panels), 3)
    lines = -(-len(panels) // 3)
    plot = Figure(figsize=(4.6 * columns, 3.4 * lines + 0.4))
    plot.set_layout_engine("constrained")
    grid = plot.subplots(lines, columns, squeeze=False).flat
    colored, looks, grey = {}, styles(rows), False
    for axes, (heading, points) in zip(grid, panels.items()):
        best = points[front(points["gain"], points["mean"], higher)].sort_values("gain", ascending=False)
        shown = {label for label in points.index if label in best.index or {label, label.split()[0]} & set(chosen)}
        grey |= not shown.issuperset(points.index)
        for label in dict.fromkeys(points.index):
            line = points.loc[[label]].sort_values("gain")
            look = {"color": "0.8", "zorder": 1}
            if label in shown:
                group = about(label).group
                colored[group] = Line2D([], [], color=looks[label].light, marker="o", ms=4, lw=1, label=group.value)
                look = {"color": looks[label].light, "marker": MARKERS[looks[label].shape], "zorder": 3}
                axes.vlines(line["gain"], line["lo"], line["hi"], color=looks[label].light, lw=0.8, alpha=0.6)
            axes.plot(line["gain"], line["mean"], ms=4, lw=0.8, **look)
        axes.set(xlabel=column(gain).title, ylabel=column(metric).title, title=heading)
        axes.margins(x=0.05, y=0.1)
        if not higher:
            if points["mean"].min() > 0 and points["mean"].max() > 10 * points["mean"].min():
                axes.set_yscale("log")
                plain_ticks(axes.yaxis)
            axes.invert_yaxis()
        axes.set_xlim(right=axes.get_xlim()[1] + 0.35 * (axes.get_xlim()[1] - axes.get_xlim()[0]))  # for the names
        _stairs(axes, best)
        ends = [
            points.loc[[label]].sort_values("gain").iloc[-1] for label in sorted(shown - set(best.index), key=order)
        ]
        _name(axes, [row for _, row in best.iterrows()] + ends)
        axes.grid(color="0.93", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid:
        axes.set_visible(False)
    legend = [colored[group] for group in Group if group in colored]
    if grey:
        legend.append(Line2D([], [], color="0.8", label="others"))
    legend.append(Line2D([], [], color="k", ls="--", lw=0.8, label="Pareto front"))
    plot.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 4 * columns))
    return save(plot, path)


def _stairs(axes, best: pd.DataFrame) -> None:
    """Draws the front as stairs: at every gain, the best value among the runs that gain at least as much."""
    (left, right), (worst, top) = axes.get_xlim(), axes.get_ylim()
    gains, values = [left, *best["gain"][::-1], best["gain"].iloc[0]], [*best["mean"][::-1]]
    axes.step(gains, [values[0], *values, worst], "k--", where="pre", lw=0.8, zorder=2)
    axes.set(xlim=(left, right), ylim=(worst, top))


def _name(axes, rows: list[pd.Series]) -> None:
    """Writes name and budget beside the mark of each row, beginning with the first rows, if the text covers no other
    mark and no other name."""
    axes.figure.draw_without_rendering()  # lays the axes out, so that positions in points are known
    marks = [axes.transData.transform((row["gain"], row["mean"])) * 72 / axes.figure.dpi for row in rows]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in marks]
    for row, (x, y) in zip(rows, marks):
        text = f"{row.name} {row['budget']:.0f}"
        width = 3.7 * len(text)  # in points, at the size of the text
        sides = [(5, up) for up in (3, -7)] + [(-5 - width, up) for up in (3, -7)]
        sides += [(5, up) for up in range(6, 200, 3)]
        for right, up in sides:
            box = (x + right, y + up, x + right + width, y + up + 6)
            if not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                break
        taken.append(box)
        place = {"xytext": (right, up), "textcoords": "offset points", "fontsize": 6.5}
        axes.annotate(text, (row["gain"], row["mean"]), **place)


def _list(axes, board: pd.DataFrame, title: str) -> None:
    labels = list(dict.fromkeys(board.index))
    for budget, color in zip(sorted(board["budget"].unique()), matplotlib.color_sequences["tab10"]):
        part = board[board["budget"] == budget]
        spread = [(part["mean"] - part["lo"]).fillna(0), (part["hi"] - part["mean"]).fillna(0)]
        at = [labels.index(label) for label in part.index]
        axes.errorbar(part["mean"], at, xerr=spread, fmt="o", ms=4, lw=1.2, color=color, label=f"K = {budget}")
    names = [textwrap.fill(label, 48, break_long_words=False) for label in labels]
    axes.set(yticks=range(len(labels)), yticklabels=names, ylim=(len(labels) - 0.5, -0.5), xlabel=title)
