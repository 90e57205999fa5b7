"""What Hydra does around the jobs of a sweep: folders and threads before, the board and the failures after.

Imported by every command, so torch and pandas wait until they are needed.
"""

import errno
import os
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from eval import failures
from eval.processes import main_process


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
        from eval import charts, report, results, tables

        folder = Path(config.hydra.sweep.dir)
        frame = results.collect(folder)
        if "psnr" in frame:
            print(tables.table(frame), end="\n\n")
            if self.against in set(frame["label"]):
                print(tables.paired_table(frame, self.against), end="\n\n")
            picture = charts.figure(folder / "leaderboard.png", frame)
            print(*report.write(folder, folder, frame), picture, sep="\n")
        failed = failures.since(self.began, folder)
        for name, error in failed.items():
            print(f"failed: {name}: {error}", file=sys.stderr)
        if failed:
            sys.exit(1)
