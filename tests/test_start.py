"""What `run.py` sees to before anything is loaded: folders that can be written, and threads that leave others alone."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from joblib import Parallel, delayed
from omegaconf import OmegaConf

from eval import sweep

ROOT = Path(__file__).parents[1]


def python(*arguments, **environment):
    variables = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    "setting", ["output_dir={}/below", "hydra.run.dir={}", "-m output_dir={}", "-m hydra.sweep.dir={}"]
)
def test_a_folder_that_cannot_be_made_is_named_in_one_line(setting, tmp_path):
    (tmp_path / "file").write_text("in the way")
    setting = setting.format(tmp_path / "file")
    done = python("run.py", *setting.split())
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: the folder {setting.partition('=')[2]} cannot be made or written to (")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, whom no mode stops
    with pytest.raises(SystemExit) as stop:
        sweep._writable(str(tmp_path))
    assert str(stop.value).startswith(f"error: the folder {tmp_path} cannot be made or written to (Permission denied)")


def test_threads_wait_passively_unless_told_otherwise():
    code = "import sys, os, run; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    assert python("-c", code).stdout.split() == ["False", "passive"]  # before torch, which reads it once
    assert python("-c", code, OMP_WAIT_POLICY="active").stdout.split() == ["False", "active"]


@pytest.mark.parametrize("cpus, before, after", [(None, None, "1"), (3, None, "3"), (3, "2", "2")])
def test_jobs_of_a_launcher_that_starts_all_at_once_have_their_threads(cpus, before, after, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", before or "")
    if before is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    launcher = {
        "_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "cpus_per_task": cpus,
    }
    hydra = {"launcher": launcher, "sweeper": {"_target_": "another"}, "sweep": {"dir": str(tmp_path / "runs")}}
    sweep.Board().on_multirun_start(OmegaConf.create({"output_dir": str(tmp_path), "hydra": hydra}))
    assert os.environ["OMP_NUM_THREADS"] == after


def test_joblib_gives_its_workers_their_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = Parallel(n_jobs=2)(delayed(os.getenv)("OMP_NUM_THREADS") for _ in range(2))
    assert threads == [str(max(1, len(os.sched_getaffinity(0)) // 2))] * 2


def test_modules_of_eval_import_each_other_in_one_direction():
    imports = {}
    for path in (ROOT / "eval").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        members = {f"{node.module}.{alias.name}" for node in found for alias in node.names}
        imports[name] = members | {node.module for node in found}
    graph = {name: imports[name] & imports.keys() for name in imports}
    assert graph["eval.leaderboard"] >= {"eval.report", "eval.tables"}
    assert len(list(TopologicalSorter(graph).static_order())) == len(imports)  # raises CycleError
