"""What a run prints: a line for each of its phases, and at the end a table of the run and of its plain alternatives."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from eval.methods import FULL
from eval.processes import main_process
from eval.results import against_full, column
from eval.statistics import doubt


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Prints how long this part of a run took, once it is done. Only the main process prints."""
    began = time.perf_counter()
    yield
    if main_process():
        print(f"  {name:<22} {time.perf_counter() - began:.1f} s", flush=True)


def quiet_libraries() -> None:
    """Switches off the progress bars of diffusers and transformers, which would appear inside ours. Downloads keep
    their progress bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def summary(result: dict, folder: Path, plain: Sequence[dict] = ()) -> str:
    """The table that a run ends with.

    Args:
        result: what `result.json` holds, also of an earlier version.
        plain: results of the plain alternatives, as `eval.results.plain_runs` finds them.
    """
    of = f"{result['computed_steps']:g} of {result['num_inference_steps']} steps computed"
    lines = [f"{result['model']}  {result['method']}  {of}"]
    lines.append(f"  schedule               {result['schedules'][0]}")
    lines += _comparison(result, plain)
    for name, value in result["metrics"].items():
        if "warning" in value:
            lines.append(f"  {name:<22} {value['warning']}")
    for name, reason in result["metrics_unavailable"].items():
        lines.append(f"  {name:<22} unavailable: {reason}")
    if result["timing"]:
        lines += _timed(result["timing"])
    if flops := result.get("flops"):
        ratio = flops["full"] / flops["cached"]
        lines.append(f"  FLOPs per image        {flops['full']:.4g} -> {flops['cached']:.4g}, {ratio:.2f}x fewer")
    lines.append(f"  pictures, images       {folder}")
    return "\n".join(lines)


def _comparison(result: dict, plain: Sequence[dict]) -> list[str]:
    """The lines of a table: full steps, plain methods with as many steps, and this run with its intervals and
    counts."""
    T = result["num_inference_steps"]
    known = {other["method"]: other for other in plain} | {result["method"]: result}
    known = {FULL: known.get(FULL)} | known  # full steps are the first column, even if no such run is there
    steps = [T if run is None else run["computed_steps"] for run in known.values()]

    def value(name: str, run: dict | None, metric: str) -> str:
        if run is None or metric not in run["metrics"] or (name == FULL and against_full(metric)):
            return "–"
        return f"{run['metrics'][metric]['mean']:.{column(metric).digits}f}"

    rows = {"": [f"{name}, {count:g} steps" for name, count in zip(known, steps)]}
    for metric in result["metrics"]:
        rows[metric] = [value(name, run, metric) for name, run in known.items()]
    if result["timing"]:
        rows["speed-up"] = ["1.00x" if name == FULL else _speed(run) for name, run in known.items()]
    widths = [max(len(row[place]) for row in rows.values()) for place in range(len(known))]
    lines = []
    for name, cells in rows.items():
        line = "   ".join(cell.rjust(width) for cell, width in zip(cells, widths))
        lines.append(f"  {name:<22} {line}{_precision(name, result)}".rstrip())
    return lines


def _speed(run: dict) -> str:
    return f"{run['timing']['speedup']:.2f}x" if run["timing"] else "–"


def _precision(metric: str, result: dict) -> str:
    """The interval of the run's own mean and the number of samples."""
    if metric not in result["metrics"]:
        return ""
    value, digits = result["metrics"][metric], column(metric).digits
    low, high = value["ci95"]
    interval = "" if low is None else f"  [{low:.{digits}f}, {high:.{digits}f}]"
    against = f" against {value['reference_n']:,} images" if "reference_n" in value else ""
    return f"{interval}  n={value['n']}{against}"


def _timed(timed: dict) -> list[str]:
    """The lines on timing. They give an efficiency only where the rounds agree."""
    low, high = timed.get("speedup_range", (math.nan, math.nan))
    seconds = f"{timed['reference_s']:.2f} s -> {timed['cached_s']:.2f} s"
    lines = [f"  timing                 {timed['speedup']:.2f}x end to end ({seconds}), {low:.2f}x to {high:.2f}x"]
    if reason := doubt(timed):
        return [*lines, f"  {'':<22} not reliable: {reason}"]
    ideal, (low, high) = timed["ideal_speedup"], timed["transformer_speedup_range"]
    return [
        *lines,
        f"  transformer only       {timed['transformer_speedup']:.2f}x of {ideal:.2f}x ideal, efficiency"
        f" {timed['efficiency']:.2f}, {low / ideal:.2f} to {high / ideal:.2f}",
    ]
