"""Records of failed runs: `error.json` in a run folder. Every command imports this file, so it imports nothing slow."""

import json
import time
from pathlib import Path

from eval.files import write_text
from eval.processes import main_process

FAILURE = "error.json"
NOT_RUNS = ("dry_runs", "evaluations")
"""Folders in which Hydra notes other commands, see `eval.schema.run_name`."""


def record(folder: Path, error: str) -> None:
    """Writes a job's error into its run folder, where the board finds it until the job succeeds. Only the main process
    (rank 0) does so: if another process fails, the main one makes the missing samples itself, or fails too."""
    if main_process():
        write_text(folder / FAILURE, json.dumps({"error": error, "time": time.time()}))


def clear(folder: Path) -> None:
    """Forget an earlier failure of this job, which has now succeeded."""
    if main_process():
        (folder / FAILURE).unlink(missing_ok=True)


def since(began: float, folder: Path) -> dict[str, str]:
    """Errors by name of the run folders in `folder` that failed after `began`, in seconds since the epoch."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{FAILURE}"))}
    return {name: failure["error"] for name, failure in found.items() if failure["time"] >= began}


def unfinished(folder: str | Path) -> list[dict]:
    """`{"run", "error"}` of every run folder without a result. The error is what `record` wrote. None: it wrote
    nothing, because the run was killed or still goes on."""
    found = {}
    for name in (".hydra", FAILURE):  # Hydra makes the folder .hydra before anything can fail
        for path in Path(folder).rglob(name):
            if path.parent.name not in NOT_RUNS and not (path.parent / "result.json").exists():
                found[path.parent] = None if name == ".hydra" else _error(path)
    return [{"run": run.name, "error": error} for run, error in sorted(found.items())]


def _error(path: Path) -> str:
    text = path.read_text(errors="replace")
    try:
        return str(json.loads(text)["error"]).strip()
    except (ValueError, KeyError, TypeError):
        return text.strip()
