"""Failed runs on record: `error.json` in a run folder. Imported by every command, so it needs nothing slow to load."""

import json
import time
from pathlib import Path

from eval.files import write_text
from eval.processes import main_process

FAILURE = "error.json"


def record(folder: Path, error: str) -> None:
    """Put a job's failure on record in its run folder, where the board finds it until the job succeeds. Only the main
    process does so: what a helping process could not do, the main one has to do itself."""
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
    """`{"run", "error"}` of every run folder without a result: the error is what `record` left there, or None
    where there is nothing, which is a run that was killed or still goes on."""
    found = {}
    for name in (".hydra", FAILURE):  # Hydra makes the first one before anything can fail
        for path in Path(folder).rglob(name):
            if not (path.parent / "result.json").exists():
                found[path.parent] = None if name == ".hydra" else _error(path)
    return [{"run": run.name, "error": error} for run, error in sorted(found.items())]


def _error(path: Path) -> str:
    text = path.read_text(errors="replace")
    try:
        return str(json.loads(text)["error"]).strip()
    except (ValueError, KeyError, TypeError):
        return text.strip()
