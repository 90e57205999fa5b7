"""VBench's processes. The slow tests create their environment (7.4 GB) and run the package itself: `-m slow`."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from eval.metrics import Samples, Settings, evaluate, load, psnr
from eval.metrics import vbench_scorer as scorer
from eval.metrics.base import Unavailable
from eval.metrics.isolated import environment
from eval.metrics.vbench import DIMENSIONS, SCRIPT, score, vbench

FLICKERING = {"dimension": "temporal_flickering", "fps": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def samples() -> Samples:
    """Noise, a still, a slow drift; 9 frames of odd size."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (9, 33, 47, 3), dtype=np.uint8)
    still = np.broadcast_to(noise[:1], noise.shape)
    drift = (rng.integers(-3, 4, noise.shape).cumsum(axis=0) + 128).astype(np.uint8)
    return Samples(np.stack([noise, still, drift]), None, ["noise", "a still", "drift"])


def answer(*entries) -> str:
    return f"cat > $6 <<'END'\n{json.dumps({'videos': entries})}\nEND"


def test_the_dimensions_are_those_of_the_script():
    assert list(DIMENSIONS) == [make.__name__ for make in scorer.DIMENSIONS]
    assert {name for names in scorer.DIMENSIONS.values() for name in names} == set(scorer.WEIGHTS)


def test_videos_arrive_without_loss_at_their_rate_and_scores_come_back_in_order(fake_uv, samples, tmp_path):
    run = f"cp $5 {tmp_path}/request; cp $(dirname $(grep -o '/[^\"]*0000.mp4' $5))/*.mp4 {tmp_path}; echo $@ > "
    fake_uv(f"{run}{tmp_path}/flags\n" + answer({"score": 0.5}, {"score": 1.0}, {"score": 0.25}))
    assert vbench(samples, **FLICKERING).tolist() == [0.5, 1, 0.25]
    assert [Path(video["path"]).name for video in json.loads((tmp_path / "request").read_text())["videos"]] == [
        "0000.mp4",
        "0001.mp4",
        "0002.mp4",
    ]
    assert (tmp_path / "flags").read_text().split()[6:] == ["--dimension=temporal_flickering", "--device=cpu"]
    for index, video in enumerate(samples.images):
        assert np.array_equal(iio.imread(tmp_path / f"{index:04d}.mp4"), video)
    assert iio.immeta(tmp_path / "0000.mp4")["fps"] == 8


def test_a_video_that_cannot_be_scored_is_named(fake_uv, samples):
    fake_uv(answer({"score": 0.5}, {"error": "ValueError: 0 frames can be read"}, {"score": 0.25}))
    values, errors = score(["a.mp4", "b.mp4", "c.mp4"], dimension="imaging_quality")
    assert values.isnan().tolist() == [False, True, False]
    assert errors == {Path("b.mp4"): "ValueError: 0 frames can be read"}
    with pytest.raises(ValueError, match=r"1 of 3 videos could not be scored: 0001\.mp4: ValueError: 0 frames"):
        vbench(samples, **FLICKERING)


def test_images_cost_this_metric_only():
    images = Samples(np.zeros((2, 8, 8, 3), np.uint8), None, ["a", "b"])
    scorers = {"psnr": psnr, "vbench": lambda *pair: vbench(*pair, **FLICKERING)}
    values, unavailable, _ = evaluate(scorers, images, images)
    assert unavailable == {"vbench": "SettingError: VBench scores videos, not images"} and values.keys() == {"psnr"}


def test_the_models_rate_and_device_reach_the_scorer(fake_uv):
    fake_uv(answer())
    loaded = load(["vbench_dynamic_degree"], Settings(fps=24, device="cpu"))["vbench_dynamic_degree"]
    assert loaded.keywords == {"fps": 24, "dimension": "dynamic_degree", "device": "cpu"}


def test_missing_weights_and_uv_cost_their_metric_only(fake_uv, samples, monkeypatch, tmp_path):
    fake_uv("""echo '{"unavailable": {"reason": "no weights", "command": "fetch them"}}' > $6""")
    names = ["psnr", "vbench_imaging_quality"]
    values, unavailable, _ = evaluate(load(names, Settings()), samples, samples)
    assert values.keys() == {"psnr"}
    assert unavailable == {"vbench_imaging_quality": "no weights; to fetch the weights: fetch them"}

    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "uv", None)
    _, unavailable, _ = evaluate(load(names, Settings()), samples, samples)
    line = "VBench runs in an environment that uv makes: pip install uv"
    assert unavailable == {"vbench_imaging_quality": line}


def test_the_command_fetches_what_is_missing_to_where_it_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(scorer, "CACHE", tmp_path / "my cache")
    (tmp_path / "my cache/clip_model").mkdir(parents=True)
    (tmp_path / "my cache/clip_model/ViT-L-14.pt").touch()
    monkeypatch.setattr(scorer, "fetch", lambda name: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(
        scorer.Unavailable, match=r"linear\.pth is missing and cannot be fetched: OSError: no route$"
    ) as e:
        scorer.locate(scorer.DIMENSIONS[scorer.aesthetic_quality])
    file = tmp_path / "my cache/aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"
    assert e.value.command.startswith(f"curl -fL --create-dirs -o '{file}' https://") and " && " not in e.value.command
    raft = scorer.fetching("raft_model/models/raft-things.pth")
    assert raft.endswith(f"&& unzip -o '{tmp_path}/my cache/raft_model/models.zip' -d '{tmp_path}/my cache/raft_model'")


@pytest.mark.parametrize("name", ["amt_model/amt-s.pth", "raft_model/models/raft-things.pth"])
def test_fetched_files_are_whole_or_not_there(monkeypatch, tmp_path, name):
    source = tmp_path / Path(name).name
    torch.save({"a": torch.ones(2)}, source)
    if name.startswith("raft"):
        subprocess.run(
            [sys.executable, "-m", "zipfile", "-c", "models.zip", "models/"], cwd=_models(source), check=True
        )
        source = tmp_path / "models.zip"
    monkeypatch.setattr(scorer, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(scorer.WEIGHTS, name, (source.as_uri(), "0" * 64))
    with pytest.raises(scorer.Unavailable, match="invalid hash value"):
        scorer.locate([name])
    assert not list((tmp_path / "cache").rglob("*.*"))
    monkeypatch.setitem(scorer.WEIGHTS, name, (source.as_uri(), None))
    (file,) = scorer.locate([name])
    assert file == tmp_path / "cache" / name and torch.load(file, weights_only=True)["a"].tolist() == [1, 1]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def _models(file: Path) -> Path:
    (file.parent / "models").mkdir()
    file.rename(file.parent / "models" / file.name)
    return file.parent


# The package itself


def slow(test):
    return pytest.mark.slow(pytest.mark.timeout(3600)(test))


def _python(program: Path) -> None:
    """Run `program` in the scorer's environment."""
    SCRIPT.create_environment()
    find = [SCRIPT.uv(), "python", "find", "--script", str(SCRIPT.path)]
    python = subprocess.run(find, capture_output=True, text=True, check=True, env=environment()).stdout.strip()
    subprocess.run([python, program], check=True, env=environment())


@pytest.fixture(scope="module")
def direct(tmp_path_factory) -> tuple[list[Path], dict[str, list[float]]]:
    """Two videos, and what the package's own `compute_...` say of each with random weights, which the scorers that
    run after it find, too. CLIP has one layer: the package takes its size from the file."""
    folder = tmp_path_factory.mktemp("vbench")
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, 5, 6, 8, 3), dtype=np.uint8)  # big enough for optical flow, not square
    videos = [folder / "a.mp4", folder / "b.mp4"]
    for path, video in zip(videos, coarse.repeat(24, axis=2).repeat(24, axis=3)):
        iio.imwrite(path, video, fps=8, macro_block_size=1, codec="libx264rgb", pixelformat="rgb24")
    program = folder / "direct.py"
    program.write_text(f"""
import importlib, json, os, pathlib, warnings
folder = pathlib.Path({str(folder)!r})
os.environ["VBENCH_CACHE_DIR"] = str(folder)
import clip.model, timm, torch, vbench
from easydict import EasyDict
from omegaconf import OmegaConf
from pyiqa.archs.musiq_arch import MUSIQ
from vbench.third_party.amt.utils.build_utils import build_from_cfg
from vbench.third_party.RAFT.core.raft import RAFT
from vbench.utils import init_submodules

def save(name, state):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name)

torch.manual_seed(0)
save("dino_model/dino_vitbase16_pretrain.pth", timm.create_model("vit_base_patch16_224", num_classes=0).state_dict())
save("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth", MUSIQ(pretrained=False).state_dict())
save("aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth", torch.nn.Linear(768, 1).state_dict())
raft = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False))
save("raft_model/models/raft-things.pth", {{f"module.{{k}}": v for k, v in raft.state_dict().items()}})
config = pathlib.Path(vbench.__file__).with_name("third_party") / "amt/cfgs/AMT-S.yaml"
save("amt_model/amt-s.pth", {{"state_dict": build_from_cfg(OmegaConf.load(config).network).state_dict()}})
(folder / "clip_model").mkdir()
for name in ("ViT-B-32.pt", "ViT-L-14.pt"):
    model = clip.model.CLIP(768, 224, 1, 64, 32, 77, 16, 64, 1, 1).eval()
    inputs = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
    torch.jit.save(torch.jit.trace(model, inputs), folder / "clip_model" / name)

videos, dimensions = {[str(video) for video in videos]!r}, {[d for d in DIMENSIONS if d != "subject_consistency"]!r}
info = folder / "info.json"
info.write_text(json.dumps([{{"prompt_en": "", "dimension": dimensions, "video_list": videos}}]))
submodules = init_submodules(dimensions, local=True)
results = {{}}
with torch.no_grad():
    for dimension in dimensions:
        compute = getattr(importlib.import_module(f"vbench.{{dimension}}"), f"compute_{{dimension}}")
        results[dimension] = [float(r["video_results"]) for r in compute(str(info), "cpu", submodules[dimension])[1]]
(folder / "direct.json").write_text(json.dumps(results))
""")
    _python(program)
    return videos, json.loads((folder / "direct.json").read_text())


@slow
def test_temporal_flickering_is_its_formula(samples, monkeypatch, tmp_path):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))  # no weights are needed
    (loaded,) = load(["vbench_temporal_flickering"], Settings(device="cpu", fps=8)).values()
    neighbours = samples.images.double().diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
    assert torch.allclose(loaded(samples, samples), (255 - neighbours) / 255, rtol=0, atol=1e-6)


@slow
@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_scores_are_those_of_the_package_itself(direct, monkeypatch, dimension):
    videos, results = direct
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(videos[0].parent))
    damaged = videos[0].with_name("damaged.mp4")
    damaged.write_bytes(videos[0].read_bytes()[:1000])
    values, errors = score([videos[0], damaged, videos[1]], dimension=dimension, device="cpu")
    assert errors == {damaged: "ValueError: 0 frames can be read, and two are the least to compare"}
    values = values[[0, 2]]
    if dimension == "subject_consistency":  # the package would fetch code
        assert (values > 0).all() and (values < 1).all()
    else:  # the package divides the mean of imaging quality by 100, but not each score
        expected = torch.tensor(results[dimension]) / (100 if dimension == "imaging_quality" else 1)
        assert torch.allclose(values, expected.double(), rtol=1e-5, atol=1e-6)


class Code:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@slow
@pytest.mark.parametrize("dimension", [d for d in DIMENSIONS if d != "temporal_flickering"])
def test_weights_that_hold_code_are_not_run(monkeypatch, tmp_path, dimension):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    for name in scorer.WEIGHTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(Unavailable, match=r"cannot be loaded: .*to fetch the weights: curl") as caught:
        raise next(iter(load([f"vbench_{dimension}"], Settings(device="cpu")).values()))
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


@slow
def test_weights_that_cannot_be_fetched_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        RuntimeError, match=r"amt-s\.pth is missing .*; to fetch the weights: curl -fL .*amt-s\.pth"
    ) as e:
        score([], dimension="motion_smoothness")
    assert "\n" not in str(e.value)
