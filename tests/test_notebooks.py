"""The report beyond_dpcache.ipynb from end to end, on sweeps short enough for a test."""

import nbclient
import nbformat

from helpers.commands import ROOT

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
