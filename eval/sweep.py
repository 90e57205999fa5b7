"""A callback for Hydra. Before a run or sweep it prepares folders and threads, after a sweep it writes the board and
names the jobs that failed.

Every command imports this file, so modules that load torch or pandas are imported only where they are used.
"""

import errno
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeperConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, read_write

from eval import failures
from eval.processes import main_process


def group(hydra: DictConfig) -> str | None:
    """The name of a sweep: its experiment or, without one, its folder. None for a single run."""
    if hydra.mode is not RunMode.MULTIRUN:
        return None
    return hydra.runtime.choices.get("experiment") or Path(hydra.sweep.dir).name


def _writable(*folders: str) -> None:
    """Makes the folders. Where this fails, the command ends with one line instead of Hydra's traceback."""
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

    Before them it makes the folders. Hydra's own sweeper gives way to one that orders the jobs by model. Submitit's
    local launcher starts all jobs at once, so there each job gets one thread, unless OMP_NUM_THREADS is set; joblib and
    Ray share the cores among their jobs themselves. After a sweep it prints ranks and tables of the main metric (or,
    where no run has it, of the first), writes the board into the sweep's folder (`leaderboard.csv`, `.md`, `.png` and
    `report.html`), prints the errors of failed jobs and, if there are any or if the board could not be made, ends the
    command with status 1.

    Args:
        against: a row of the board; the paired differences of the others to it are printed too.
        published: a paper's numbers, which are printed beside the measured ones, see `eval.tables.published_table`.
    """

    def __init__(self, against: str | None = None, published: Sequence[Mapping] = ()):
        self.against, self.published, self.began = against, published, time.time()

    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        HydraConfig.instance().set_config(config)  # the name of the run folder is resolved from it
        _writable(config.output_dir, config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        _writable(config.output_dir, config.hydra.sweep.dir)
        if config.hydra.sweeper._target_ == BasicSweeperConf._target_:
            with read_write(config.hydra):
                config.hydra.sweeper._target_ = "hydra_plugins.dpcache_sweeper.ModelByModel"
        if config.hydra.launcher._target_.endswith("LocalLauncher"):  # of submitit, which starts all jobs at once
            os.environ.setdefault("OMP_NUM_THREADS", str(config.hydra.launcher.cpus_per_task or 1))

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        if not main_process():
            return
        folder, broken = Path(config.hydra.sweep.dir), False
        try:
            self._board(folder)
        except Exception:  # of which Hydra would make a warning, and the command would end well
            traceback.print_exc()
            print(f"error: no board of {folder}: python -m eval.leaderboard {folder} tries again", file=sys.stderr)
            broken = True
        failed = failures.since(self.began, folder)
        for name, error in failed.items():
            print(f"failed: {name}: {error}", file=sys.stderr)
        if failed or broken:
            sys.exit(1)

    def _board(self, folder: Path) -> None:
        """Prints the tables and writes the board."""
        from eval import charts, metrics, report, results, tables

        frame = results.collect(folder)
        main = results.main_metric(frame)
        if main is None and len(frame):
            print(f"no tables: no run in {folder} has a metric", end="\n\n")
            print(*report.write(folder, folder, frame), sep="\n")
        if main is not None:
            for metric in (main, metrics.fine_name(main)):
                if metric in frame:
                    if ranking := tables.ranking(frame, metric):
                        print(ranking, end="\n\n")
                    print(tables.table(frame, metric), end="\n\n")
                    if self.against in set(frame["label"]):
                        print(tables.paired_table(frame, self.against, metric), end="\n\n")
            if self.published:
                print(tables.published_table(frame, self.published), end="\n\n")
            picture = charts.figure(folder / "leaderboard.png", frame, main)
            print(*report.write(folder, folder, frame), picture, sep="\n")
