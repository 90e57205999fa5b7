"""What a sweep does beyond its jobs: failures on record, the board at the end, and one process to do so among many.

Imported by every command, so torch and pandas wait until they are needed.
"""

import json
import os
import sys
import time
from pathlib import Path

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from eval.files import write_text

FAILURE = "error.json"


def main_process() -> bool:
    """False in the processes of `accelerate launch` that only help to sample."""
    return os.environ.get("RANK", "0") == "0"


def fail(folder: Path, error: str) -> None:
    """Put a job's failure on record in its run folder, where the board finds it until the job succeeds. What a helping
    process could not do, the main one does or fails at."""
    if not main_process():
        return
    write_text(folder / FAILURE, json.dumps({"error": error, "time": time.time()}))


def succeed(folder: Path) -> None:
    """An earlier failure of this job is history."""
    if main_process():
        (folder / FAILURE).unlink(missing_ok=True)


def objective(result: dict) -> float | None:
    """What a tuning sweep maximises: the mean PSNR, but 0 for a run that computed more steps than its budget, which
    would otherwise always win. None without a PSNR, which counts as a failure there."""
    if "psnr" not in result.get("metrics", {}):
        return None
    return result["metrics"]["psnr"]["mean"] if result["computed_steps"] <= result["budget"] + 0.5 else 0.0


def group(hydra: DictConfig) -> str | None:
    """The name that all runs of one sweep share: its experiment, else its folder. None for a single run."""
    if hydra.mode is not RunMode.MULTIRUN:
        return None
    return hydra.runtime.choices.get("experiment") or Path(hydra.sweep.dir).name


class Board(Callback):
    """Hydra's callback around a sweep: ends it with the PSNR table of its folder, printed, and there the whole board as
    `leaderboard.csv`, `.md`, `.png` and `report.html`; then its failed jobs, for which the exit code is 1.

    Args:
        against: a row of the board to which the others are compared in pairs.
    """

    def __init__(self, against: str | None = None):
        self.against, self.began = against, time.time()

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        if not main_process():
            return
        from eval import leaderboard, report

        folder = Path(config.hydra.sweep.dir)
        frame = leaderboard.collect(folder)
        if "psnr" in frame:
            print(leaderboard.table(frame), end="\n\n")
            if self.against in set(frame["label"]):
                print(leaderboard.paired_table(frame, self.against), end="\n\n")
            picture = leaderboard.figure(folder / "leaderboard.png", frame)
            print(*report.write(folder, folder, frame), picture, sep="\n")
        failures = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{FAILURE}"))}
        failures = {name: failure["error"] for name, failure in failures.items() if failure["time"] >= self.began}
        for name, error in failures.items():
            print(f"failed: {name}: {error}", file=sys.stderr)
        if failures:
            sys.exit(1)
