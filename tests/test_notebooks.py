"""The reports beyond_dpcache.ipynb and flux_without_a_gpu.ipynb from end to end, short enough for a test."""

import re

import nbclient
import nbformat
import pytest

from helpers.commands import ROOT
from test_planner import PUBLISHED

SHORT = "num_inference_steps=6 num_prompts=2 calibration.num_prompts=2 batch_size=2 budget=4"
FEWER = {  # of what an experiment sweeps
    "ablation_predictor": ["method.predictors=[taylor2],[lsq2]", "method.planners=[even],[gram]"],
    "ablation_warmup": ["method.warmups=[1],[3]"],
    "ablation_calibration_prompts": ["method=dpcache"],
    "frontier": ["method=dpcache,dpcache_lsq,dpcache_lsq_output"],
}
FORKED = f"""
import types
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers.commands import run as forked

def shorter(command, cwd, **options):
    python, script, *arguments = command
    name = next(argument.partition("=")[2] for argument in arguments if argument.startswith("experiment="))
    arguments = [argument for argument in arguments if not argument.startswith("output_dir=")]
    code, out, err = forked(*arguments, *{FEWER!r}.get(name, []), folder=OUTPUTS, cwd=cwd)
    return types.SimpleNamespace(returncode=code, stderr=err)

subprocess = types.SimpleNamespace(run=shorter)
"""


@pytest.mark.ci
def test_beyond_dpcache(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUTS", str(tmp_path))
    monkeypatch.setenv("SHORT", SHORT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "notebooks" / "beyond_dpcache.ipynb", as_version=4)
    committed = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert committed and not any(output.output_type == "error" for output in committed)
    assert str(ROOT) not in nbformat.writes(notebook)
    first = next(index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(FORKED))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    tables = "".join(output["data"]["text/markdown"] for output in shown if "text/markdown" in output.get("data", {}))
    assert len(pictures) == 9
    assert all(label in tables for label in ("0 dpcache", "7 refit (dpcache_lsq)", "planners=[even] predictors=[lsq2]"))
    for name in ("frontier", *(f"ablation_{n}" for n in ("parts", "predictor", "warmup", "cost", "calibration_size"))):
        assert (tmp_path / name / "report.html").exists()


@pytest.mark.ci
def test_flux_without_a_gpu(monkeypatch):
    notebook = nbformat.read(ROOT / "notebooks" / "flux_without_a_gpu.ipynb", as_version=4)
    committed = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert committed and not any(output.output_type == "error" for output in committed)
    assert str(ROOT) not in nbformat.writes(notebook) and str(PUBLISHED["flux_dev"]) not in nbformat.writes(notebook)
    if not PUBLISHED["flux_dev"].exists():
        pytest.skip("the released cost tensors are not here")
    monkeypatch.setenv("FLUX_COST", str(PUBLISHED["flux_dev"]))
    monkeypatch.delenv("WAN_COST", raising=False)
    monkeypatch.setenv("SHORT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    tables = [output["data"]["text/markdown"] for output in shown if "text/markdown" in output.get("data", {})]
    assert len(tables) == 5 and sum("image/png" in output.get("data", {}) for output in shown) == 2
    gain = re.search(r"K = 13 \| \S+ \| (\S+)", tables[3])  # of planned steps with the authors' own predictor
    assert float(gain[1]) > 3
