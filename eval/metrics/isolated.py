"""Scorers whose packages conflict with ours: PEP 723 scripts, each in a process and an environment of its own.

uv creates the environment on first use and keeps it in its cache; after that no package index is needed. If the process
fails, hangs or dies, this one raises an exception with a message of one line.

A script is run as `SCRIPT REQUEST RESULT [--flag=value ...]`, two JSON files, and exits with 0 when it wrote RESULT:

    REQUEST  {"images": [{"path": "a.png", ...}, ...]}, or "videos"; an empty list only checks that nothing is missing
    RESULT   {"images": [{"path": "a.png", "score": 0.1}, {"path": "b.png", "error": "..."}, ...]} in the same order, or
             {"unavailable": {"reason": "...", "command": "what would fetch the weights"}}
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpcache.errors import SettingError
from eval.metrics.base import Unavailable

TIMEOUT = 6 * 3600.0


@dataclass(frozen=True)
class Script:
    """A scorer: what messages call it, its script, and what it scores, "images" or "videos"."""

    name: str
    path: Path
    kind: str

    def score(self, entries: list[dict], timeout: float = TIMEOUT, **flags) -> tuple[Tensor, dict[Path, str]]:
        """Scores of N files, all by one process.

        Args:
            entries: of each file its "path", and what else the script asks for.
            timeout: seconds that each step may take: creating the environment, and scoring.
            flags: of the script, where not None; `batch_size=4` is `--batch-size=4`.

        Returns:
            Scores, float64 (N,), NaN for a file that could not be scored; and the reason by path for each of those.

        Raises:
            RuntimeError: uv is not installed, the environment cannot be created, the weights are missing (with the
                command that fetches them), or the scorer died.
            TimeoutError: a step took too long.
        """
        self.create_environment(timeout)
        absolute = [entry | {"path": str(Path(entry["path"]).absolute())} for entry in entries]
        given = [f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items() if value is not None]
        with tempfile.TemporaryDirectory(prefix=f"{self.path.stem}_") as folder:
            request, result = Path(folder) / "request.json", Path(folder) / "result.json"
            request.write_text(json.dumps({self.kind: absolute}), encoding="utf-8")
            # Offline is about uv: the environment is used as it is, and the index is not asked again.
            command = [self.uv(), "run", "--offline", "--script", str(self.path), str(request), str(result), *given]
            _run(command, timeout, f"the {self.name} scorer")
            try:
                answer = json.loads(result.read_text(encoding="utf-8"))
                if missing := answer.get("unavailable"):
                    raise RuntimeError(f"{missing['reason']}; to fetch the weights: {missing['command']}")
                answers = answer[self.kind]
                values = [float(of.get("score", "nan")) for of in answers]
                errors = {Path(file["path"]): of["error"] for file, of in zip(entries, answers) if "error" in of}
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise RuntimeError(f"the {self.name} scorer left no readable result: {error}") from error
        if len(values) != len(entries):
            raise RuntimeError(f"the {self.name} scorer answered for {len(values)} of {len(entries)} {self.kind}")
        return torch.tensor(values, dtype=torch.float64), errors

    def create_environment(self, timeout: float = TIMEOUT) -> None:
        """Create the script's environment where it is not there yet. Raises RuntimeError, TimeoutError."""
        sync = [self.uv(), "sync", "--quiet", "--script", str(self.path)]
        if subprocess.run([*sync, "--offline"], capture_output=True, env=environment()).returncode:
            sync.remove("--quiet")  # shows the progress of a download of gigabytes
            _run(sync, timeout, f"creating {self.name}'s environment")

    def uv(self) -> str:
        """Path of the uv executable, on the PATH or from the `uv` package. Raises RuntimeError."""
        if path := shutil.which("uv"):
            return path
        try:
            from uv import find_uv_bin

            return find_uv_bin()
        except (ImportError, FileNotFoundError):
            raise RuntimeError(f"{self.name} runs in an environment that uv makes: pip install uv") from None


def complete(scores: Tensor, errors: dict[Path, str], kind: str) -> Tensor:
    """The `scores`. Raises SettingError with the name and the reason of each file that could not be scored."""
    if errors:
        named = "; ".join(f"{path.name}: {reason}" for path, reason in errors.items())
        raise SettingError(f"{len(errors)} of {len(scores)} {kind} could not be scored: {named}")
    return scores


@contextmanager
def needed() -> Iterator[None]:
    """Within it, errors that `Script.score` raises become `Unavailable`."""
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        raise Unavailable(str(error)) from error


def environment() -> dict[str, str]:
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
    with subprocess.Popen(command, **output, env=environment(), start_new_session=True) as process:
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
