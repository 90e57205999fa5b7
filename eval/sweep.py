"""What a sweep does beyond its jobs: failures on record, and the board at the end.

Imported by every command, so torch and pandas wait until they are needed.
"""

import json
import sys
import time
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

FAILURE = "error.json"


def fail(folder: Path, error: str) -> None:
    """Put a job's failure on record in its run folder, where the board finds it until the job succeeds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).write_text(json.dumps({"error": error, "time": time.time()}))


def succeed(folder: Path) -> None:
    """An earlier failure of this job is history."""
    (folder / FAILURE).unlink(missing_ok=True)


class Board(Callback):
    """Hydra's callback around a sweep: ends it with the PSNR table of its folder, printed, and there the whole board as
    `leaderboard.csv`, `.md`, `.png` and `report.html`; then its failed jobs, for which the exit code is 1.

    Args:
        against: a row of the board to which the others are compared in pairs.
    """

    def __init__(self, against: str | None = None):
        self.against, self.began = against, time.time()

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
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
