"""What a process keeps between the jobs of a sweep shows in the time that they take, and in nothing else."""

import copy
import shutil
import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from baselines.dbcache import dbcache
from baselines.fora import fora
from baselines.library import LibraryCache
from baselines.solver import solver
from baselines.taylorseer import taylorseer
from baselines.teacache import teacache
from dpcache import SettingError
from dpcache._diffusers import hook_on
from dpcache.method import Method, session_of
from dpcache.models.pretrained import EMBEDDED
from dpcache.predictors import Reuse
from dpcache.sampler import Batch
from dpcache.schedules import EvenlySpaced
from dpcache.session import Report
from dpcache.statistics import Gram
from eval import runs
from eval.kept import Kept, Loaded
from eval.metrics import METRICS, Metric, Settings, load
from eval.store import load_or_make, stored
from helpers.commands import TINY, compose
from helpers.tracing import watched
from hydra_plugins.dpcache_sweeper import ModelByModel

PROMPTS, T = ["dog"], 6
METHOD = taylorseer(3, T)


@dataclass(frozen=True)
class Raising(Reuse):
    """Raises at the first step that is skipped, in the middle of a generation."""

    error: BaseException

    def weights(self, keys, step):
        raise self.error


def raising(error: BaseException) -> Method:
    return Method(EvenlySpaced(3, T), "residual", Raising(error))


class Process:
    """Runs jobs with a store of its own. Loading gives a pipeline with the modules of `pipe`, and notes its dtype."""

    def __init__(self, pipe, config, folder):
        self.pipe, self.config, self.folder, self.loads, self.jobs = pipe, config, folder, [], 0

    def load(self, dtype, scheduler, **settings):
        self.loads.append(dtype)
        parts, changed = dict(self.pipe.components), {key: value for key, value in scheduler.items() if key != "name"}
        parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config, **changed)
        if dtype != "float32":
            parts["transformer"] = copy.deepcopy(parts["transformer"]).to(getattr(torch, dtype))
        return type(self.pipe)(**parts)

    @contextmanager
    def run(self, *overrides):
        """A job in a folder of its own, so that nothing comes from a file."""
        self.jobs += 1
        folder = self.folder / str(self.jobs)
        config = OmegaConf.merge(self.config, OmegaConf.from_dotlist([f"output_dir={folder}", *overrides]))
        with runs.pipeline(config) as loaded:
            yield runs.Run(config, loaded, folder)

    def latents(self, method, *overrides) -> torch.Tensor:
        with self.run(*overrides) as one:
            return one.samples(method, PROMPTS)[0].latents


@pytest.fixture(scope="module")
def config():
    config = compose(*TINY)
    OmegaConf.set_struct(config, False)
    return config


@pytest.fixture
def process(pipe, config, tmp_path, monkeypatch):
    process = Process(pipe, config, tmp_path)
    monkeypatch.setattr(runs, "PROCESS", Kept())
    monkeypatch.setattr(runs, "get_method", lambda name: process.load)
    return process


# --- pipelines


def test_a_job_after_others_makes_the_bits_that_it_makes_alone(process):
    alone = process.latents(METHOD)
    for other in (fora(3, T), dbcache(3, T, threshold=0.1), solver(3, T, "UniPCMultistepScheduler")):
        assert not torch.equal(process.latents(other), alone)
        assert torch.equal(process.latents(METHOD), alone)
    assert process.loads == ["float32"]

    with process.run() as one:  # a job that leaves everything as it should not
        one.pipe.scheduler = UniPCMultistepScheduler.from_config(one.pipe.scheduler.config, use_flow_sigmas=True)
        one.pipe.scheduler.set_timesteps(3, mu=1.0)
    assert torch.equal(process.latents(METHOD), alone) and process.loads == ["float32"]


@pytest.mark.parametrize(
    "changed",
    [
        "model.dtype=bfloat16",
        pytest.param("model.scheduler.base_shift=2.5", marks=pytest.mark.ci),
        pytest.param("model.device=cpu:0", marks=pytest.mark.ci),
    ],
)
def test_a_pipeline_is_not_given_to_a_job_with_other_settings(process, changed):
    alone = process.latents(METHOD)
    with process.run(changed) as one:
        other = weakref.ref(one.pipe)
    del one
    assert torch.equal(process.latents(METHOD), alone) and len(process.loads) == 3 and other() is None


def test_a_model_whose_files_have_changed_is_loaded_anew(process, tmp_path):
    (tmp_path / "model" / "vae").mkdir(parents=True)
    path = f"model.path={tmp_path / 'model'}"
    for count in (1, 1, 2):
        with process.run(path):
            assert len(process.loads) == count
        if process.jobs == 2:
            (tmp_path / "model" / "vae" / "weights").write_text("new")


def test_what_a_models_folder_holds_beside_weights_is_part_of_what_a_call_is_made_by(pipe, config, tmp_path):
    shutil.copytree(EMBEDDED / "tiny_flux", tmp_path / "model")

    pipe = type(pipe)(**pipe.components)

    def made_by():
        pipe.register_to_config(_name_or_path=tmp_path / "model")
        return runs.Run(config, Loaded(pipe), tmp_path).made_by

    before = made_by()
    for name in ("README.md", "grid.png"):
        (tmp_path / "model" / name).write_text("other")
    assert made_by() == before
    file = tmp_path / "model/tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace("dog", "god"))
    assert made_by() != before


def test_a_refused_job_leaves_the_pipeline_as_it_was_and_after_any_other_error_it_is_loaded_anew(process):
    alone = process.latents(METHOD)
    with process.run() as one:
        pipe = one.pipe
    with pytest.raises(SettingError):
        process.latents(raising(SettingError("refused")))
    assert session_of(pipe) is None and hook_on(pipe.transformer) is None and not watched(pipe.scheduler)
    assert torch.equal(process.latents(METHOD), alone) and len(process.loads) == 1
    for count, error in enumerate((RuntimeError("a bug"), torch.OutOfMemoryError("made up")), 2):
        with pytest.raises(type(error)):
            process.latents(raising(error))
        assert torch.equal(process.latents(METHOD), alone) and len(process.loads) == count


def test_the_old_pipeline_is_gone_before_the_new_one_is_loaded(process, monkeypatch):
    with process.run() as one:
        old = weakref.ref(one.pipe)
        one.samples(dbcache(3, T, threshold=0.1), PROMPTS), one.reference(PROMPTS, T)
    del one
    there, load = [], process.load
    monkeypatch.setattr(process, "load", lambda **settings: there.append(old()) or load(**settings))
    with process.run("model.dtype=bfloat16"):
        assert there == [None]


class HalfWay(LibraryCache):
    """A library that changes the pipeline's class and then fails."""

    def start(self, pipe, transformer):
        type(pipe).__call__, type(pipe)._is_cached = (lambda *_, **__: None), True
        raise RuntimeError("half way")

    def stop(self, pipe, transformer):
        raise AssertionError("never started")


def test_a_library_that_fails_half_way_leaves_no_trace_on_the_class(process, pipe):
    alone, before = process.latents(METHOD), dict(vars(type(pipe)))
    with pytest.raises(RuntimeError, match="half way"):
        process.latents(HalfWay(T))
    assert dict(vars(type(pipe))) == before and torch.equal(process.latents(METHOD), alone)


# --- references, metrics


def test_a_reference_is_read_once_and_another_one_takes_its_place(process, monkeypatch):
    read = []
    monkeypatch.setattr(runs, "load_or_make", lambda folder, *args: read.append(folder) or load_or_make(folder, *args))
    folder = f"output_dir={process.folder / 'shared'}"
    for seed in (0, 0, 1, 0):
        with process.run(folder, f"seed={seed}") as one:
            reference = one.reference(PROMPTS, T)
    assert len(read) == 3 and len(set(read)) == 2
    assert torch.equal(reference.latents, stored(read[-1], PROMPTS).latents)


def test_another_vae_or_text_encoder_has_a_reference_and_a_calibration_of_its_own(process, pipe):
    def names(*overrides) -> tuple[str, str]:
        with process.run(*overrides) as one:
            return one.reference_folder(PROMPTS, T).name, one.calibration((), PROMPTS)[1].name

    found = [names(), names("model.vae_dtype=bfloat16"), names("model.vae_tiling=true")]
    assert names("model.vae_dtype=float32") == found[0]  # which it is in any case
    parts = dict(process.pipe.components)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        changed = copy.deepcopy(parts[name])
        with torch.no_grad():
            next(changed.parameters()).add_(1)
        process.pipe = type(pipe)(**parts | {name: changed})
        found.append(names(f"model.path={name}"))
    references, calibrations = zip(*found)
    assert len(set(references)) == len(set(calibrations)) == 6
    with process.run(f"calibration.path={process.folder / '1' / 'calibrations' / calibrations[0]}") as one:
        assert one.calibration((), PROMPTS)[0].made_from["prompts"] == PROMPTS


def test_a_metric_is_loaded_once_for_the_same_settings_and_again_where_it_could_not_be(monkeypatch):
    loads, kept = [], Kept()

    def loader(settings):
        loads.append(settings.device)
        if settings.device == "broken":
            raise RuntimeError("not today")
        return lambda sample, reference: None

    monkeypatch.setitem(METRICS, "mine", Metric(name="mine", load=loader, label="mine", higher_is_better=True))
    for device in ("cpu", "cpu", "cuda", "broken", "broken"):
        load(["mine", "psnr"], Settings(device=device), kept=kept)
    assert loads == ["cpu", "cuda", "broken", "broken"]


def test_a_given_calibration_is_known_by_what_the_method_takes_of_it(process, config):
    def known(calibration, statistics=()) -> str:
        calibration.save(path)
        given = OmegaConf.merge(config, {"calibration": {"path": str(path)}})
        return runs.made_with(given, statistics, [])

    path = process.folder / "calibration.safetensors"
    with process.run() as one:
        one.pipe.set_progress_bar_config(disable=True)
        calibration = runs.calibrate(one.pipe, PROMPTS, T, (), **one.call)
        before = known(calibration)
        calibration.arrays["another"] = np.ones(2)  # that a run of another method has added
        assert known(calibration) == before
        calibration.arrays[Gram("output").name] = np.ones(2)
        measured = known(calibration, [Gram("output")])
        calibration.arrays[Gram("output").name] *= 2
        assert len({before, measured, known(calibration, [Gram("output")])}) == 3
        assert known(runs.calibrate(one.pipe, ["cat"], T, (), **one.call)) != before


def test_deleted_images_are_written_again_from_the_samples(process):
    folder = f"output_dir={process.folder / 'shared'}"
    with process.run(folder) as one:
        one.samples(METHOD, PROMPTS)
        (image,) = (one.folder / "images").iterdir()
        content = image.read_bytes()
        image.unlink()
        written = (one.folder / "samples/batch_0000.safetensors").stat().st_mtime_ns
        one.samples(METHOD, PROMPTS)
        assert image.read_bytes() == content
        assert (one.folder / "samples/batch_0000.safetensors").stat().st_mtime_ns == written


# --- batches that do not fit


class Memory:
    """In the place of the sampler: of a device on which so many samples fit, with `method` (None: with any)."""

    def __init__(self, fits: int, method=None):
        self.fits, self.method, self.tried = fits, method, []

    def __call__(self, pipe, method, prompts, seeds, **call) -> Batch:
        if self.method in (None, method):
            self.tried.append(len(prompts))
            if len(prompts) > self.fits:
                raise torch.OutOfMemoryError("made up")
        report = Report(computed={"cond": [0]}, computed_counts={"cond": [1]})
        return Batch(np.zeros((len(prompts), 4, 4, 3), np.uint8), torch.tensor(list(seeds)).float()[:, None], report)


@pytest.fixture
def memory(monkeypatch):
    memory = Memory(fits=1)
    monkeypatch.setattr(runs, "sample", memory)
    return memory


def fitted(process, name, recipe=METHOD, *overrides) -> runs.Run:
    """A job of the method of that name, with a reference, after it."""
    with process.run("batch_size=4", f"method.name={name}", *overrides) as one:
        prompts = PROMPTS * 4

        def make():
            one.reference(prompts, T)
            return one.samples(recipe, prompts)[0]

        made = one.fitting(make, recipe, name, len(prompts))
        assert made.latents[:, 0].tolist() == [one.config.seed + index for index in range(4)]
        return one


@pytest.mark.ci
def test_a_batch_that_does_not_fit_is_halved_once_for_all_jobs(process, memory, caplog):
    assert fitted(process, "taylorseer").batch_size == 1 and memory.tried == [4, 2] + 8 * [1]
    assert [record.getMessage() for record in caplog.records if record.name == "run"] == [
        "a batch of 4 does not fit into the memory of cpu: going on with batches of 2",
        "a batch of 2 does not fit into the memory of cpu: going on with batches of 1",
    ]
    for name in ("taylorseer", "fora"):
        memory.tried.clear()
        assert fitted(process, name).batch_size == 1 and memory.tried == 8 * [1]
    memory.tried.clear()
    assert fitted(process, "taylorseer", METHOD, "model.call.height=32").batch_size == 1 and memory.tried[0] == 4
    assert len(process.loads) == 1


def test_what_does_not_fit_with_a_method_is_not_made_smaller_for_another_one(process, memory):
    memory.fits, memory.method = 2, METHOD
    assert fitted(process, "taylorseer").batch_size == 2
    assert fitted(process, "fora", fora(3, T)).batch_size == 4
    assert fitted(process, "taylorseer", METHOD, "seed=1").batch_size == 2 and memory.tried.count(4) == 1


def test_a_smaller_batch_that_would_be_another_run_is_refused(process, memory, monkeypatch):
    online = teacache(3, T, threshold=0.1)
    for name, recipe in (("teacache", online), ("dbcache", dbcache(3, T, threshold=0.1))):
        with pytest.raises(SettingError, match=f"a batch of 4 .* method={name} may .* set batch_size=2"):
            fitted(process, name, recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match="the processes of a run share its batches: set batch_size=2"):
        fitted(process, "fora")
    monkeypatch.delenv("WORLD_SIZE")
    memory.fits = 0
    with pytest.raises(SettingError, match=r"a batch of 1 does not fit into the memory of cpu: try model\.offload"):
        fitted(process, "fora")


def test_batches_of_another_size_are_made_anew(tmp_path):
    def make(chunk):
        count = len(range(3)[chunk])
        return torch.full((count, 2, 2, 3), chunk.start, dtype=torch.uint8), torch.zeros(count, 1), []

    load_or_make(tmp_path, ["fox"] * 3, 1, make, "")
    samples, _ = load_or_make(tmp_path, ["fox"] * 3, 2, make, "")
    assert samples.images[:, 0, 0, 0].tolist() == [0, 0, 2]
    assert stored(tmp_path, ["fox"] * 3).images[:, 0, 0, 0].tolist() == [0, 0, 2]


# --- the order of jobs


def jobs(*overrides: str) -> list[str]:
    (batch,) = ModelByModel.split_arguments(OverridesParser.create().parse_overrides(list(overrides)), None)
    return [" ".join(job) for job in batch]


def test_jobs_come_model_by_model_wherever_the_model_stands():
    assert jobs("method=a,b", "seed=3", "model=x,y") == [
        f"model={model} method={method} seed=3" for model in "xy" for method in "ab"
    ]
    assert jobs("budget=1,2", "model.dtype=float32,bfloat16") == [
        f"model.dtype={dtype} budget={budget}" for dtype in ("float32", "bfloat16") for budget in (1, 2)
    ]
    assert jobs("models=1,2", "budget=3,4") == [
        "models=1 budget=3",
        "models=1 budget=4",
        "models=2 budget=3",
        "models=2 budget=4",
    ]
