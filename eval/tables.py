"""The board as Markdown tables."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dpcache.errors import SettingError
from eval.methods import FULL, order
from eval.metrics import MAIN
from eval.ranks import PLACE, Difference, board, differences
from eval.results import SETTING, boards, column, newest
from eval.statistics import paired_difference


def table(frame: pd.DataFrame, metric: str = MAIN) -> str:
    """Markdown tables, one per setting: methods x budgets, mean ± half the width of the 95 % interval, of speeds
    half the range of the timed rounds, or "not reliable" where these disagree.

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
    for heading, rows in boards(frame, metric) if metric in frame or lost.empty else ():
        budgets = sorted(rows["budget"].unique())
        lines = [["method", *(f"K = {budget}" for budget in budgets)], ["---"] + ["---:"] * len(budgets)]
        for label in dict.fromkeys(rows.index):
            cells = {row["budget"]: cell(row) for _, row in rows.loc[[label]].iterrows()}
            lines.append([label, *(cells.get(budget, "–") for budget in budgets)])
        parts.append(
            f"### {column(metric).title}: {heading}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
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


def ranking(frame: pd.DataFrame, metric: str = MAIN) -> str:
    """Markdown tables, one per setting, seed and budget: every run's rank, mean and worst prompt, and its paired
    differences to the best run of its own group and to the best of all. Empty where no run has a rank."""
    rows = board(frame, metric)
    apart, digits, parts = differences(rows, metric), column(metric).digits, []

    def number(value: float | None, sign: str = "") -> str:
        return "–" if value is None or pd.isna(value) else f"{value:{sign}.{digits}f}"

    def cell(d: Difference | None) -> str:
        if d is None or d.low is None:
            return "–" if d is None else number(d.mean, "+")
        return f"{number(d.mean, '+')} [{number(d.low, '+')}, {number(d.high, '+')}]"

    for (model, total, seed, budget), part in rows[rows["method"] != FULL].groupby(PLACE):
        ranked = part.sort_values("rank")
        if ranked["rank"].isna().all():
            continue
        first = ranked.iloc[0]["group"]
        lines = ["| rank | method | group | mean | worst prompt | to the best of its group | to the best |"]
        lines.append("| ---: | --- | --- | ---: | ---: | ---: | ---: |")
        for row in ranked.itertuples():
            to = apart[row.Index]
            cells = [number(getattr(row, metric)), number(getattr(row, f"{metric}_worst", None))]
            cells += [cell(to.get(row.group)), cell(to.get(first))]
            rank = "–" if pd.isna(row.rank) else row.rank
            lines.append(f"| {rank} | {row.label} | {row.group} | {' | '.join(cells)} |")
        seeds = f", seed {seed}" if rows["seed"].nunique() > 1 else ""
        heading = f"### Ranks by {column(metric).title}: {model}, {total} steps{seeds}, K = {budget}"
        parts.append("\n".join([heading, "", *lines]))
    return "\n\n".join(parts)


def published_table(frame: pd.DataFrame, published: Sequence[Mapping]) -> str:
    """Markdown table of a paper's numbers beside the measured ones.

    Args:
        published: of every row `label` and `budget`, and the paper's numbers by column of the frame.
    """
    frame = newest(frame)
    names = list(dict.fromkeys(name for row in published for name in row if name not in ("label", "budget")))
    titles = [f"{column(name).title} {whose}" for name in names for whose in ("in the paper", "here")]
    lines = ["### The paper's numbers and ours", "", f"| method | K | {' | '.join(titles)} |"]
    lines.append("|---|" + "---:|" * (1 + len(titles)))
    for row in published:
        same = frame[frame["label"] == row["label"]]
        if row["label"] != FULL:  # which has no budget
            same = same[same["budget"] == row["budget"]]
        cells = []
        for name in names:
            measured = pd.to_numeric(same[name]).mean() if name in same else np.nan
            for value in (row.get(name), measured):
                cells.append("–" if value is None or np.isnan(value) else f"{value:.{column(name).digits}f}")
        lines.append(f"| {row['label']} | {row['budget']} | {' | '.join(cells)} |")
    return "\n".join(lines)
