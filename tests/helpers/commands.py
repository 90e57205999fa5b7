"""`run.py` as its users call it, and its settings composed without a process."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.utils import instantiate

import eval.schema  # noqa: F401, registers the types of the settings

ROOT = Path(__file__).parents[2]
TINY = ["num_inference_steps=8", "num_prompts=4", "calibration.num_prompts=2", "batch_size=2", "eval.timing.repeats=0"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LIBRARIES = [
    "diffusers.pipelines.flux.pipeline_flux",
    "hydra.main",
    "matplotlib.pyplot",
    "pandas",
    "torchmetrics",
    "torchvision",
]

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(LIBRARIES)


def start(*arguments, folder) -> subprocess.Popen:
    """`python run.py` in `folder`, in a process of its own."""
    command = [sys.executable, str(ROOT / "run.py"), *arguments, f"output_dir={folder}"]
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_alone(*arguments, folder) -> tuple[int, str, str]:
    """Its exit code, stdout and stderr."""
    process = start(*arguments, folder=folder)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def fork(*arguments, folder, cwd=None, streams=(os.devnull, os.devnull)) -> multiprocessing.Process:
    """`python run.py` in `folder` (or `cwd`), as a fork of a process that has loaded the libraries and nothing of the
    project: to load them takes longer than most of the tests' runs. `streams`: files of its stdout and stderr."""
    arguments = (*arguments, f"output_dir={folder}")
    process = forks.Process(target=_run, args=(arguments, cwd or folder, dict(ENVIRONMENT), streams))
    with patch.dict(os.environ, ENVIRONMENT):  # also of the process that is forked
        process.start()
    return process


def run(*arguments, folder, cwd=None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `fork`."""
    with tempfile.TemporaryDirectory() as said:
        streams = [Path(said, name) for name in ("out", "err")]
        process = fork(*arguments, folder=folder, cwd=cwd, streams=streams)
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"run.py {' '.join(arguments)}")
        return process.exitcode, *(stream.read_text() for stream in streams)


def _run(arguments, cwd, environment, streams):
    for descriptor, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = [str(ROOT / "run.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def results(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/result.json"))]


def compose(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra_compose("config", list(overrides))


def composed(*overrides):
    """The settings and the method that they make."""
    config = compose(*overrides)
    return config, instantiate(config.method)
