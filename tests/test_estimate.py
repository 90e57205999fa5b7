"""Models without their weights: published architectures, what a method would keep in memory, dry runs."""

import pytest
import torch

from dpcache import calibrate
from dpcache.estimate import history_bytes
from dpcache.models.architectures import architecture, published
from dpcache.sampler import sample
from eval import dry_run
from helpers.commands import ROOT, composed, run

GIB = 2**30
FULL_SIZE = {  # billions of parameters, as their authors count them
    "black-forest-labs/FLUX.1-dev": 11.9,
    "hunyuanvideo-community/HunyuanVideo": 12.8,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1.4,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14.3,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": 16.4,
    "Qwen/Qwen-Image": 20.4,
    "black-forest-labs/FLUX.2-dev": 32.2,
    "black-forest-labs/FLUX.2-klein-4B": 3.9,
    "Tongyi-MAI/Z-Image": 6.15,
    "lodestones/Chroma1-HD": 8.9,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": 0.61,
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": 17.4,
    "Alpha-VLLM/Lumina-Image-2.0": 2.6,
    "HiDream-ai/HiDream-I1-Full": 17.1,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 14.3,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 5.0,
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": 8.3,
    "Lightricks/LTX-2": 18.9,  # without the connectors, which are a part of their own
    "THUDM/CogVideoX-2b": 1.69,
    "THUDM/CogVideoX-5b": 5.57,
    "genmo/mochi-1-preview": 10.03,
}


@pytest.mark.parametrize("path", FULL_SIZE)
def test_published_architectures_have_their_size(path):
    transformer = architecture(path).build()
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(FULL_SIZE[path], abs=0.06)


MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))


def table() -> dict[str, list[str]]:
    """Rows of dpcache/models/README.md: model, path, parameters, steps, images."""
    lines = (ROOT / "dpcache/models/README.md").read_text().splitlines()
    rows = [line.strip("| ").split("|") for line in lines if line.startswith("| `")][1:]
    cells = ([cell.strip() for cell in row] for row in rows)
    return {name.strip("`"): others for name, *others in cells}


@pytest.mark.ci
def test_the_table_has_every_full_size_model_and_all_are_known():
    rows = table()
    assert sorted(rows) == [name for name in MODELS if not name.startswith("tiny")]
    for name, (path, _, steps, *images) in rows.items():
        config = composed(f"model={name}", "budget=3", "method=uniform_skip")[0]
        assert path in published() and (path, steps) == (config.model.path, str(config.num_inference_steps))
        assert ", ".join(config.model.images) == "".join(images)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "size"), {path: size for path, size, *_ in table().values()}.items())
def test_the_table_has_the_parameters(path, size):
    known = architecture(path)
    assert f"{known.count * sum(p.numel() for p in known.build().parameters()) / 1e9:.1f} B" == size


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("tiny")])
def test_a_dry_run_describes_the_plan(name):
    config, method = composed(f"model={name}", "method=uniform_skip")
    said = dry_run.describe(config, name, "uniform_skip", method, 16, 0)
    assert said.startswith(f"{name}  uniform_skip  {config.budget} of {config.num_inference_steps} steps (dry run")
    parameters = sum(p.numel() for p in architecture(config.model.path).build().parameters())
    assert f"{parameters:,} in {config.model.dtype}" in said
    assert config.model.path in said and str(method.schedule.steps) in said and "iB" in said


FIXED = ["dpcache", "taylorseer", "uniform_skip", "dpcache_lsq", "spectrum", "ertacache", "delta_dit", "clusca"]
ONLINE = ["teacache", "dicache", "speca", "bwcache", "easycache"]


@pytest.mark.ci
@pytest.mark.parametrize("name", [*FIXED, *ONLINE])
def test_the_estimate_is_what_a_run_keeps(pipe, name):
    config, recipe = composed(f"method={name}", "num_inference_steps=8", "budget=6")
    known = architecture("tiny_flux")
    expected = history_bytes(known, known.build(dtype=torch.float32), recipe.example, config.model.call, batch_size=2)
    call = {"height": 64, "width": 64, "max_sequence_length": 12}
    method = recipe.build(pipe, calibrate(pipe, ["green apple"], 8, recipe.statistics or (), **call))
    report = sample(pipe, method, ["red apple", "dog"], [0, 1], decode=False, **config.model.call).report
    assert report.history_bytes == pytest.approx(expected, abs=64)  # but for single numbers


@pytest.mark.ci
def test_memory_at_full_size():
    """The paper's 0.36 GB for HunyuanVideo; every module's output instead takes hundreds of times as much."""
    known, sizes = architecture("hunyuanvideo-community/HunyuanVideo"), {}
    transformer = known.build()
    for name in ("dpcache", "taylorseer"):
        config, recipe = composed("model=hunyuan_video", f"method={name}", "budget=9")
        sizes[name] = history_bytes(known, transformer, recipe.example, config.model.call)
    assert sizes["dpcache"] == 3 * 17 * 30 * 40 * 3072 * 2 == pytest.approx(0.36e9, rel=0.05)
    assert sizes["taylorseer"] > 80 * sizes["dpcache"]


@pytest.mark.ci
def test_dry_run_on_the_command_line(tmp_path):
    code, out, err = run("model=wan21_t2v", "method=fora", "budget=9", "+dry_run=true", folder=tmp_path)
    assert code == 0, err
    assert "1,418,996,800 in bfloat16" in out
    assert "guidance branches: 2\n" in out and "[0, 5, 11, 16, 22, 27, 33, 38, 44]" in out and "cache" in out
    assert not list(tmp_path.glob("runs/*"))
