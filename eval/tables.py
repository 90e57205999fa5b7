"""The board as Markdown tables."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dpcache.errors import SettingError
from eval.methods import FULL, about, order
from eval.metrics import MAIN, fine_name
from eval.ranks import PLACE, Difference, board, differences
from eval.results import SETTING, WORST, boards, column, heading, newest
from eval.statistics import paired_difference


def table(frame: pd.DataFrame, metric: str = MAIN) -> str:
    """Markdown tables, one per setting: methods x budgets, mean ± half the width of the 95 % interval. For speeds it is
    ± half the range of the timed rounds, or "not reliable" if the rounds disagree.

    Runs in which the metric was unavailable are listed below with their reasons. Raises SettingError for a column that
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
    for title, rows in boards(frame, metric) if metric in frame or lost.empty else ():
        budgets = sorted(rows["budget"].unique())
        lines = [["method", *(f"K = {budget}" for budget in budgets)], ["---"] + ["---:"] * len(budgets)]
        for label in dict.fromkeys(rows.index):
            cells = {row["budget"]: cell(row) for _, row in rows.loc[[label]].iterrows()}
            lines.append([_cell(label), *(cells.get(budget, "–") for budget in budgets)])
        parts.append(
            f"### {column(metric).title}: {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        )
    parts += [
        f"- {metric} unavailable: {r.label}, K = {r.budget}, seed {r.seed}: {r.reason}" for r in lost.itertuples()
    ]
    return "\n\n".join(parts)


def paired_table(frame: pd.DataFrame, against: str, metric: str = MAIN) -> str:
    """Markdown table of every row's mean difference to the row `against` over the same prompts and noise, with its
    paired 95 % bootstrap interval. Raises SettingError if there is no such row."""
    frame = newest(frame)
    if against not in set(frame["label"]):
        raise SettingError(f"no result of {against!r}; the board has {sorted(set(frame['label']))}")
    lines = [f"### {column(metric).title} against {against}, same prompts", ""]
    lines += ["| setting | K | method | difference | 95 % interval |", "|---|---:|---|---:|---|"]
    for (*setting, budget, _), part in frame.groupby([*SETTING, "budget", "seed"]):
        scores = {row.label: row.scores for row in part.itertuples()}
        base = scores.pop(against, {})
        for method in sorted(scores, key=order):
            ours = scores[method]
            if metric in base and metric in ours and base["prompts"] == ours["prompts"] and method != FULL:
                d = paired_difference(ours[metric], base[metric])
                low, high = d["ci95"] if d["n"] > 1 else (np.nan, np.nan)
                row = f"| {_cell(heading(*setting))} | {budget} | {_cell(method)} "
                lines.append(f"{row}| {d['mean']:+.3g} | [{low:+.3g}, {high:+.3g}] |")
    return "\n".join(lines)


def ranking(frame: pd.DataFrame, metric: str = MAIN) -> str:
    """Markdown tables, one per setting, seed and budget: every run's rank, mean and worst prompt, and its paired
    differences to the best run of its own group and to the best of all. Empty where no run has a rank."""
    rows = board(frame, metric)
    apart, digits, parts = differences(rows, metric), column(metric).digits, []
    for (*setting, seed, budget), part in rows[rows["method"] != FULL].groupby(PLACE):
        ranked = part.sort_values("rank")
        if ranked["rank"].isna().all():
            continue
        first = ranked.iloc[0]["group"]
        lines = ["| rank | method | group | mean | worst prompt | to the best of its group | to the best |"]
        lines.append("| ---: | --- | --- | ---: | ---: | ---: | ---: |")
        for row in ranked.itertuples():
            to = apart[row.Index]
            cells = [_number(getattr(row, name, None), digits) for name in (metric, f"{metric}{WORST}")]
            cells += [_apart(to.get(row.group), digits), _apart(to.get(first), digits)]
            rank = "–" if pd.isna(row.rank) else row.rank
            lines.append(f"| {rank} | {_cell(row.label)} | {row.group} | {' | '.join(cells)} |")
        seeds = f", seed {seed}" if rows["seed"].nunique() > 1 else ""
        title = f"### Ranks by {column(metric).title}: {heading(*setting)}{seeds}, K = {budget}"
        parts.append("\n".join([title, "", *lines]))
    return "\n\n".join(parts)


def league(frame: pd.DataFrame, at: Sequence[int], metric: str = MAIN) -> str:
    """Markdown tables, one per setting and seed, of a row for each method.

    The columns are the metric at every budget (in brackets, with the computed steps, if these are not the budget); the
    metric against the fine reference, if there is one, at the budgets `at`; and, at the first of these budgets: the
    rank, the worst prompt, the paired difference to the best of the group, the reduction of FLOPs, the cost of
    calibration in full-step trajectories of one prompt, and the memory of the cache for a batch in MiB.
    """
    rows = board(frame, metric)
    apart, digits, parts = differences(rows, metric), column(metric).digits, []
    compared = at if fine_name(metric) in rows else ()
    for (*setting, seed), part in rows.groupby([*SETTING, "seed"]):
        budgets = sorted(part["budget"][part["method"] != FULL].unique())
        titles = [f"K = {budget}" for budget in budgets] + [f"K = {budget}, fine" for budget in compared]
        titles += [f"K = {at[0]}: rank", "worst prompt", "to the best of its group", "FLOPs", "trajectories", "MiB"]
        lines = [f"| group | method | {' | '.join(titles)} |", f"| --- | --- |{' ---: |' * len(titles)}"]
        for label in dict.fromkeys(sorted(part["label"], key=order)):
            runs = {row.budget: row for row in part[part["label"] == label].itertuples()}
            if full := all(row.method == FULL for row in runs.values()):  # which has no budget
                runs = dict.fromkeys(at, next(iter(runs.values())))
            cells = []
            for budget in budgets:
                text = _number(getattr(runs.get(budget), metric, None), digits) if not full else "–"
                apart_from_budget = text != "–" and not runs[budget].equal_compute
                cells.append(f"({text}: {runs[budget].computed_steps:.1f} steps)" if apart_from_budget else text)
            cells += [_number(getattr(runs.get(budget), fine_name(metric), None), digits) for budget in compared]
            cells += ["–"] * 6 if full or at[0] not in runs else _at(runs[at[0]], metric, apart, digits)
            lines.append(f"| {about(label).group.value} | {_cell(label)} | {' | '.join(cells)} |")
        seeds = f", seed {seed}" if rows["seed"].nunique() > 1 else ""
        title = f"### {column(metric).title}: {heading(*setting)}{seeds}"
        parts.append("\n".join([title, "", *lines]))
    return "\n\n".join(parts)


def _at(run, metric: str, apart: Mapping[int, Mapping[str, Difference]], digits: int) -> list[str]:
    """The last columns of `league` of one run."""
    took, memory = getattr(run, "calibration_trajectories", None), getattr(run, "history", None)
    return [
        "–" if pd.isna(run.rank) else str(run.rank),
        _number(getattr(run, f"{metric}{WORST}", None), digits),
        _apart(apart[run.Index].get(run.group), digits),
        f"{_number(getattr(run, 'flops_speedup', None), 2)}x",
        f"{round(sum(took.values()), 1):g}" if isinstance(took, dict) else "–",
        _number(memory and memory / 2**20, 2),
    ]


def _cell(text: str) -> str:
    """A text of the user as a table cell, in which | is escaped."""
    return text.replace("\n", " ").replace("|", "\\|")


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "–" if value is None or pd.isna(value) else f"{value:{sign}.{digits}f}"


def _apart(d: Difference | None, digits: int) -> str:
    if d is None or d.low is None:
        return "–" if d is None else _number(d.mean, digits, "+")
    low, high = (_number(end, digits, "+") for end in (d.low, d.high))
    return f"{_number(d.mean, digits, '+')} [{low}, {high}]"


def published_table(frame: pd.DataFrame, published: Sequence[Mapping]) -> str:
    """Markdown tables, one per setting, of a paper's numbers beside the measured ones.

    Args:
        published: of every row `label` and `budget`, and the paper's numbers by column of the frame.
    """
    frame = newest(frame)
    names = list(dict.fromkeys(name for row in published for name in row if name not in ("label", "budget")))
    titles = [f"{column(name).title} {whose}" for name in names for whose in ("in the paper", "here")]
    parts = []
    for setting, part in frame.groupby(SETTING):
        lines = [f"### The paper's numbers and ours: {heading(*setting)}", "", f"| method | K | {' | '.join(titles)} |"]
        lines.append("|---|" + "---:|" * (1 + len(titles)))
        for row in published:
            same = part[part["label"] == row["label"]]
            if row["label"] != FULL:  # which has no budget
                same = same[same["budget"] == row["budget"]]
            cells = []
            for name in names:
                measured = pd.to_numeric(same[name]).mean() if name in same else np.nan
                for value in (row.get(name), measured):
                    cells.append("–" if value is None or np.isnan(value) else f"{value:.{column(name).digits}f}")
            lines.append(f"| {_cell(row['label'])} | {row['budget']} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
