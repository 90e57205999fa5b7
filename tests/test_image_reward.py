"""ImageReward's process. The slow tests create its environment (6.5 GB) and run the package itself: `-m slow`."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.metrics import Samples, Settings, evaluate, load, psnr
from eval.metrics import image_reward_scorer as scorer
from eval.metrics.image_reward import SCRIPT, check, image_reward, score
from eval.metrics.isolated import environment

PROMPTS = [
    "a red balloon over the sea",
    "a cat",
    "two cats",
    "a cat",
    "snow",
    "a lighthouse in a storm",
    "rain",
    "a dog",
]


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (len(PROMPTS), 4, 4, 3), dtype=np.uint8)
    return Samples(coarse.repeat(16, axis=1).repeat(16, axis=2), None, PROMPTS)


@pytest.fixture(scope="module")
def paths(samples, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(samples.images):
        Image.fromarray(image.numpy()).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def answer(*entries) -> str:
    return f"cat > $6 <<'END'\n{json.dumps({'images': entries})}\nEND"


def test_scores_come_back_in_order_and_a_failed_image_is_named(fake_uv, samples, paths, capfd):
    entries = [{"path": "x", "score": index / 2} for index in range(8)]
    fake_uv("echo working >&2\n" + answer(*entries))
    assert image_reward(samples, samples).tolist() == [index / 2 for index in range(8)]
    assert "working" in capfd.readouterr().err

    entries[3] = {"path": "x", "error": "UnidentifiedImageError: cannot identify image file"}
    fake_uv(answer(*entries))
    values, errors = score(paths, PROMPTS)
    assert values.isnan().nonzero().tolist() == [[3]] and values[4] == 2
    assert errors == {paths[3]: "UnidentifiedImageError: cannot identify image file"}
    with pytest.raises(ValueError, match=r"1 of 8 images could not be scored: 0003\.png: UnidentifiedImageError"):
        image_reward(samples, samples)


def test_the_request_holds_paths_prompts_and_options(fake_uv, paths, tmp_path):
    fake_uv(f"cp $5 {tmp_path}/request; shift 6; echo $@ > {tmp_path}/flags; exit 1")
    with pytest.raises(RuntimeError):
        score(paths, PROMPTS, weights="/some/folder", device="cuda:1", batch_size=4)
    request = json.loads((tmp_path / "request").read_text())
    assert request == {"images": [{"path": str(path), "prompt": p} for path, p in zip(paths, PROMPTS)]}
    assert (tmp_path / "flags").read_text().split() == ["--weights=/some/folder", "--device=cuda:1", "--batch-size=4"]


@pytest.mark.parametrize(
    "run, reason",
    [
        ("echo starting; echo out of luck >&2; exit 7", "failed with exit status 7: out of luck"),
        ("kill -9 $$", "the ImageReward scorer was killed by SIGKILL"),
        ("exit 137", "the ImageReward scorer was killed by SIGKILL"),
        ("exit 0", "left no readable result"),
        ("echo nonsense > $6", "left no readable result"),
        ("echo '[]' > $6", "left no readable result"),
        (answer({"path": "x", "score": 1.0}), "answered for 1 of 8 images"),
        (
            """echo '{"unavailable": {"reason": "no weights", "command": "fetch them"}}' > $6""",
            "no weights; to fetch the weights: fetch them",
        ),
        ('echo "[$PYTHONPATH]"; exit 1', r"status 1: \[\]"),
    ],
)
def test_a_scorer_that_dies_costs_its_own_metric_only(fake_uv, samples, monkeypatch, run, reason):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    fake_uv(run)
    with pytest.raises(RuntimeError, match=reason):
        check() if "of 8" not in reason else image_reward(samples, samples)
    values, unavailable, _ = evaluate({"psnr": psnr, "image_reward": image_reward}, samples, samples)
    assert values.keys() == {"psnr"} and unavailable.keys() == {"image_reward"}
    assert "\n" not in unavailable["image_reward"]


def test_a_scorer_that_hangs_is_stopped_with_its_children(fake_uv, tmp_path):
    fake_uv(f"sleep 1000 & echo $! > {tmp_path}/child; wait")
    with pytest.raises(TimeoutError, match=r"took more than 0.5 s and was stopped"):
        check(timeout=0.5)
    child = Path("/proc", (tmp_path / "child").read_text().strip())
    deadline = time.monotonic() + 10
    while child.exists() and "(sleep) Z" not in (child / "stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_environment_that_cannot_be_created_gives_one_line(fake_uv):
    fake_uv("exit 0", sync="echo 'error: no route to the index' >&2; exit 2")
    with pytest.raises(RuntimeError, match=r"^creating ImageReward's environment failed .* no route to the index$"):
        check()


def test_without_uv_one_line_says_how_to_install_it(monkeypatch, samples, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "uv", None)
    values, unavailable, _ = evaluate(load(["psnr", "image_reward"], Settings()), samples, samples)
    line = "ImageReward runs in an environment that uv makes: pip install uv"
    assert unavailable == {"image_reward": line} and values.keys() == {"psnr"}


def test_weights_that_are_not_in_the_folder_are_not_replaced_by_others(tmp_path):
    folder = tmp_path / "my weights"
    with pytest.raises(scorer.Unavailable, match="does not exist") as caught:
        scorer.locate(scorer.CHECKPOINT, folder)
    assert caught.value.command == (
        f"hf download THUDM/ImageReward ImageReward.pt med_config.json --local-dir '{folder}' && "
        f"hf download google-bert/bert-base-uncased vocab.txt --local-dir '{folder}'"
    )


# The package itself


def slow(test):
    return pytest.mark.slow(pytest.mark.timeout(3600)(test))


@pytest.fixture(scope="module")
def scores(paths) -> torch.Tensor:
    """Scores of the eight images, in batches of three that a corrupt image is part of."""
    corrupt, truncated = paths[0].with_name("corrupt.png"), paths[0].with_name("truncated.png")
    corrupt.write_bytes(b"not an image")
    truncated.write_bytes(paths[0].read_bytes()[:-40])
    files = [*paths[:3], corrupt, *paths[3:], truncated]
    prompts = [*PROMPTS[:3], "corrupt", *PROMPTS[3:], "truncated"]
    values, errors = score(files, prompts, random_weights=0, batch_size=3, device="cpu")
    assert list(errors) == [corrupt, truncated] and all("Error: " in reason for reason in errors.values())
    assert values.isnan().nonzero().flatten().tolist() == [3, 9]
    return values[~values.isnan()]


@pytest.fixture(scope="module")
def direct(paths, tmp_path_factory) -> tuple[torch.Tensor, Path]:
    """What the package's own `ImageReward.score` says of each image, and a folder with that model's weights."""
    folder = tmp_path_factory.mktemp("weights")
    program = folder / "direct.py"
    program.write_text(f"""
import importlib.util, json, pathlib, torch
spec = importlib.util.spec_from_file_location("scorer", {str(SCRIPT.path)!r})
scorer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scorer)
folder = pathlib.Path({str(folder)!r})
model = scorer.random_model(0, folder, "cpu")
assert type(model).__module__ == "ImageReward.ImageReward"
torch.save(model.state_dict(), folder / "ImageReward.pt")
with torch.no_grad():
    scores = [model.score(prompt, path) for path, prompt in {[(str(p), q) for p, q in zip(paths, PROMPTS)]!r}]
    again = [model.score("something else", path) for path in {[str(p) for p in paths[:2]]!r}]
(folder / "direct.json").write_text(json.dumps([scores, again]))
""")
    SCRIPT.create_environment()
    find = [SCRIPT.uv(), "python", "find", "--script", str(SCRIPT.path)]
    python = subprocess.run(find, capture_output=True, text=True, check=True, env=environment()).stdout.strip()
    subprocess.run([python, program], check=True, env=environment())
    scores, again = json.loads((folder / "direct.json").read_text())
    assert all(abs(a - b) > 1e-4 for a, b in zip(scores, again))  # the prompt matters
    return torch.tensor(scores, dtype=torch.float64), folder


@slow
def test_eight_images_get_the_scores_of_the_package_itself(scores, direct, samples):
    assert torch.allclose(scores, direct[0], rtol=0, atol=1e-6)
    assert scores[1] != scores[3]  # one prompt, two images
    assert scores.std() > 1e-3  # far above the tolerance
    metric = image_reward(samples, samples, random_weights=0, device="cpu")  # other batches, another process
    assert metric.shape == (8,) and torch.allclose(metric, scores, rtol=0, atol=1e-6)


@slow
def test_a_folder_of_weights_is_loaded(direct, paths):
    values, errors = score(paths[:2], PROMPTS[:2], weights=direct[1], device="cpu")
    assert not errors and torch.allclose(values, direct[0][:2], rtol=0, atol=1e-6)


@slow
def test_weights_that_lack_tensors_are_refused(direct, tmp_path):
    for name in ("med_config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((direct[1] / name).read_bytes())
    torch.save({"mlp.layers.0.weight": torch.zeros(1024, 768)}, tmp_path / "ImageReward.pt")
    with pytest.raises(RuntimeError, match=r"ImageReward\.pt lacks \d+ tensors"):
        check(weights=tmp_path / "ImageReward.pt", device="cpu")


class Code:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@slow
def test_a_checkpoint_that_holds_code_is_not_run(tmp_path):
    (tmp_path / "ImageReward.pt").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    for name in ("med_config.json", "vocab.txt"):
        (tmp_path / name).touch()
    with pytest.raises(RuntimeError, match="holds more than tensors"):
        check(weights=tmp_path)
    assert not (tmp_path / "ran").exists()


@slow
def test_weights_that_the_hub_does_not_give_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"hf download THUDM/ImageReward ImageReward\.pt") as caught:
        check()
    assert "\n" not in str(caught.value)


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_killing_the_real_scorer_gives_one_line(monkeypatch, paths, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # by which its command line is known

    def kill():
        while not (found := [pid for pid, command in _commands() if "python" in command and str(tmp_path) in command]):
            time.sleep(0.1)
        time.sleep(5)  # somewhere in its imports
        os.kill(found[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match="the ImageReward scorer was killed by SIGKILL"):
        score(paths, PROMPTS, random_weights=0, device="cpu")
    killer.join()


def _commands():
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            program, *arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            yield int(folder.name), f"{Path(program).name} {' '.join(arguments)}"
