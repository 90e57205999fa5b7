"""What a sweep does beyond its jobs: failures on record, the board at the end, and one process to do so among many.

Imported by every command, so torch and pandas wait until they are needed.
"""

import errno
import json
import os
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
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


def _writable(*folders: str) -> None:
    """Make the folders, or end the command with one line: Hydra would end it with a traceback."""
    for folder in map(Path, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            sys.exit(
                f"error: the folder {folder} cannot be made or written to ({error.strerror}): set another one by "
                "output_dir, or by hydra.run.dir or hydra.sweep.dir where these are set"
            )


class Board(Callback):
    """Hydra's callback around every run and sweep.

    Before it, makes their folders, and leaves one thread to each job of a launcher that starts all jobs at once, unless
    OMP_NUM_THREADS says otherwise; jobs on joblib and Ray are given their share of the cores by these. After a sweep,
    prints the PSNR table of its folder and leaves the whole board there as `leaderboard.csv`, `.md`, `.png` and
    `report.html`; then names its failed jobs, for which the exit code is 1.

    Args:
        against: a row of the board to which the others are compared in pairs.
    """

    def __init__(self, against: str | None = None):
        self.against, self.began = against, time.time()

    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        HydraConfig.instance().set_config(config)  # which the names of run folders depend on
        _writable(config.output_dir, config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        _writable(config.output_dir, config.hydra.sweep.dir)
        if config.hydra.launcher._target_.endswith("LocalLauncher"):  # of submitit, which starts all jobs at once
            os.environ.setdefault("OMP_NUM_THREADS", str(config.hydra.launcher.cpus_per_task or 1))

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
