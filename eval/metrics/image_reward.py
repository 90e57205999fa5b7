"""ImageReward, a learned human preference score (Xu et al., arXiv 2304.05977), by a process of its own.

The `image-reward` package needs versions that cannot live beside ours, so `image_reward_scorer.py` runs in an
environment that uv creates on first use (about 6.5 GB) and keeps in its cache; after that no network is needed.
Whatever becomes of that process, this one only ever sees an exception whose message is one line.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from eval.metrics.base import Samples, Scorer, Settings, Unavailable

SCORER = Path(__file__).with_name("image_reward_scorer.py")
TIMEOUT = 6 * 3600.0


def load(settings: Settings) -> Scorer:
    """`image_reward` with the weights of the settings, after a check that it can run.

    Raises Unavailable where the environment or the weights cannot be had.
    """
    options = {"weights": settings.image_reward_weights, "device": str(settings.device)}
    try:
        check(**options)
    except (RuntimeError, TimeoutError) as error:
        raise Unavailable(str(error)) from error
    return partial(image_reward, **options)


def image_reward(sample: Samples, reference: Samples | None = None, **options) -> Tensor:
    """ImageReward of each image for its prompt, float64 (N,), without unit: higher is better. No reference is used.

    Args:
        options: as for `score`.

    Raises:
        ValueError: videos; images that could not be scored, by name and reason.
        RuntimeError, TimeoutError: as `score`.
    """
    if sample.images.ndim == 5:
        raise ValueError("ImageReward scores images, not videos")
    with tempfile.TemporaryDirectory(prefix="image_reward_") as folder:
        paths = [Path(folder) / f"{index:04d}.png" for index in range(len(sample.images))]
        for path, image in zip(paths, sample.images, strict=True):
            Image.fromarray(image.numpy()).save(path)
        scores, errors = score(paths, sample.prompts, **options)
    if errors:
        named = "; ".join(f"{path.name}: {reason}" for path, reason in errors.items())
        raise ValueError(f"{len(errors)} of {len(scores)} images could not be scored: {named}")
    return scores


def score(
    images: Iterable[str | Path],
    prompts: Iterable[str],
    *,
    weights: str | Path | None = None,
    device: str | None = None,
    batch_size: int = 16,
    timeout: float = TIMEOUT,
    random_weights: int | None = None,
) -> tuple[Tensor, dict[Path, str]]:
    """Scores of N image files for their N prompts, all by one process.

    Args:
        weights: a folder that holds ImageReward.pt, or that file (default: from the hub, into its cache).
        device: torch device (default: cuda where there is one, else cpu).
        timeout: seconds that each step may take: creating the environment, and scoring.
        random_weights: a seed for random weights, which make scores without meaning, for tests.

    Returns:
        Scores, float64 (N,), NaN for an image that could not be scored; and the reason by path for each of those.

    Raises:
        RuntimeError: uv is not installed, the environment cannot be created, the weights cannot be had (with the
            command that fetches them), or the scorer died.
        TimeoutError: a step took too long.
    """
    uv = _uv()
    images = [Path(image) for image in images]
    pairs = [{"path": str(image.absolute()), "prompt": prompt} for image, prompt in zip(images, prompts, strict=True)]
    chosen = {"--weights": weights, "--device": device, "--batch-size": batch_size, "--random-weights": random_weights}
    flags = [f"{flag}={value}" for flag, value in chosen.items() if value is not None]
    _create_environment(uv, timeout)
    with tempfile.TemporaryDirectory(prefix="image_reward_") as folder:
        request, result = Path(folder) / "request.json", Path(folder) / "result.json"
        request.write_text(json.dumps({"images": pairs}), encoding="utf-8")
        # Offline is about uv: the environment is used as it is, and the index is not asked again.
        command = [uv, "run", "--offline", "--script", str(SCORER), str(request), str(result), *flags]
        _run(command, timeout, "the ImageReward scorer")
        try:
            answer = json.loads(result.read_text(encoding="utf-8"))
            if missing := answer.get("unavailable"):
                raise RuntimeError(f"{missing['reason']}; to fetch the weights: {missing['command']}")
            values = [float(entry.get("score", "nan")) for entry in answer["images"]]
            errors = {image: entry["error"] for image, entry in zip(images, answer["images"]) if "error" in entry}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RuntimeError(f"the ImageReward scorer left no readable result: {error}") from error
    if len(values) != len(images):
        raise RuntimeError(f"the ImageReward scorer answered for {len(values)} of {len(images)} images")
    return torch.tensor(values, dtype=torch.float64), errors


def check(**options) -> None:
    """Create the environment and load the weights, so that what is missing shows before any sampling.

    Args and errors as for `score`.
    """
    score([], [], **options)


def _uv() -> str:
    """Path of the uv executable, on the PATH or from the `uv` package. Raises RuntimeError."""
    if path := shutil.which("uv"):
        return path
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError):
        raise RuntimeError("ImageReward runs in an environment that uv makes: pip install uv") from None


def _create_environment(uv: str, timeout: float) -> None:
    """Create the scorer's environment where it is not there yet."""
    sync = [uv, "sync", "--quiet", "--script", str(SCORER)]
    if subprocess.run([*sync, "--offline"], capture_output=True, env=_environment()).returncode:
        sync.remove("--quiet")  # gigabytes are on their way
        _run(sync, timeout, "creating ImageReward's environment")


def _environment() -> dict[str, str]:
    """Our environment variables, except those that would lead Python to our own packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _run(command: list[str], timeout: float, what: str) -> None:
    """Run to the end with its output on our stderr. Raises RuntimeError, TimeoutError."""
    output = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    output |= {"text": True, "errors": "replace"}
    last = ""

    def forward():
        nonlocal last
        for line in process.stdout:
            sys.stderr.write(line)
            if not last.startswith("error:"):  # uv's reason, which its causes follow; a traceback's is at the end
                last = line.strip() or last

    # A session of its own, so that uv and the Python below it can be stopped together.
    with subprocess.Popen(command, **output, env=_environment(), start_new_session=True) as process:
        reader = threading.Thread(target=forward, daemon=True)
        reader.start()
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{what} took more than {timeout:g} s and was stopped") from None
        finally:
            if process.returncode != 0:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            reader.join()
    if code:
        number = -code if code < 0 else code - 128  # uv passes its child's signal on as 128 + number, as a shell does
        by_signal = number in set(signal.Signals)
        how = f"was killed by {signal.Signals(number).name}" if by_signal else f"failed with exit status {code}"
        raise RuntimeError(f"{what} {how}" + (f": {last}" if last else ""))
