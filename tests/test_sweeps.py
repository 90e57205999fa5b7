"""Sweeps: stages, prompts, launchers, processes that share a run, tuning, and what W&B is told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from dpcache.sampler import generate
from eval import failures, prompts, report, timing
from eval.rescore import check_fine, rescore
from eval.results import objective
from eval.store import load_or_make, stored
from eval.sweep import Board
from helpers.boards import make
from helpers.commands import ENVIRONMENT, ROOT, TINY, compose, results, run, run_alone, start

OFFLINE = {"psnr", "ssim", "latent_error", "clip", "fid_efficientnet_lite0", "kid_efficientnet_lite0"}


def folders(output, method):
    return sorted(path.parent for path in output.glob(f"runs/*-{method}-*/result.json"))


def results_of(output, method):
    (folder,) = folders(output, method)
    return json.loads((folder / "result.json").read_text())


def scores_of(output):
    """What must not depend on how a sweep is run: the scores and schedules of every run folder."""
    kept = ("metrics", "metrics_unavailable", "per_prompt", "schedules", "computed_steps", "settled")
    paths = sorted(output.glob("runs/*/result.json"))
    return {path.parent.name: {key: json.loads(path.read_text())[key] for key in kept} for path in paths}


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """A sweep of three methods, one job after the other."""
    folder = tmp_path_factory.mktemp("serial")
    code, _, err = run("-m", "method=fora,teacache,uniform_skip", "budget=4", *TINY, folder=folder)
    assert code == 0, err
    return folder


# --- the end of a sweep


def end(folder: Path, board: Board | None = None) -> None:
    """What Hydra does when the last job is done."""
    (board or Board()).on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))


def test_failed_jobs_are_named_where_the_board_fails_too(tmp_path, monkeypatch, capsys):
    make(tmp_path, 2, [5], ["tiny"])

    def fail(*args):
        raise RuntimeError("no page")

    monkeypatch.setattr(report, "page", fail)
    with pytest.raises(SystemExit, match="1"):
        end(tmp_path)
    assert "RuntimeError: no page" in capsys.readouterr().err
    board = Board()
    (tmp_path / "broken").mkdir()
    failures.record(tmp_path / "broken", "error: no budget")
    with pytest.raises(SystemExit, match="1"):
        end(tmp_path, board)
    err = capsys.readouterr().err
    assert "RuntimeError: no page" in err and "failed: broken: error: no budget" in err


@pytest.mark.parametrize("kept", [["ssim"], []])
def test_a_board_without_psnr_takes_the_first_metric_or_says_that_there_is_none(tmp_path, capsys, kept):
    make(tmp_path, 2, [5], ["tiny"])
    for path in tmp_path.glob("*/result.json"):
        result = json.loads(path.read_text())
        result["metrics"] = {name: result["metrics"][name] for name in kept}
        result["per_prompt"] = {name: result["per_prompt"][name] for name in ("prompts", *kept)}
        path.write_text(json.dumps(result))
    end(tmp_path)
    out, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    if kept:
        assert "### Ranks by SSIM: tiny, 50 steps, K = 5" in out and "### SSIM: tiny, 50 steps" in out
        assert '"rank":1' in page and '"name":"ssim"' in page and (tmp_path / "leaderboard.png").exists()
    else:
        assert out.startswith(f"no tables: no run in {tmp_path} has a metric") and '"metrics":[]' in page


def test_an_image_that_cannot_be_read_is_named_and_left_out(tmp_path, caplog, capsys):
    make(tmp_path, 2, [5], ["tiny"])
    path = min(tmp_path.glob("*/images/0001-*.png"))
    data = path.read_bytes()
    path.unlink()  # the others are links to the same file
    path.write_bytes(data[:200])
    end(tmp_path)
    assert str(path) in caplog.text and (tmp_path / "report.html").exists()


# --- batches on disk


class Maker:
    """Counts the batches that it makes: image i is filled with i."""

    def __init__(self):
        self.made = []

    def __call__(self, chunk: slice):
        self.made.append(chunk.start)
        values = torch.arange(chunk.start, min(chunk.stop, 5))
        images = values.to(torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)
        return images.numpy(), values[:, None].float(), [0, chunk.start]


def test_a_batch_that_is_there_is_not_made_again_and_a_damaged_one_is(tmp_path):
    first, second = Maker(), Maker()
    samples, computed = load_or_make(tmp_path, list("abcde"), 2, first, "")
    assert first.made == [0, 2, 4] and computed == [[0, 0], [0, 2], [0, 4]]
    assert samples.images[:, 0, 0, 0].tolist() == samples.latents[:, 0].tolist() == [0, 1, 2, 3, 4]
    damaged = tmp_path / "batch_0001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match="no whole batch_0001"):
        stored(tmp_path, list("abcde"))
    again, _ = load_or_make(tmp_path, list("abcde"), 2, second, "")
    assert second.made == [2] and torch.equal(again.images, samples.images)
    assert torch.equal(stored(tmp_path, list("abcde")).latents, samples.latents)
    assert sorted(os.listdir(tmp_path)) == [f"batch_000{index}.safetensors" for index in range(3)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks the Linux kernel")
def test_samples_need_not_fit_into_memory(tmp_path):
    def make(chunk: slice):
        return torch.full((1, 1024, 1024, 3), chunk.start, dtype=torch.uint8), torch.zeros(1, 4), []

    def resident() -> int:  # bytes that the kernel cannot write back to a file
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))

    before = resident()
    samples, _ = load_or_make(tmp_path, ["fox"] * 60, 1, make, "")
    assert samples.images.nbytes > 180e6 and resident() - before < 60e6
    assert samples.images[:, -1, -1, -1].tolist() == list(range(60))


# --- prompts


def test_every_format_of_prompts_is_read(tmp_path):
    expected = ["a red fox, running", "two „quoted“ cats", 'a sign that says "hi"']
    files = {
        "a.txt": 'a red fox, running\n\n  two „quoted“ cats\na sign that says "hi"',
        "a.csv": '\ufeffPrompts,Category\n"a red fox, running",Colors\ntwo „quoted“ cats,\n'
        '"a sign that says ""hi""",Text\n',
        "a.tsv": 'Category\tPrompt\r\nx\ta red fox, running\r\nx\ttwo „quoted“ cats\r\nx\ta sign that says "hi"\r\n',
        "a.JSONL": '{"id": 1, "caption": "a red fox, running"}\n"two „quoted“ cats"\n\n'
        '{"text": "x", "Prompt": "a sign that says \\"hi\\""}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, newline="", encoding="utf-8")
        assert prompts.read("prompts", tmp_path / name) == expected, name


def test_a_relative_path_is_looked_up_in_the_current_folder_and_then_in_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "dpcache/models/prompts.txt"
    assert prompts.read("prompts", name) == (ROOT / name).read_text().splitlines()
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("mine\n")
    assert prompts.read("prompts", name) == ["mine"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nfine\n\xff\n", "is not a readable UTF-8 text file: line 3:"),
        ("a.csv", b"id,name\n1,fox\n", "line 1: none of prompt, .* is among its columns id, name"),
        ("a.csv", b"prompt,id\nfox,1\na fox, red,2\n", "line 3: 3 fields, but the header has 2"),
        ("a.csv", b'prompt,id\nfox,1\n"a" fox,2\n', "line 3: .*expected after"),
        ("a.csv", b"prompt,id\nfox,1\n,2\n", "line 3: '' is not a prompt"),
        ("a.tsv", b"id\tprompt\n1\n", "line 2: 1 fields, but the header has 2"),
        ("a.jsonl", b'"fox"\n{"prompt": "fox"\n', "line 2: not JSON"),
        ("a.jsonl", b'{"prompt": "fox"}\n\n{"prompt": 7}\n', "line 3: 7 is not a prompt"),
        ("a.jsonl", b'{"name": "fox"}\n', "line 1: none of prompt"),
    ],
)
def test_a_bad_file_of_prompts_names_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^prompts={path}.*{message}"):
        prompts.read("prompts", path)


def test_known_sets_of_prompts_are_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    tables = {
        "drawbench": {"Prompts": ["a fox ", "a cat"], "Category": ["x", "y"]},
        "partiprompts": {"Prompt": ["a fox", "a cat"]},
        "coco": {"captions": [["a fox", "the fox"], ["a cat"]]},
    }

    def load(repository, split):
        (name,) = (name for name, known in prompts.SETS.items() if known[:2] == (repository, split))
        return datasets.Dataset.from_dict(tables[name])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in prompts.SETS:
        assert prompts.read("prompts", name) == ["a fox", "a cat"]


@pytest.mark.ci
def test_a_known_set_without_a_hub_ends_in_one_clear_line(tmp_path):
    pytest.importorskip("datasets")
    code, _, err = run("prompts=drawbench", "budget=4", *TINY, folder=tmp_path)
    assert code == 1 and "Traceback" not in err
    assert "prompts=drawbench cannot be had" in err and "load_dataset('sayakpaul/drawbench', split='train')" in err


# --- stage=eval


@pytest.mark.ci
def test_finished_runs_are_scored_again_without_the_model(serial, tmp_path):
    output = tmp_path / "moved"  # the reference is found beside the runs, wherever they are
    shutil.copytree(serial, output)
    before = {path: path.read_bytes() for path in output.rglob("*.safetensors")}
    old = scores_of(output)
    eval_ = ["stage=eval", f"dir={output}", "eval=offline", "model.path=/no/such/model"]
    code, out, err = run(*eval_, folder=tmp_path)
    assert code == 0, err
    new = scores_of(output)
    assert len(new) == 3 and before == {path: path.read_bytes() for path in output.rglob("*.safetensors")}
    for name, result in new.items():
        assert set(result["metrics"]) == OFFLINE and result["metrics_unavailable"] == {}
        assert old[name]["metrics"].items() <= result["metrics"].items()
        assert len(result["per_prompt"]["clip"]) == 4 and "clip" in out
    # The same numbers as of a run that was asked for them at once.
    code, _, err = run("method=fora", "budget=4", *TINY, "eval=offline", folder=tmp_path)
    assert code == 0, err
    (direct,), (again,) = results(tmp_path), [new[path.name] for path in folders(output, "fora")]
    assert direct["metrics"] == again["metrics"] and direct["per_prompt"] == again["per_prompt"]
    # Nothing is asked for that is not there already, unless it shall be overwritten.
    (path,) = folders(output, "fora")
    result = json.loads((path / "result.json").read_text())
    result["metrics"]["psnr"]["mean"] = -1.0
    (path / "result.json").write_text(json.dumps(result))
    settings = {model: compose(f"model={model}", f"dir={path}") for model in ("tiny_flux", "flux")}
    rescore(settings["tiny_flux"], settings.get)
    assert json.loads((path / "result.json").read_text()) == result
    settings["tiny_flux"].overwrite = True
    rescore(settings["tiny_flux"], settings.get)
    assert scores_of(output) == new


def test_another_fine_reference_than_a_runs_own_is_refused(tmp_path):
    (tmp_path / ".hydra").mkdir()
    for own, asked in ((None, None), (500, 500), (500, None)):
        OmegaConf.save({"reference": {"num_inference_steps": own}}, tmp_path / ".hydra" / "config.yaml")
        check_fine(tmp_path, asked)
    with pytest.raises(ValueError, match=r"reference.num_inference_steps=100: this run has one of 500, and scoring"):
        check_fine(tmp_path, 100)
    with pytest.raises(ValueError, match="this run has no finer one"):
        check_fine(tmp_path / "elsewhere", 500)


@pytest.mark.ci
def test_runs_that_cannot_be_scored_are_named_and_the_others_go_on(serial, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(serial, output)
    (good,) = folders(output, "teacache")
    (lost,) = folders(output, "fora")
    for name, damage in {
        "no-json": lambda folder: (folder / "result.json").write_text("{"),
        "no-samples": lambda folder: shutil.rmtree(folder / "samples"),
        "no-batch": lambda folder: (folder / "samples" / "batch_0001.safetensors").unlink(),
        "no-reference": lambda folder: (folder / "result.json").write_text(
            json.dumps(json.loads((folder / "result.json").read_text()) | {"reference": "0123456789abcdef"})
        ),
    }.items():
        damage(shutil.copytree(lost, lost.parent / name))
    code, _, err = run("stage=eval", f"dir={output}", "eval.metrics=[psnr]", "overwrite=true", folder=tmp_path)
    assert code == 1 and "4 of 7 runs cannot be scored" in err and "Traceback" not in err
    log = (tmp_path / "evaluations" / "run.log").read_text()
    for name in ("no-json", "no-samples", "no-batch", "no-reference"):
        assert f"{name}: " in log
    for folder in (good, lost):
        assert set(json.loads((folder / "result.json").read_text())["metrics"]) == {"psnr", "ssim", "latent_error"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["stage=evaluate"], "stage"),
        (["stage=eval"], "dir=FOLDER"),
        (["stage=eval", "dir=/no/such/folder"], "dir=/no/such/folder"),
        (["-m", "stage=eval", "dir=a,b"], "without -m"),
    ],
)
def test_mistakes_with_stages_end_in_one_clear_line(tmp_path, arguments, named):
    code, _, err = run(*arguments, folder=tmp_path)
    assert code != 0 and named in err and "Traceback" not in err


# --- memory


@pytest.mark.ci
def test_a_sweep_that_runs_out_of_memory_goes_on_with_half_the_batch(serial, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setitem(ENVIRONMENT, "LOADS", str(tmp_path / "loads"))
    command = ["-m", "method=fora,teacache,uniform_skip", "budget=4", *TINY, "batch_size=4"]
    code, out, err = run(*command, "model.loader=helpers.loaders.small_memory", folder=tmp_path)
    log = (tmp_path / "loads").read_text().splitlines()
    assert log == ["tiny_flux", "out of memory"]  # neither the pipeline nor the large batch is tried again
    assert code == 1 and out.count("going on with batches of 2") == 2
    assert "a batch of 4 does not fit" in err and "method=teacache may decide once per batch" in err
    assert [result["batch_size"] for result in results(tmp_path)] == [2, 2]
    for method in ("fora", "uniform_skip"):
        expected, found = results_of(serial, method), results_of(tmp_path, method)
        assert all(expected[key] == found[key] for key in ("batch_size", "reference", "metrics", "per_prompt"))
        for path in folders(serial, method)[0].glob("samples/*.safetensors"):
            assert (folders(tmp_path, method)[0] / "samples" / path.name).read_bytes() == path.read_bytes()


# --- launchers


@pytest.mark.ci
def test_ray_gives_the_same_numbers_and_a_killed_worker_takes_nothing_with_it(serial, tmp_path):
    pytest.importorskip("ray")
    command = ["-m", "method=fora,teacache,uniform_skip", "budget=4", *TINY]
    command += ["hydra/launcher=ray", "hydra.launcher.init.num_cpus=2"]
    process, deadline = start(*command, folder=tmp_path), time.time() + 300
    while not (begun := list(tmp_path.glob("runs/*-teacache-*/samples/batch_0000.safetensors"))):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    name, first = begun[0].parents[1].name, begun[0].stat().st_mtime_ns
    workers = psutil.Process(process.pid).children(recursive=True)
    (worker,) = (worker for worker in workers if f"ray::{name}" in " ".join(worker.cmdline()))
    worker.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1 and f"failed: {name}: ActorDiedError" in err, err
    expected, finished = scores_of(serial), scores_of(tmp_path)
    assert finished == {run: expected[run] for run in expected if run != name} and "| fora |" in out
    assert "ActorDiedError" in json.loads((tmp_path / "runs" / name / "error.json").read_text())["error"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    assert len(written) == 2
    # The same jobs again, without Ray: only what is missing.
    code, _, err = run(*command[:-2], folder=tmp_path)
    assert code == 0, err
    assert scores_of(tmp_path) == expected and begun[0].stat().st_mtime_ns == first
    assert all(path.stat().st_mtime_ns == then for path, then in written.items())
    assert not list(tmp_path.glob("runs/*/error.json")) and len(list(tmp_path.glob("references/*"))) == 1


@pytest.mark.ci
def test_submitit_gives_the_same_numbers(serial, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(ROOT))  # its jobs do not start in the folder of run.py
    code, out, err = run(
        "-m", "method=fora,uniform_skip", "budget=4", *TINY, "hydra/launcher=submitit_local", folder=tmp_path
    )
    assert code == 0, err
    done = scores_of(tmp_path)
    assert len(done) == 2 and done.items() <= scores_of(serial).items() and "| fora |" in out


# --- one run, many processes


@pytest.mark.ci
def test_two_processes_share_a_run_and_make_the_same_images(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    settings = ["num_inference_steps=20", "num_prompts=12", "batch_size=1", "eval.timing.repeats=0"]
    command = ["method=uniform_skip", "budget=10", *settings]
    code, _, err = run(*command, folder=alone)
    assert code == 0, err
    shutil.copytree(alone, shared)
    shutil.rmtree(shared / "references")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, str(ROOT / "run.py"), *command, "overwrite=true", f"output_dir={shared}"]
    began, together = time.time_ns(), 0
    process = subprocess.Popen(command, cwd=shared, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and together < 2:
        together = max(
            together, len(list(shared.glob("*/*/batch_*.lock"))), len(list(shared.glob("*/*/*/batch_*.lock")))
        )
        time.sleep(0.005)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert together == 2  # batches that were made at the same time
    for kind in ("references/*/*.safetensors", "runs/*/samples/*.safetensors", "runs/*/images/*.png"):
        paths = sorted(alone.glob(kind))
        assert len(paths) == 12 == len(list(shared.glob(kind)))
        for path in paths:
            again = shared / path.relative_to(alone)
            assert again.read_bytes() == path.read_bytes() and again.stat().st_mtime_ns > began
    assert scores_of(shared) == scores_of(alone)


# --- wall clock


def test_flops_are_counted_per_call(pipe):
    layer = torch.nn.Linear(8, 16)
    total, calls, _ = timing.flops(
        [layer], lambda: [layer(torch.ones(n, 8)) for n in (4, 6)] + [torch.ones(3, 5) @ torch.ones(5, 7)]
    )
    assert calls == [2 * 4 * 8 * 16, 2 * 6 * 8 * 16] and total == sum(calls) + 2 * 3 * 5 * 7
    assert not layer._forward_hooks and not layer._forward_pre_hooks


@pytest.mark.ci
def test_a_result_counts_flops_of_full_and_skipped_steps(serial):
    counts = {method: results_of(serial, method)["flops"] for method in ("fora", "teacache", "uniform_skip")}
    assert len({count["full"] for count in counts.values()}) == 1  # the same run without a cache
    for method, count in counts.items():
        around = count["full"] - 8 * count["full_step"]  # text encoders and VAE
        steps = [n * count["computed_step"] + (8 - n) * count["skipped_step"] for n in range(9)]
        (computed,) = (n for n in range(9) if count["cached"] == pytest.approx(around + steps[n], rel=1e-9))
        assert computed == 4 or method == "teacache"  # which spends its budget on average
        assert count["skipped_step"] < 0.05 * count["computed_step"]
    assert counts["uniform_skip"]["skipped_step"] == 0  # it keeps the model's prediction
    assert counts["uniform_skip"]["computed_step"] == counts["uniform_skip"]["full_step"]
    assert counts["teacache"]["computed_step"] > counts["teacache"]["full_step"]  # it looks at its input first


def test_phases_are_timed_and_the_pipeline_is_left_as_it_was(pipe):
    began = time.perf_counter()
    with timing.phases(pipe) as phases:
        generate(pipe, ["red fox"], [0], 2, height=64, width=64, max_sequence_length=12)
    whole, seconds = time.perf_counter() - began, phases()
    assert set(seconds) == {"text_encoder", "vae"} and min(seconds.values()) > 0 and sum(seconds.values()) < whole
    assert "encode_prompt" not in vars(pipe) and "decode" not in vars(pipe.vae)


# --- tuning and W&B


@pytest.mark.ci
def test_tuning_maximises_psnr_within_the_budget_and_repeats_itself(tmp_path):
    pytest.importorskip("optuna")
    command = ["-m", "experiment=tune_teacache", "budget=4", *TINY, "hydra.sweeper.n_trials=4"]
    code, _, err = run(*command, folder=tmp_path)
    assert code == 0, err
    best = OmegaConf.load(tmp_path / "tune_teacache" / "optimization_results.yaml")
    found = [json.loads(path.read_text()) for path in tmp_path.glob("tune_teacache/*/result.json")]
    assert len(found) == 4 and any(result["computed_steps"] > 4.5 for result in found)
    within = [result["metrics"]["psnr"]["mean"] for result in found if result["computed_steps"] <= 4.5]
    assert best.best_value == max(within, default=0.0)
    assert {objective(result) for result in found} >= {0.0, best.best_value}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tune_teacache/*/result.json")}
    code, out, err = run(*command, folder=tmp_path)
    assert code == 0 and out.count("finished earlier") == 4, err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("tune_teacache/*/result.json")} == written


@pytest.mark.ci
def test_the_wandb_sweep_is_a_command_of_run_py(tmp_path):
    settings = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())
    assert settings["program"] == "run.py" and settings["command"][-1] == "${args_no_hyphens}"
    assert settings["metric"] == {"name": "objective", "goal": "maximize"}
    values = {name: spec.get("value", spec.get("min")) for name, spec in settings["parameters"].items()}
    arguments = [f"{name}={value}" for name, value in (values | {"budget": 4}).items()]
    code, _, err = run(*arguments, *TINY, folder=tmp_path)
    assert code == 0, err
    (result,) = results(tmp_path)
    assert result["computed_steps"] > 4.5  # the smallest threshold computes nearly everything ...
    (records,) = logged(tmp_path)
    assert records["history"]["objective"] == 0 and records["run"]["config"]["update"]["method"]["threshold"] == 0.01


def logged(folder):
    """What wandb's own reader finds in every offline run below `folder`, by type of record."""
    for path in sorted(folder.rglob("*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        found = {"path": path.parent, "history": {}, "summary": {}, "files": [], "artifact": []}
        for record in map(json.loads, lines):
            kind, content = record["type"], record.get(record["type"], {})
            if kind == "run":
                found[kind] = content
            elif kind == "history":
                found[kind] |= content["item"]
            elif kind == "summary":
                found[kind] |= content.get("update", {})
            elif kind == "files":
                found[kind] += [file["path"] for file in content["files"]]
            elif kind == "artifact":
                found[kind] += content["manifest"]["contents"]
        yield found


@pytest.mark.ci
def test_wandb_holds_config_metrics_pictures_and_all_images(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "WANDB_DATA_DIR", str(tmp_path / "data"))
    code, _, err = run_alone("-m", "method=fora", "budget=4,5", *TINY, "logger=wandb", folder=tmp_path)
    assert code == 0, err
    runs = list(logged(tmp_path))
    assert len(runs) == 2 and len({run["run"]["run_group"] for run in runs}) == 1
    for run_ in runs:
        folder = run_["path"].parents[1]
        result = json.loads((folder / "result.json").read_text())
        config = run_["run"]["config"]["update"]
        assert config["budget"] == result["budget"] and config["method"]["_target_"] == "baselines.fora.fora"
        assert config["num_prompts"] == 4 and config["eval"]["metrics"] == list(result["metrics"])
        for name, value in result["metrics"].items():
            logged_ = [run_["history"][f"{name}{end}"] for end in ("", "_lo", "_hi", "_n")]
            assert logged_ == [value["mean"], *value["ci95"], 4]
        assert run_["history"]["flops_cached"] == result["flops"]["cached"]
        assert run_["summary"]["schedules"] == result["schedules"] and run_["summary"]["label"] == result["label"]
        for picture in ("grid", "schedule"):
            kept = run_["history"][f"{picture}.path"]
            assert kept in run_["files"]
            assert (run_["path"] / "files" / kept).read_bytes() == (folder / f"{picture}.png").read_bytes()
        assert run_["history"]["samples.nrows"] == 4 and run_["history"]["samples.ncols"] == 4
        stored_ = [Image.open(e["local_path"]) for e in run_["artifact"] if e["path"].endswith(".png")]
        in_wandb = {image.tobytes() for image in stored_}
        own = {Image.open(path).tobytes() for path in (folder / "images").iterdir()}
        assert len(own) == 4 and own < in_wandb and len(in_wandb) == 8  # and the references
