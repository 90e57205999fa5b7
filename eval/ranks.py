"""Ranks the rows of the board at equal compute, and compares each row with the best of every group."""

from typing import NamedTuple

import pandas as pd

from eval.methods import FULL, about, order
from eval.metrics import MAIN
from eval.results import SETTING, column, newest
from eval.statistics import paired_differences

PLACE = [*SETTING, "seed", "budget"]  # runs of one place compete


class Difference(NamedTuple):
    """How far a run is from another one, `label`, over the same prompts and noise, with the paired 95 % interval, which
    is None for a single prompt."""

    label: str
    mean: float
    low: float | None
    high: float | None


def board(frame: pd.DataFrame, metric: str = MAIN) -> pd.DataFrame:
    """The rows of the board: of repeated runs the newest, in the order of settings, budgets, groups and methods.

    Adds `group`; `equal_compute`, false where the computed steps are not the budget; and `rank`, 1 for the best mean of
    the metric among the runs of the same setting, seed and budget. Full steps, runs at unequal compute and those
    without the metric have no rank, and none has one where it is not known whether higher is better.
    `full` has no budget: it is one row per setting and seed, with all T steps as its budget.
    """
    full = frame["method"] == FULL
    frame = newest(frame.assign(budget=frame["budget"].where(~full, frame["num_inference_steps"])))
    equal = (frame["computed_steps"] - frame["budget"]).abs() <= 0.5
    frame = frame.assign(group=[about(label).group.value for label in frame["label"]], equal_compute=equal, rank=pd.NA)
    higher = column(metric).higher_is_better
    if metric in frame and higher is not None:
        value = pd.to_numeric(frame[metric]).where(equal & (frame["method"] != FULL))
        ranks = value.groupby([frame[name] for name in PLACE]).rank(method="min", ascending=not higher)
        frame["rank"] = ranks.astype("Int64")
    keys = {
        row.Index: (*(getattr(row, name) for name in (*SETTING, "budget")), order(row.label), row.seed)
        for row in frame.itertuples()
    }
    return frame.loc[sorted(keys, key=keys.get)]


def differences(rows: pd.DataFrame, metric: str = MAIN) -> dict[int, dict[str, Difference]]:
    """For every row of `board(frame, metric)`, by its index, the differences to the best row of every group with the
    same setting, seed and budget. Left out are full-step rows, rows without scores per prompt, and a row's difference
    to itself."""
    found = {index: {} for index in rows.index}
    for _, part in rows[rows["method"] != FULL].groupby(PLACE):
        scored = [row for row in part.sort_values("rank").itertuples() if metric in row.scores]
        best = {row.group: row for row in reversed(scored) if not pd.isna(row.rank)}
        for group, first in best.items():
            alike = [row for row in scored if row.scores["prompts"] == first.scores["prompts"] and row is not first]
            values = [row.scores[metric] for row in alike]
            for row, d in zip(alike, paired_differences(values, first.scores[metric])):
                found[row.Index][group] = Difference(first.label, d["mean"], *d["ci95"])
    return found
