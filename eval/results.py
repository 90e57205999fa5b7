"""What `result.json` files hold: one as flat columns, those of a folder as one table; and what is known of columns."""

import json
import logging
import shlex
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from dpcache.errors import SettingError
from eval.methods import FULL, order, records
from eval.metrics import FINE, MAIN, METRICS, Column
from eval.schema import Group
from eval.setups import name_setups, name_variants
from eval.statistics import doubt, summarise, worst

log = logging.getLogger(__name__)

SETTING = ["model", "num_inference_steps", "setup"]  # results of different settings never share a table
SPEED = ("speedup", "transformer_speedup", "efficiency")  # measured, so a run may call them unreliable
WORST = "_worst"  # after a metric's name: its worst prompt
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


def objective(result: dict) -> float | None:
    """What a tuning sweep maximises: the mean of the main metric, but 0 for a run that computed more steps than its
    budget, which would otherwise always win. None where the metric is missing, which counts as a failure there."""
    if MAIN not in result.get("metrics", {}):
        return None
    return result["metrics"][MAIN]["mean"] if result["computed_steps"] <= result["budget"] + 0.5 else 0.0


def flatten(result: dict) -> dict:
    """One `result.json` as flat columns.

    Of a metric: mean, interval, count and worst prompt, as `psnr`, `psnr_lo`, `psnr_hi`, `psnr_n`, `psnr_worst`; the
    last only where every prompt has a score and it is known which is better. Of FLOPs: `flops_full`, `flops_cached`,
    ..., and `flops_speedup`, the first over the second. Of timing, memory and versions: the scalars under their own
    names (`speedup`, `peak_rss`, `torch`), and the range of the timed rounds as `speedup_lo`, `speedup_hi`. Everything
    else as it is, without the scores of every prompt.
    """
    groups = ("metrics", "timing", "memory", "versions", "per_prompt", "flops")
    row = {key: value for key, value in result.items() if key not in groups}
    for name, value in result["metrics"].items():
        row[name], (row[f"{name}_lo"], row[f"{name}_hi"]), row[f"{name}_n"] = value["mean"], value["ci95"], value["n"]
    for name, scores in result.get("per_prompt", {}).items():
        if name in result["metrics"] and column(name).higher_is_better is not None:
            row[f"{name}{WORST}"] = worst(scores, column(name).higher_is_better)
    if flops := result.get("flops"):
        row |= {f"flops_{name}": value for name, value in flops.items()}
        row["flops_speedup"] = flops["full"] / flops["cached"]
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
    (the run's own, without the changed settings that all runs of its method share, and with those in which runs of the
    same label differ), the `setup` within which it can be compared (see `eval.setups`), the `scores` of every prompt,
    the `command` that made it (None: not recorded), `path` and `written` (seconds, see `_written`).

    Files that cannot be read or are not results of this project are skipped with a warning that names them.
    """
    rows = []
    for path in sorted(Path(folder).rglob("result.json")):
        try:
            result = json.loads(path.read_text())
            row = flatten(result)
            if missing := {"model", "method", "budget", "num_inference_steps", "seed", "computed_steps"} - row.keys():
                raise ValueError(f"lacks {sorted(missing)}")
            scores = result.get("per_prompt", {})
            found = {"command": command(path.parent), "path": str(path), "written": _written(path, result)}
            rows.append({"label": row["method"]} | row | {"scores": scores} | found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("skipped %s: %s: %s", path, type(error).__name__, error)
    for method in {row["method"] for row in rows}:
        same = [row for row in rows if row["label"].split()[0] == row["method"] == method]
        shared = set.intersection(*(set(row["label"].split()[1:]) for row in same)) if same else set()
        for row in same:
            row["label"] = " ".join(word for word in row["label"].split() if word not in shared)
    for row in rows:
        if row["label"].split()[0] == FULL != row["method"]:
            row["label"] = f"{row['method']} {row['label']}"  # the name is that of the full steps
    name_setups(rows)
    name_variants(rows)
    return pd.DataFrame(rows)


def _written(path: Path, result: dict) -> float:
    """The time at which a run ended, in seconds. Results of earlier versions do not hold it. For them it is the time of
    the pictures, which `stage=eval`, unlike `result.json`, does not write again."""
    if "ended" in result:
        return datetime.fromisoformat(result["ended"]).timestamp()
    picture = path.with_name("grid.png")
    return (picture if picture.exists() else path).stat().st_mtime


def command(folder: Path) -> str | None:
    """The command that makes the run again, from the settings that Hydra has written to its folder; None without."""
    try:
        overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return None
    return shlex.join(["python", "run.py", *overrides])


def plain_runs(folder: Path, result: dict) -> list[dict]:
    """Finished runs beside a run's `folder` that sampled the same prompts and noise without a cache: with all steps, or
    on another grid of as many steps as the run's budget."""
    found = {}
    for name in (name for name, known in records().items() if known.group is Group.plain and name != result["method"]):
        for path in sorted(folder.parent.glob(f"{result['model']}-{name}-*/result.json")):
            try:
                other = json.loads(path.read_text())
                same = ("model", "method", "num_inference_steps", "reference")
                alike = [other[key] for key in same] == [result["model"], name, *(result[key] for key in same[2:])]
                if alike and (name == FULL or other["budget"] == result["budget"]) and other["metrics"]:
                    found[name] = other
            except (OSError, ValueError, KeyError, TypeError):  # not a result, or of an older version
                continue
    return [found[name] for name in sorted(found, key=order)]


def column(name: str) -> Column:
    """The record of a metric, of its worst prompt or of a measured column; of any other name, as results of other
    versions may have, one without more than the name."""
    known = {**METRICS, **FINE, **MEASURED}
    if name.endswith(WORST) and (base := known.get(name.removesuffix(WORST))):
        return replace(base, name=name, label=f"{base.label}, worst prompt")
    return known.get(name) or Column(name=name, label=name, higher_is_better=None)


def metric_names(frame: pd.DataFrame) -> list[str]:
    """The metrics that a run of the frame has, or could not have, in the order of `METRICS`; unknown ones last."""
    names = [name[:-2] for name in frame if name.endswith("_n") and f"{name[:-2]}_lo" in frame]
    for reasons in frame.get("metrics_unavailable", ()):
        names += reasons if isinstance(reasons, dict) else ()
    known = [name for name in (*METRICS, *FINE) if name in names]
    return known + sorted(set(names) - set(known))


def numbers(frame: pd.DataFrame) -> list[str]:
    """The columns that a table can show: numbers, but for what names a run and what belongs to another column."""
    names = [str(name) for name in frame.select_dtypes("number")]
    named = ("num_inference_steps", "budget", "seed", "batch_size", "written")
    parts = {f"{name}{end}" for name in names for end in ("_n", "_lo", "_hi")}
    return [name for name in names if name not in named and name not in parts]


def main_metric(frame: pd.DataFrame) -> str | None:
    """The metric by which the board ranks: `MAIN` or, where no run has it, the first that one has; None without any."""
    return next((name for name in (MAIN, *metric_names(frame)) if name in frame), None)


def against_full(name: str) -> bool:
    return name in METRICS and METRICS[name].against_full


def newest(frame: pd.DataFrame) -> pd.DataFrame:
    """Of runs that repeat a (setting, label, budget, seed) the newest: labels tell runs of other settings apart."""
    return frame.sort_values("written").drop_duplicates([*SETTING, "label", "budget", "seed"], keep="last")


def heading(model: str, total: int, setup: str) -> str:
    """Names a setting."""
    return ", ".join(filter(None, (model, f"{total} steps", setup)))


def boards(frame: pd.DataFrame, metric: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """For every setting its heading and a frame indexed by label with columns `budget, mean, lo, hi, unreliable`. The
    last one is true for a speed on which the timed rounds disagree.

    Of runs that repeat a (setting, label, budget, seed) the newest counts. With one seed these are the run's own mean
    and interval. Several are averaged, see `_averaged`.
    """
    if metric not in frame:
        raise SettingError(f"no result has {metric!r}; columns are {sorted(frame.columns)}")
    frame = newest(frame).assign(mean=pd.to_numeric(frame[metric]))
    doubted = metric in SPEED and "unreliable" in frame
    frame = frame.assign(unreliable=frame["unreliable"].notna() if doubted else False)
    frame = frame[frame["mean"].notna() | frame["unreliable"]]
    for end in ("lo", "hi"):
        frame[end] = pd.to_numeric(frame[f"{metric}_{end}"]) if f"{metric}_{end}" in frame else np.nan
    for setting, part in frame.groupby(SETTING):
        rows = [
            {"label": label, "budget": budget, **_averaged(runs, metric)}
            for (label, budget), runs in part.groupby(["label", "budget"])
        ]
        rows.sort(key=lambda row: (order(row["label"]), row["budget"]))
        yield heading(*setting), pd.DataFrame(rows).set_index("label")


def _averaged(runs: pd.DataFrame, metric: str) -> dict:
    """Mean and interval of runs that differ in their seeds.

    The scores of a prompt are alike in all seeds, so each prompt is averaged first, and the interval is that of the
    prompts. Where scores are missing, as of speeds and sets of images, it is as wide as those of the runs.
    """
    unreliable, scores = bool(runs["unreliable"].any()), [own.get(metric) for own in runs["scores"]]
    if len(runs) > 1 and all(scores) and len({tuple(own["prompts"]) for own in runs["scores"]}) == 1:
        found = summarise(np.mean(scores, axis=0))
        low, high = (np.nan if end is None else end for end in found["ci95"])
        return {"mean": found["mean"], "lo": low, "hi": high, "unreliable": unreliable}
    return {name: runs[name].mean(skipna=False) for name in ("mean", "lo", "hi")} | {"unreliable": unreliable}
