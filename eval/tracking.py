"""W&B logging. Losing a log must never lose a run: whatever W&B raises becomes one warning, and waiting is limited."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import wandb

from eval.leaderboard import flatten

log_ = logging.getLogger(__name__)

INIT_TIMEOUT, FINISH_TIMEOUT = 60.0, 120.0  # seconds


@contextmanager
def _harmless(action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # see the module's docstring
        log_.warning("W&B could not %s: %s: %s", action, type(error).__name__, " ".join(str(error).split()))


def start(
    project: str,
    config: dict,
    name: str | None = None,
    group: str | None = None,
    folder: str | Path = ".",
    mode: str | None = None,
) -> wandb.Run | None:
    """Starts a run that keeps its files in `folder/wandb`; None when that failed, which `log` and `finish` accept.

    mode: "online", "offline" or "disabled". None takes $WANDB_MODE, else "online" where an API key is configured and
    "offline" where not, without asking. A server out of reach turns "online" into "offline": `wandb sync` uploads the
    run later, from the same machine, as W&B keeps the images of tables in its own data folder ($WANDB_DATA_DIR).
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with _harmless("look for an API key"):
        mode = mode or os.environ.get("WANDB_MODE")
        mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    for attempt in dict.fromkeys((mode or "offline", "offline")):
        with _harmless(f"start a run ({attempt})"):
            settings = wandb.Settings(init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT)
            return wandb.init(
                project=project,
                config=config,
                name=name,
                group=group,
                dir=folder,
                mode=attempt,
                reinit="finish_previous",
                settings=settings,
            )
    return None


def log(
    run: wandb.Run | None,
    result: dict,
    pictures: dict[str, str | Path] | None = None,
    rows: Iterable[tuple[str, np.ndarray, np.ndarray, float]] = (),
) -> None:
    """Logs what `result.json` holds, picture files by name, and a table of samples.

    `rows`: (prompt, reference image, accelerated image, PSNR in dB); images uint8 (H, W, 3).
    """
    if run is None:
        return
    with _harmless("log the result"):
        flat = flatten(result)
        run.log({key: value for key, value in flat.items() if isinstance(value, (int, float))})
        run.summary.update({key: value for key, value in flat.items() if isinstance(value, (str, list, dict))})
    with _harmless("log pictures"):
        run.log({key: wandb.Image(str(path)) for key, path in (pictures or {}).items()})
    with _harmless("log the table of samples"):
        table = wandb.Table(columns=["prompt", "reference", "accelerated", "psnr"])
        for prompt, *images, psnr in rows:
            table.add_data(prompt, *(wandb.Image(np.asarray(image)) for image in images), psnr)
        if table.data:
            run.log({"samples": table})


def finish(run: wandb.Run | None) -> None:
    """Ends the run; waits at most `FINISH_TIMEOUT` seconds for uploads."""
    if run is not None:
        with _harmless("finish the run"):
            run.finish()
