"""Loggers of runs, one of which `conf/logger` chooses. A failure of a logger must not end a run: every error that W&B
raises becomes one warning, and waiting for its server is limited."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

INIT_TIMEOUT, FINISH_TIMEOUT = 60.0, 120.0  # seconds


class Logger:
    """The interface of all loggers. This one does nothing."""

    def start(self, config: dict, name: str, group: str, folder: str | Path) -> None:
        """The run begins.

        Args:
            config: the composed settings.
            name, group: of the run, and of those that belong together.
            folder: the run's own, in which the logger may keep files.
        """

    def log(
        self,
        result: dict,
        pictures: dict[str, str | Path] | None = None,
        rows: Iterable[tuple[str, np.ndarray, np.ndarray, float]] = (),
    ) -> None:
        """The run has its result.

        Args:
            result: what `result.json` holds.
            pictures: files by name.
            rows: (prompt, reference image, accelerated image, score by the main metric); images uint8 (H, W, 3).
        """

    def finish(self) -> None:
        """The run ends."""


class Wandb(Logger):
    """Weights & Biases.

    Args:
        group: instead of the group that `start` is given.
        mode: "online", "offline" or "disabled". None takes $WANDB_MODE, else "online" where an API key is configured
            and "offline" where not, without asking. A server out of reach turns "online" into "offline": `wandb sync`
            uploads the run later, from the same machine, as W&B keeps the images of tables in its own data folder
            ($WANDB_DATA_DIR).
    """

    def __init__(self, project: str, group: str | None = None, mode: str | None = None):
        self.project, self.group, self.mode = project, group, mode
        self.run = None  # until it starts, and where that failed

    def start(self, config: dict, name: str, group: str, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        mode = self.mode or os.environ.get("WANDB_MODE")
        with _harmless("look for an API key"):
            import wandb  # imported here: it takes a second, which other runs need not wait for

            mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        for attempt in dict.fromkeys((mode or "offline", "offline")):
            with _harmless(f"start a run ({attempt})"):
                settings = wandb.Settings(init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT)
                self.run = wandb.init(
                    project=self.project,
                    config=config,
                    name=name,
                    group=self.group or group,
                    dir=folder,
                    mode=attempt,
                    reinit="finish_previous",
                    settings=settings,
                )
                return

    def log(self, result: dict, pictures: dict[str, Path] | None = None, rows: Sequence[tuple] = ()) -> None:
        if self.run is None:
            return
        import wandb

        from eval.metrics import MAIN
        from eval.results import flatten

        with _harmless("log the result"):
            flat = flatten(result)
            self.run.log({key: value for key, value in flat.items() if isinstance(value, (int, float))})
            self.run.summary.update({key: value for key, value in flat.items() if isinstance(value, (str, list, dict))})
        with _harmless("log pictures"):
            self.run.log({key: wandb.Image(str(path)) for key, path in (pictures or {}).items()})
        with _harmless("log the table of samples"):
            table = wandb.Table(columns=["prompt", "reference", "accelerated", MAIN])
            for prompt, *images, score in rows:
                table.add_data(prompt, *(wandb.Image(np.asarray(image)) for image in images), score)
            if table.data:
                self.run.log({"samples": table})

    def finish(self) -> None:
        """Waits at most `FINISH_TIMEOUT` seconds for uploads."""
        if self.run is not None:
            with _harmless("finish the run"):
                self.run.finish()


@contextmanager
def _harmless(action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # see the module's docstring
        log.warning("W&B could not %s: %s: %s", action, type(error).__name__, " ".join(str(error).split()))
