"""A method, a predictor, a metric and a family of models are added by one file each (a method: and its settings). Here
they are added to a copy of the project, as the documents show; the board, its page and the tests then have them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import ENVIRONMENT, ROOT, TINY, results

pytestmark = pytest.mark.ci
LINKED = {".safetensors", ".png", ".json"}  # large, or read-only: links to them will do
OTHERS = shutil.ignore_patterns(".*", "__pycache__", "outputs", "wandb", "*.egg-info", "notebooks")

PREDICTOR = '''"""Half way to where the straight line through the last two computed steps leads."""

from dataclasses import dataclass

from dpcache.method import Method
from dpcache.predictors import Predictor
from dpcache.schedules import EvenlySpaced


@dataclass(frozen=True)
class Damped(Predictor):
    history, by_distance, short_name = 2, True, "damped"

    def weights(self, keys, step):
        ahead = 0.5 * (step - keys[-1])
        return (-ahead / (keys[-1] - keys[-2]), 1 + ahead / (keys[-1] - keys[-2])) if len(keys) > 1 else (1.0,)


def damped(budget: int, num_inference_steps: int) -> Method:
    return Method(EvenlySpaced(budget, num_inference_steps, 2), "stack", Damped())
'''
SETTINGS = """# @package _global_
about: {title: Damped line, group: forecast, year: 2026}
method:
  _target_: baselines.damped.damped
  budget: ${budget}
  num_inference_steps: ${num_inference_steps}
"""


def documented(document: str) -> dict[str, str]:
    """The files that a document shows whole: each begins with its path in a comment."""
    blocks = re.findall(r"^ *```\w+\n *# (\S+)\n(.*?)^ *```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    found = {}
    for path, text in blocks:
        indent = min(len(line) - len(line.lstrip()) for line in text.splitlines() if line.strip())
        found[path] = "\n".join(line[indent:] for line in text.splitlines()) + "\n"
    return found


def python(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(cwd)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """A copy of the project with the new files: its folder and their paths."""

    def copy(source, target):
        if Path(source).suffix in LINKED:
            os.symlink(source, target)
        else:
            shutil.copy2(source, target)

    folder = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(ROOT, folder, copy_function=copy, ignore=OTHERS)
    files = {"baselines/damped.py": PREDICTOR, "conf/method/damped.yaml": SETTINGS}
    for document in ("baselines/README.md", "eval/README.md", "dpcache/README.md"):
        files |= documented(document)
    for path, text in files.items():
        assert not (folder / path).exists()
        (folder / path).write_text(text)
    return folder, files.keys()


def test_each_addition_is_one_file_and_a_method_has_its_settings_beside_it(added):
    assert added[1] == {
        *("baselines/line_skip.py", "conf/method/line_skip.yaml"),
        *("baselines/damped.py", "conf/method/damped.yaml"),
        *("eval/metrics/mae.py", "dpcache/models/cogview4.py"),
    }


def test_the_board_and_its_page_have_the_new_methods_and_the_new_metric(added):
    folder, _ = added
    out = folder.parent / "outputs"
    choice = ["method=damped,line_skip", "eval.metrics=[psnr,mae]"]
    done = python("run.py", "-m", *choice, *TINY, "budget=3", f"output_dir={out}", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {result["method"]: result for result in results(out)}
    assert found.keys() == {"damped", "line_skip"}
    assert all(result["computed_steps"] == 3 and result["metrics"]["mae"]["mean"] > 0 for result in found.values())
    (board,) = out.rglob("leaderboard.md")
    text = board.read_text()
    assert "### MAE (grey levels): tiny_flux, 8 steps" in text
    for name, result in found.items():
        assert f"| {name} | {result['metrics']['mae']['mean']:.2f} ± " in text
    data = re.search(r'id="data">(.*?)</script>', board.with_name("report.html").read_text(), re.DOTALL)[1]
    page = json.loads(data)
    assert [metric["name"] for metric in page["metrics"]] == ["psnr", "mae"]
    assert page["methods"]["damped"]["about"] == "Damped line, 2026"
    assert list(page["methods"]) == ["line_skip", "damped"]  # in their group by year
    assert {run["label"] for board in page["boards"] for run in board["runs"]} == found.keys()


def test_the_tests_have_the_new_methods_and_the_new_family_and_pass(added):
    files = [f"tests/test_{name}.py" for name in ("conf", "families", "records")]
    new = "line_skip or damped or CogView4"
    done = python(
        "-m", "pytest", "-n", "0", "-v", "-p", "no:cacheprovider", "-m", "not slow", "-k", new, *files, cwd=added[0]
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = set(re.findall(r"::(test_\w+\[\S+\]) PASSED", done.stdout))
    for name in ("line_skip", "damped"):
        assert f"test_a_choice_composes_with_the_others_defaults[method-{name}]" in passed
        assert f"test_a_method_spends_its_budget_gives_the_same_twice_and_leaves_no_trace[{name}]" in passed
    assert "test_a_record_names_what_the_model_has[CogView4Transformer2DModel]" in passed


def test_a_predictor_in_a_file_of_its_own_has_its_short_name(added):
    names = "import baselines.damped; from dpcache.predictors import short_names; print(short_names()['damped']())"
    done = python("-c", names, cwd=added[0])
    assert done.stdout.strip() == "Damped()", done.stderr
