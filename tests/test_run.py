"""`run.py` as its users call it: whole runs, sweeps, kills and mistakes."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from unittest.mock import patch

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dpcache import Calibration
from dpcache.models.pretrained import EMBEDDED
from dpcache.sampler import generate
from helpers.commands import ENVIRONMENT, ROOT, TINY, fork, results, run, run_alone
from helpers.embedded import CALL

COUNTED = ["model.loader=helpers.loaders.counted"]


def count_loads(folder, monkeypatch):
    """From here on commands with `COUNTED` note what they load; gives what returns the notes."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setitem(ENVIRONMENT, "LOADS", str(folder / "loads"))
    return lambda: (folder / "loads").read_text().splitlines()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run of dpcache, with timing."""
    folder = tmp_path_factory.mktemp("outputs")
    code, out, err = run_alone("budget=5", *TINY[:-1], "eval.timing.repeats=1", folder=folder)
    assert code == 0, err
    assert "%|" not in err and "\r" not in err  # bars are for terminals
    return folder, out


def test_the_run_folder_is_whole(finished):
    folder, out = finished
    (result,) = results(folder)
    (run_folder,) = folder.glob("runs/*K5*")
    assert (result["model"], result["method"], result["budget"]) == ("tiny_flux", "dpcache", 5)
    assert result["num_inference_steps"] == 8 and result["seed"] == 0 and result["computed_steps"] == 5
    assert set(result["metrics"]) == {"psnr", "ssim", "latent_error"} and result["metrics_unavailable"] == {}
    assert all(m["n"] == 4 and m["ci95"][0] <= m["mean"] <= m["ci95"][1] for m in result["metrics"].values())
    timing = result["timing"]
    assert timing["ideal_speedup"] == 1.6
    assert timing["efficiency"] is None and timing["transformer_speedup"] > 0  # of one round, which has no spread
    assert timing["speedup_range"] == [timing["speedup"]] * 2 and timing["spread"] == 0
    assert timing["unreliable"] == "a single round has no spread" and f"not reliable: {timing['unreliable']}" in out
    assert timing["speedup"] > 0 and timing["reference_s"] > 0 and timing["cached_s"] > 0
    for run_ in ("full", "cached"):
        phases = timing["phases"][run_]
        assert set(phases) == {"text_encoder", "transformer", "vae"} and sum(phases.values()) > 0
    assert timing["phases"]["full"]["transformer"] / timing["phases"]["cached"]["transformer"] == pytest.approx(
        timing["transformer_speedup"]
    )
    assert time.time() - 600 < datetime.fromisoformat(result["ended"]).timestamp() < time.time()
    assert result["memory"] and result["versions"]["torch"] and len(result["config_hash"]) == 12
    for picture in ("grid.png", "schedule.png", "cost.png"):
        assert Image.open(run_folder / picture).size[0] > 300
    images = sorted((run_folder / "images").glob("*.png"))
    assert len(images) == 4 and all(Image.open(image).size == (64, 64) for image in images)
    assert "5 of 8 steps computed" in out and "psnr" in out and "speed-up" in out


PHASES = ["metrics loaded", "model loaded", "calibration", "method built", "full-step reference", "samples"]


def test_into_a_file_a_run_prints_a_line_for_each_phase_and_no_bars(finished):
    _, out = finished
    found = re.findall(r"^  (\S.*?) +\d+\.\d s$", out, re.MULTILINE)
    assert found == [*PHASES, "timing", "FLOPs", "metrics", "pictures"]
    assert "\r" not in out and "full, 8 steps" in out and "dpcache, 5 steps" in out


@pytest.mark.ci
def test_runs_are_also_compared_with_a_finer_reference(tmp_path, pipe):
    few = ["num_inference_steps=8", "num_prompts=2", "batch_size=2", "eval.timing.repeats=0"]
    fine = ["reference.num_inference_steps=24", "eval.metrics=[psnr,latent_error]"]
    code, out, err = run("-m", "method=full,fora", "budget=4", *few, *fine, folder=tmp_path)
    assert code == 0, err
    full, cached = sorted(results(tmp_path), key=lambda result: result["method"] != "full")
    prompts = full["per_prompt"]["prompts"]
    coarse, exact = (generate(pipe, prompts, [0, 1], steps, decode=False, **CALL).latents for steps in (8, 24))
    expected = (coarse - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert full["per_prompt"]["latent_error_fine"] == pytest.approx(expected.tolist(), rel=1e-3)
    assert full["metrics"]["latent_error"]["mean"] == 0 < full["metrics"]["latent_error_fine"]["mean"]
    assert full["metrics"]["psnr"]["mean"] == 100 > full["metrics"]["psnr_fine"]["mean"] > 10
    assert full["fine_reference"] == cached["fine_reference"] != full["reference"]
    assert len(list(tmp_path.glob("references/*"))) == 2 and "PSNR to the fine reference" in out

    code, _, err = run("stage=eval", f"dir={tmp_path}", "eval.metrics=[ssim]", folder=tmp_path)
    assert code == 0, err
    assert all(0 < result["metrics"]["ssim_fine"]["mean"] < 1 for result in results(tmp_path))
    code, _, err = run("budget=4", *few, "reference.num_inference_steps=8", folder=tmp_path)
    assert code == 1 and "reference.num_inference_steps=8 must be above num_inference_steps=8" in err


@pytest.mark.ci
def test_a_quality_in_place_of_a_budget(tmp_path):
    few = ["method=taylorseer_lite", "num_inference_steps=8", "num_prompts=2", "batch_size=2", "eval.timing.repeats=0"]
    few += ["calibration.num_prompts=2", "eval.metrics=[psnr]"]
    code, out, err = run("quality=30", *few, folder=tmp_path)
    assert code == 0, err
    (result,) = results(tmp_path)
    tried = {int(budget): decibels for budget, decibels in result["quality"]["tried"].items()}
    assert result["quality"]["wanted"] == 30 and result["computed_steps"] == result["budget"] < 8
    assert tried[result["budget"]] >= 30 and all(tried[budget] < 30 for budget in tried if budget < result["budget"])
    assert (
        result["metrics"]["psnr"]["mean"] > 20 and f"budget={result['budget']}: {tried[result['budget']]:.2f} dB" in out
    )
    code, out, err = run("quality=0.9", "quality_metric=ssim", *few, folder=tmp_path)
    assert code == 0, err
    (other,) = (other for other in results(tmp_path) if other["quality"]["of"] == "SSIM")
    assert other["quality"]["tried"][str(other["budget"])] >= 0.9 and f"budget={other['budget']}: SSIM 0.9" in out
    code, _, err = run("quality=30", "budget=5", *few, folder=tmp_path)
    assert code == 1 and "budget=5 and quality=30.0: give one of the two" in err


def test_a_finished_run_is_not_run_again(finished):
    folder, _ = finished
    began = time.time()
    code, out, _ = run("budget=5", *TINY[:-1], "eval.timing.repeats=1", folder=folder)
    assert code == 0 and "finished earlier" in out
    assert all(path.stat().st_mtime < began for path in folder.glob("runs/*/result.json"))


@pytest.mark.ci
def test_sweep_shares_the_reference_and_a_failing_job_takes_nothing_with_it(tmp_path, monkeypatch):
    loads = count_loads(tmp_path, monkeypatch)
    command = ["-m", "method=fora,teacache,fewer_steps", "budget=9,4", *TINY, *COUNTED, "model=tiny_flux"]
    code, out, err = run(*command, folder=tmp_path)
    assert loads() == ["tiny_flux"] and "model=tiny_flux method=fora budget=4" in out  # jobs go by model first
    assert code == 1 and len(re.findall(r"^failed: .*K9.*: error: .*budget=9", err, re.M)) == 3
    done = {result["method"]: result for result in results(tmp_path)}
    assert set(done) == {"fora", "teacache", "fewer_steps"}
    assert done["fora"]["computed_steps"] == 4 and abs(done["teacache"]["computed_steps"] - 4) <= 1
    assert len(list(tmp_path.glob("references/*"))) == 1 and len(list(tmp_path.glob("calibrations/*.safetensors"))) == 1
    assert f"| fora | {done['fora']['metrics']['psnr']['mean']:.2f}" in out  # the sweep ends with the board
    assert "### Ranks by PSNR (dB): tiny_flux, 8 steps, K = 4" in out
    assert re.search(r"^\| 1 \| (fora|teacache) \|", out, re.M)
    files = {path.name for path in (tmp_path / "runs").glob("*.*")}
    assert files >= {"leaderboard.csv", "leaderboard.md", "leaderboard.png", "report.html"}
    # An earlier sweep's failures do not fail the next one.
    code, _, err = run("-m", "method=fora", "budget=4", *TINY, folder=tmp_path)
    assert code == 0 and "failed" not in err


@pytest.mark.ci
def test_rows_of_the_board_carry_what_the_command_changed(tmp_path):
    changed = ["method.warmup=3,2", "calibration.num_prompts=1", "label=null"]
    code, out, err = run("-m", "method=dpcache", "budget=4", *TINY, *changed, folder=tmp_path)
    assert code == 0, err
    labels = {f"dpcache calibration.num_prompts=1 warmup={warmup}" for warmup in (2, 3)}
    assert {result["label"] for result in results(tmp_path)} == labels
    assert all(f"| dpcache warmup={warmup} |" in out for warmup in (2, 3))  # what they share tells nothing
    code, *_ = run("method=dpcache", "budget=4", *TINY, *changed[1:2], "method.warmup=2", "label=mine", folder=tmp_path)
    assert code == 0 and "mine" in {result["label"] for result in results(tmp_path)} and len(results(tmp_path)) == 2


@pytest.mark.ci
def test_calibration_prompts_may_come_from_another_file(tmp_path):
    (tmp_path / "others.txt").write_text("red car\n\nblue ball\n")
    command = ["budget=4", *TINY, f"calibration.prompts={tmp_path / 'others.txt'}"]
    code, _, err = run(*command, folder=tmp_path)
    assert code == 0, err
    (path,) = tmp_path.glob("calibrations/*.safetensors")
    given = ["prompts=" + str(tmp_path / "others.txt"), "num_prompts=2", f"calibration.path={path}"]
    assert run("budget=5", *TINY[:1], *TINY[3:], *given, folder=tmp_path)[0] == 0  # none left to calibrate with
    assert Calibration.load(path).made_from["prompts"] == ["red car", "blue ball"]
    code, _, err = run(*command, "calibration.num_prompts=3", folder=tmp_path)
    assert code == 1 and "between 1 and the 2 prompts of calibration.prompts=" in err


@pytest.mark.ci
def test_a_parallel_sweep_finishes_its_jobs_with_one_reference(tmp_path, monkeypatch):
    loads = count_loads(tmp_path, monkeypatch)
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *COUNTED]
    code, _, err = run_alone(
        "-m", "method=fora,uniform_skip,fewer_steps", "budget=4", *TINY, *parallel, folder=tmp_path
    )
    assert code == 0, err
    assert len(results(tmp_path)) == 3 and len(list(tmp_path.glob("references/*"))) == 1
    assert 1 <= len(loads()) <= 2  # once in each worker


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    kept, killed = tmp_path / "kept", tmp_path / "killed"
    kept.mkdir(), killed.mkdir()
    command = ["method=taylorseer", "budget=4", *TINY, "batch_size=1"]
    for stage in ("references/*/batch_0001.safetensors", "runs/*/samples/batch_0000.safetensors"):
        process, deadline = fork(*command, folder=killed), time.time() + 120
        while not list(killed.glob(stage)):
            assert process.is_alive() and time.time() < deadline
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert results(killed) == []
    assert run(*command, folder=kept)[0] == 0 and run(*command, folder=killed)[0] == 0
    for path in sorted(kept.glob("runs/*/images/*.png")):
        assert path.read_bytes() == (killed / path.relative_to(kept)).read_bytes()
    for path in kept.glob("runs/*/samples/*.safetensors"):
        ours, theirs = load_file(path), load_file(killed / path.relative_to(kept))
        assert all((ours[name] == theirs[name]).all() for name in ours)
    assert results(kept)[0]["metrics"] == results(killed)[0]["metrics"]


@pytest.mark.ci
def test_a_result_is_never_taken_for_that_of_other_prompts(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("dog\ncat\n")
    command = ["method=fora", "budget=4", "num_inference_steps=6", "num_prompts=2", f"prompts={file}", "batch_size=1"]
    command += ["eval.metrics=[psnr]", "eval.timing.repeats=0"]
    assert run(*command, folder=tmp_path)[0] == 0
    (folder,) = tmp_path.glob("runs/*-fora-*")
    file.write_text("red car\nsun\n")
    code, _, err = run(*command, folder=tmp_path)
    assert code == 1 and "was made from other prompts" in err and "overwrite=true makes it again" in err
    shutil.copytree(folder, tmp_path / "old")
    shutil.rmtree(folder / "samples")
    code, _, err = run(*command, folder=tmp_path)
    assert code == 1 and "result.json was made from other prompts" in err

    process, deadline = fork(*command, "overwrite=true", folder=tmp_path), time.time() + 120
    while not (folder / "samples/batch_0000.safetensors").exists():
        assert process.is_alive() and time.time() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert results(tmp_path) == [] and all("dog" not in path.name for path in (folder / "images").iterdir())
    code, out, err = run(*command, folder=tmp_path)
    assert code == 0 and "finished earlier" not in out, err
    assert results(tmp_path)[0]["per_prompt"]["prompts"] == ["red car", "sun"]

    shutil.copy(tmp_path / "old/result.json", folder)
    code, out, err = run("stage=eval", f"dir={folder}", "eval.metrics=[ssim]", folder=tmp_path)
    assert code == 1 and "1 of 1 runs cannot be scored" in err
    said = (tmp_path / "evaluations" / "run.log").read_text()
    assert "was made from other prompts or images: its command with overwrite=true makes it again" in said


@pytest.mark.ci
def test_a_changed_calibration_is_refused_before_its_samples_are_mixed_with_others(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("dog\n")
    command = ["method=dpcache", "budget=4", "num_inference_steps=6", "num_prompts=2", "batch_size=1"]
    command += [f"calibration.prompts={file}", "calibration.num_prompts=1", "eval.metrics=[psnr]"]
    command += ["eval.timing.repeats=0"]
    assert run(*command, folder=tmp_path)[0] == 0
    (folder,) = tmp_path.glob("runs/*-dpcache-*")
    record = (folder / "made_with.json").read_text()

    file.write_text("sun\n")
    refusal = "was made with another calibration, whose prompts or file have changed since: overwrite=true"
    code, _, err = run(*command, folder=tmp_path)
    assert code == 1 and refusal in err and "Traceback" not in err
    result = (folder / "result.json").read_text()
    (folder / "result.json").unlink()
    (folder / "samples/batch_0001.safetensors").unlink()
    code, _, err = run(*command, folder=tmp_path)
    assert code == 1 and refusal in err and not list(folder.glob("samples/batch_0001*"))

    (folder / "result.json").write_text(result)
    (folder / "made_with.json").unlink()  # as of an earlier version
    code, out, _ = run(*command, folder=tmp_path)
    assert code == 0 and "finished earlier" in out
    code, out, err = run(*command, "overwrite=true", folder=tmp_path)
    assert code == 0 and (folder / "made_with.json").read_text() != record, err


@pytest.mark.ci
def test_a_changed_model_is_refused_before_its_samples_are_mixed_with_others(tmp_path):
    shutil.copytree(EMBEDDED / "tiny_flux", tmp_path / "model")
    (tmp_path / "model/expectation.json").unlink()
    command = ["method=fora", "budget=4", "num_inference_steps=6", "num_prompts=2", "batch_size=1"]
    command += ["eval.metrics=[psnr]", "eval.timing.repeats=0", f"model.path={tmp_path / 'model'}"]
    assert run(*command, folder=tmp_path)[0] == 0
    (folder,) = tmp_path.glob("runs/*-fora-*")
    file = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    file.touch()  # without another content
    code, out, err = run(*command, folder=tmp_path)
    assert code == 0 and "finished earlier" in out, err

    weights = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, file, {"format": "pt"})
    refusal = "was made with a model or a scheduler that has changed since: overwrite=true makes it again"
    code, _, err = run(*command, folder=tmp_path)
    assert code == 1 and refusal in err and "Traceback" not in err
    (folder / "result.json").unlink()
    (folder / "samples/batch_0001.safetensors").unlink()
    code, _, err = run(*command, folder=tmp_path)
    assert code == 1 and refusal in err and not list(folder.glob("samples/batch_0001*"))
    code, out, err = run(*command, "overwrite=true", folder=tmp_path)
    assert code == 0 and len(list(tmp_path.glob("references/*"))) == 2, err
    code, out, _ = run(*command, folder=tmp_path)
    assert code == 0 and "finished earlier" in out


@pytest.mark.ci
def test_wandb_logs_a_run_offline(tmp_path):
    code, _, err = run("method=uniform_skip", "budget=4", *TINY, "logger=wandb", folder=tmp_path)
    assert code == 0, err
    assert len(results(tmp_path)) == 1 and list(tmp_path.glob("runs/*/wandb/offline-run-*"))


MISTAKES = [
    (["model=fluxx"], "Could not find 'model/fluxx'"),
    (["method=dpcach"], "Could not find 'method/dpcach'"),
    (["budget=many"], "budget"),
    (["budgett=9"], "budgett"),
    (["budget=2"], "budget=2 must be between warmup=3"),
    (["budget=51"], "num_inference_steps=50"),
    (["method.order=7"], "order=7"),
    (["model.path=/no/such/model"], "model.path=/no/such/model"),
    (["model=flux"], "model.path=black-forest-labs/FLUX.1-dev"),
    (["model=dit"], "model.path=facebook/DiT-XL-2-256"),
    (["model=hunyuan_video"], "model.path=hunyuanvideo-community/HunyuanVideo"),
    (["model=wan21_t2v_14b"], "model.path=Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    (["model=wan21_i2v"], "prompts=FILE must be given: csv, tsv or jsonl, with columns prompt, image"),
    (["model=dit", "method=teacache", "method.polynomial=published"], "none is known for model=dit, only for model="),
    (["method.steps=published"], "method.steps=published: none is known for model=tiny_flux, only for model=flux"),
    (["method.warmup=published"], "method.warmup=published: none is known for model=tiny_flux, nor for any other"),
    (["model.scheduler.name=Eulerr"], "model.scheduler.name=Eulerr"),
    (["model.path=/no/such/model", "+dry_run=true"], "model.path=/no/such/model"),
    (["model.dtype=int8"], "model.dtype=int8"),
    (["prompts=/no/such/prompts.txt"], "prompts=/no/such/prompts.txt"),
    (["num_prompts=100000"], "num_prompts=100000"),
    (["calibration.path=/no/such/file"], "calibration file /no/such/file does not exist"),
    (["eval.metrics=[beauty]", *TINY, "budget=4"], "beauty"),
    (["eval=offline", "model.metrics.clip_model=ViT-Z-99", *TINY, "budget=4"], "model.metrics.clip_model=ViT-Z-99 is"),
    (["model.metrics.clip_modell=ViT-L-14"], "clip_modell"),
    (["eval.require_all=perhaps"], "require_all"),
    (["dry_run=true", "stage=calibrate"], "dry_run=true tells of stage=run alone, not of stage=calibrate"),
    (["dry_run=true", "stage=eval", "dir=."], "dry_run=true tells of stage=run alone, not of stage=eval"),
    (["++budget=6", "quality=40"], "budget=6 and quality=40.0: give one of the two"),
    (["model.device=gpu"], "model.device=gpu is not auto, nor cpu, cuda, cuda:1, mps"),
    (["model.device=hpu"], "model.device=hpu cannot be used on this machine, where auto is "),
    (["seed=99999999999999999999"], "seed=99999999999999999999 must be between -2**63 and 2**64 - 16"),
    (["calibration.seed=18446744073709551607"], "calibration.seed=18446744073709551607 must be between"),
    (["+model.call.num_inference_steps=20"], "model.call.num_inference_steps is not given here: num_inference_steps=T"),
    (["+model.call.prompt=foo"], "model.call.prompt is not given here: prompts=FILE has the prompts"),
    (["+model.call.heigth=64"], "model.call.heigth is not one of those that FluxPipeline takes: "),
    (["+model.scheduler.shfit=3"], "model.scheduler.shfit is not one of those that FlowMatchEulerDiscreteScheduler"),
    (
        ["model=tiny_dit", "prompts=classes.txt", "num_prompts=2", "method=fora"],
        "prompt '10' is not one of the model's",
    ),
]


COMMANDS = """
import contextlib, io, json, os, runpy, sys
script, answers = sys.argv[1], []
sys.path.insert(0, os.path.dirname(script))
for arguments in json.load(sys.stdin):
    sys.argv, said, code = [script, *arguments], io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit:
            code = exit.code
    answers.append((code, said.getvalue()))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Exit code and stderr of every mistaken command, one after the other in one process, and its folder."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "classes.txt").write_text("9\n10\n")
    commands = json.dumps([[*arguments, f"output_dir={folder}"] for arguments, _ in MISTAKES])
    process = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(ROOT / "run.py")],
        input=commands,
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    return folder, json.loads(process.stdout.splitlines()[-1])


@pytest.mark.ci
@pytest.mark.parametrize("index", range(len(MISTAKES)), ids=lambda index: MISTAKES[index][0][0])
def test_mistakes_end_in_one_clear_line(answers, index):
    folder, (code, err) = answers[0], answers[1][index]
    assert code not in (0, None) and MISTAKES[index][1] in err and "Traceback" not in err
    assert not list(folder.glob("runs/*/result.json"))


@pytest.mark.ci
def test_a_mistake_as_a_command(tmp_path):
    code, _, err = run_alone("budget=2", folder=tmp_path)
    assert code == 1 and "error: budget=2 must be between warmup=3" in err and "Traceback" not in err


@pytest.mark.ci
def test_unreadable_files_are_named(tmp_path, finished):
    binary = tmp_path / "prompts.txt"
    binary.write_bytes(b"\xff\xfe\x00dog")
    code, _, err = run(f"prompts={binary}", folder=tmp_path)
    assert code != 0 and f"prompts={binary} is not a readable UTF-8 text file" in err
    code, _, err = run(f"calibration.path={binary}", *TINY, "budget=5", folder=tmp_path)
    assert code != 0 and "is not a calibration file" in err
    (calibration,) = finished[0].glob("calibrations/*.safetensors")
    changed = [*TINY[1:], "num_inference_steps=9", "budget=5"]
    code, _, err = run(f"calibration.path={calibration}", *changed, folder=tmp_path)
    assert code != 0 and "num_inference_steps=9: this calibration was made for 8" in err


def test_a_setting_is_one_line_and_a_bug_shows_its_traceback(tmp_path):
    given = [*TINY, "method=uniform_skip", "budget=4", "eval.metrics=[psnr]"]
    code, _, err = run(*given, "model.call.max_sequence_length=600", folder=tmp_path)
    assert (
        code == 1
        and "FluxPipeline does not take these arguments: `max_sequence_length` cannot be greater than 512" in err
    )
    assert "Traceback" not in err
    (tmp_path / "faulty.py").write_text(
        "from dpcache.method import Method\nfrom baselines.full import full\n\n\nclass Faulty(Method):\n"
        "    def build(self, pipe, calibration=None):\n        raise ValueError('a bug')\n\n\n"
        "def faulty(budget, num_inference_steps):\n    plain = full(num_inference_steps)\n"
        "    return Faulty(plain.schedule, plain.site, plain.predictor)\n"
    )
    with patch.dict(ENVIRONMENT, PYTHONPATH=str(tmp_path)):
        code, _, err = run(*given, "method._target_=faulty.faulty", folder=tmp_path)
    assert code == 1 and "Traceback" in err and "ValueError: a bug" in err
