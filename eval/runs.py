"""The stages of a run, which `run.py` puts in order: calibration, reference, samples, measurements, pictures."""

import hashlib
import inspect
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import imageio.v3 as iio
import numpy as np
import torch
from accelerate import PartialState
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from baselines.full import full
from dpcache._diffusers import execution_device
from dpcache.calibration import Calibration, calibrate
from dpcache.circumstances import describe
from dpcache.denoisers import denoisers
from dpcache.errors import SettingError
from dpcache.method import PlansOverCosts, Recipe, Runnable
from dpcache.models.pretrained import default_device, folder_of
from dpcache.other_steps import carry
from dpcache.prompts import identity
from dpcache.quality import PSNR, Measure
from dpcache.sampler import Batch, class_of, sample
from dpcache.schedules import OnlineSchedule
from dpcache.statistics import Statistic
from eval import metrics, pictures, timing
from eval.console import phase, quiet_libraries
from eval.files import write_text
from eval.kept import PROCESS, Loaded, free_memory
from eval.metrics import Samples, Scorer, evaluate
from eval.processes import main_process, several_processes
from eval.prompts import SETS, read
from eval.schema import Group
from eval.statistics import summarise
from eval.store import check_prompts, load_or_make, locked

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger("run")

ROOT = Path(__file__).parents[1]

T = TypeVar("T")


def check(config: DictConfig) -> None:
    """Raises SettingError for settings that would only fail after the samples are made."""
    metrics.check(config.eval.metrics)
    for name in ("batch_size", "model.batch_size", "eval.timing.batch_size"):
        value = OmegaConf.select(config, name)
        if value is not None and value < 1:
            raise SettingError(f"{name}={value} must be at least 1")
        if value is not None and value > 1 and config.model.images:
            raise SettingError(f"{name}={value} must be 1: many pipelines that take an image take one in a call")
    if given := [name for name in config.model.images if name in config.model.call]:
        raise SettingError(f"model.call.{given[0]}: images stand in the prompt file, in its column {given[0]}")
    for name in ELSEWHERE.keys() & config.model.call.keys():
        raise SettingError(f"model.call.{name} is not given here: {ELSEWHERE[name]}")
    _check_device(config.model.device, config.dry_run)
    for name, count in (("seed", config.num_prompts), ("calibration.seed", config.calibration.num_prompts)):
        if not -(2**63) <= (seed := OmegaConf.select(config, name)) <= 2**64 - count:
            raise SettingError(f"{name}={seed} must be between -2**63 and 2**64 - {count}: prompt i takes seed + i")
    if missing := OmegaConf.missing_keys(config.model):
        raise SettingError(f"{', '.join(sorted(missing))} must be given")
    if not config.num_inference_steps < (config.reference.num_inference_steps or math.inf):
        raise SettingError(
            f"reference.num_inference_steps={config.reference.num_inference_steps} must be above "
            f"num_inference_steps={config.num_inference_steps}"
        )
    if config.eval.timing.repeats < 0:
        raise SettingError(f"eval.timing.repeats={config.eval.timing.repeats} must be at least 0")
    if config.quality is not None:
        measure(config).check(config.quality)
    elif config.quality_metric is not None:
        raise SettingError(f"quality_metric={config.quality_metric} is that of quality=, which is not given")


def _check_device(name: str, dry_run: bool | None) -> None:
    """Raises SettingError for a name that is no device and, but for dry runs, for a device that the machine lacks."""
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except RuntimeError:
        raise SettingError(f"model.device={name} is not auto, nor cpu, cuda, cuda:1, mps, ...") from None
    try:
        torch.empty(0, device="cpu" if dry_run else device)
    except Exception as error:  # of a type for each device and build of PyTorch
        line = f"model.device={name} cannot be used on this machine, where auto is {default_device()}"
        raise SettingError(line) from error


ELSEWHERE = {
    "prompt": "prompts=FILE has the prompts",
    "class_labels": "prompts=FILE has the classes",
    "num_inference_steps": "num_inference_steps=T is a setting of its own",
    "generator": "seed=N decides the noise",
    "output_type": "images and latents are always taken",
    "return_dict": "images and latents are always taken",
}
"""Arguments of a pipeline that are not in `model.call`, with what decides them."""


def check_pipeline(config: DictConfig, pipe: "DiffusionPipeline", prompts: list[str]) -> None:
    """Raises SettingError for an argument of the call or a setting of the scheduler that this pipeline does not have,
    and for a prompt that is no class of a pipeline which takes classes."""
    for setting, given, of in (
        ("model.call", config.model.call.keys(), pipe.__call__),
        ("model.scheduler", config.model.scheduler.keys() - {"name"}, type(pipe.scheduler).__init__),
    ):
        known = inspect.signature(of).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            continue
        if unknown := sorted(given - known.keys()):
            names = ", ".join(sorted(known.keys() - ELSEWHERE.keys() - {"self"}))
            owner = type(pipe if setting == "model.call" else pipe.scheduler).__name__
            raise SettingError(f"{setting}.{unknown[0]} is not one of those that {owner} takes: {names}")
    for prompt in prompts if hasattr(pipe, "labels") else ():
        class_of(pipe, prompt)


def warn_few_steps(config: DictConfig) -> None:
    """Warn that a cache can save little where a model takes few steps, as distilled ones do, with what it has gained on
    others at so few steps. The figures' command is in eval/README.md, "Few steps"."""
    if config.num_inference_steps < 10 and config.about.group is not Group.plain:
        log.warning(
            "num_inference_steps=%s: so short a run has few steps to save. On the embedded models, none of which is "
            "distilled, the best cache was at this PSNR to all steps, and method=fewer_steps at the second: tiny_flux "
            "64.0 and 50.2 dB (3 of 4 steps), 62.8 and 43.9 dB (4 of 8); tiny_dit 65.4 and 30.7, 34.3 and 30.9 dB "
            "(eval/README.md, Few steps)",
            config.num_inference_steps,
        )


def read_prompts(config: DictConfig, calibrating: bool) -> tuple[list[str], list[str]]:
    """Prompts to evaluate, the first of `prompts`, and, if `calibrating` without a file of calibration, to calibrate
    with: the last of `calibration.prompts` (default: of what `prompts` has beyond the evaluated ones).

    Raises SettingError if a file or set, or an image of a prompt cannot be read, or if there are too few prompts.
    """
    images, wanted, count = config.model.images, config.num_prompts, config.calibration.num_prompts
    if config.prompts:
        setting, path = "prompts", config.prompts
    elif config.model.prompts:
        setting, path = "model.prompts", ROOT / config.model.prompts
    elif config.dry_run:  # which prompts does not matter
        return [""] * wanted, [""] * (count if calibrating else 0)
    else:
        raise SettingError(f"prompts=FILE must be given: csv, tsv or jsonl, with columns prompt, {', '.join(images)}")

    def found(setting: str, source, number: int) -> list[str]:
        """Of a set in a dry run, which downloads nothing, as many as are asked for."""
        return [""] * number if config.dry_run and source in SETS else read(setting, source, images)

    prompts = found(setting, path, wanted + count)
    if not 1 <= wanted <= len(prompts):
        raise SettingError(f"num_prompts={wanted} must be between 1 and the {len(prompts)} prompts of {setting}={path}")
    if not calibrating or config.calibration.path:
        return _with_images(prompts[:wanted]), []
    own = config.calibration.prompts
    others = found("calibration.prompts", own, count) if own else prompts[wanted:]
    if not 1 <= count <= len(others):
        source = f"calibration.prompts={own}" if own else f"{setting}={path} beyond num_prompts={wanted}"
        raise SettingError(
            f"calibration.num_prompts={count} must be between 1 and the {len(others)} prompts of {source}"
        )
    return _with_images(prompts[:wanted]), _with_images(others[-count:])


def _with_images(prompts: list[str]) -> list[str]:
    """The prompts, now that all their images have been looked at."""
    identity(prompts)
    return prompts


def made_with(config: DictConfig, statistics: Sequence[Statistic], prompts: list[str]) -> str:
    """A digest of what a method is calibrated with: of the calibration prompts and their seeds, or of what it takes
    from the file of `calibration.path`, to which other runs may add. All this is known before the model is loaded."""
    c = config.calibration
    if c.path is None:
        return digest(identity(prompts), c.seed)
    given = Calibration.load(c.path)
    made_from = given.made_from | {"prompts": identity(given.made_from["prompts"])}
    names = [statistic.name for statistic in statistics if statistic.name in given.arrays]
    arrays = [hashlib.sha256(given.arrays[name].tobytes()).hexdigest() for name in names]
    return digest(given.made_for, [made_from[name] for name in ("prompts", "seeds", "batch_size")], names, arrays)


def digest(*parts) -> str:
    """16 hex digits of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


MADE_WITH = "made_with.json"
"""In a run's folder, digests of what its samples were made with: the calibration, the model's files, and `made_by` of
`Run`. Earlier versions left none, or that of the calibration alone."""


def check_samples(config: DictConfig, folder: Path, prompts: list[str], calibration: str | None = None) -> None:
    """Raises SettingError if a run's folder holds samples or a result of other prompts or images, or a result of a
    model whose weights or settings have changed since. The model is loaded to see this only if the sizes or times of
    its files have changed.

    Args:
        calibration: what `made_with` says of the run's calibration; samples of another one are refused, too.
    """
    check_prompts(folder / "samples", prompts, config.batch_size or config.model.batch_size)
    file = folder / "result.json"
    if file.exists() and json.loads(file.read_text()).get("per_prompt", {}).get("prompts", prompts) != prompts:
        raise SettingError(f"{file} was made from other prompts: its command with overwrite=true makes it again")
    _check_made_with(folder, "calibration", calibration, "another calibration, whose prompts or file have")
    if file.exists() and _record(folder).get("files") not in (None, digest(_files(config.model.path))):
        with pipeline(config) as loaded:
            Run(config, loaded, folder).check_model()


def _record(folder: Path) -> dict[str, str | None]:
    record = folder / MADE_WITH
    return json.loads(record.read_text()) if record.exists() else {}


def _check_made_with(folder: Path, what: str, now: str | None, changed: str) -> None:
    """Raises SettingError if a run's folder holds samples or a result, and `MADE_WITH` has another digest of `what`."""
    made = (folder / "result.json").exists() or any((folder / "samples").glob("batch_*.safetensors"))
    if made and _record(folder).get(what, now) != now:
        raise SettingError(
            f"{folder} was made with {changed} changed since: overwrite=true makes it again, another output_dir "
            "keeps it"
        )


def remove_made(folder: Path) -> None:
    """Remove what a run has made: first the result, so that one that stands is always that of the samples beside it."""
    (folder / "result.json").unlink(missing_ok=True)
    for name in ("samples", "images"):
        shutil.rmtree(folder / name, ignore_errors=True)


LOADING = ("path", "dtype", "device", "offload", "vae_dtype", "vae_tiling", "scheduler")


@contextmanager
def pipeline(config: DictConfig) -> Iterator[Loaded]:
    """The model's pipeline for one job, that of the job before if it was loaded with the same settings from the same
    files. Among processes of `accelerate launch`, devices auto and cuda are each one's own.

    A `SettingError` leaves the pipeline as it was, because sessions undo themselves. After any other error nobody can
    tell, so the next job loads anew.
    """
    model = OmegaConf.to_container(config.model)
    settings = {name: model[name] for name in LOADING}
    if model["device"] in ("auto", "cuda") and "LOCAL_RANK" in os.environ:
        settings["device"] = str(PartialState().device)

    def load() -> Loaded:
        quiet_libraries()
        free_memory()  # of the pipeline before, and of a job that failed
        return Loaded(get_method(model["loader"])(**settings))

    try:
        with phase("model loaded"):
            loaded = PROCESS.get("pipeline", [model["loader"], settings, _files(model["path"])], load)
            loaded.restore()
        yield loaded
    except SettingError:
        raise
    except BaseException:
        PROCESS.drop("pipeline")
        raise


def _files(model: str) -> list[tuple[str, int, int]]:
    """Name, bytes and time of the last change of a local model's files."""
    folder = folder_of(model)
    files = sorted(file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def load_metrics(config: DictConfig) -> dict[str, Scorer | Exception]:
    """The run's metrics with all that they need, before anything is sampled. Raises as `eval.metrics.load`."""
    return metrics.load(config.eval.metrics, _metric_settings(config), config.eval.require_all, PROCESS)


def _metric_settings(config: DictConfig) -> metrics.Settings:
    device = default_device() if config.model.device == "auto" else config.model.device
    cache = Path(config.output_dir) / "features"
    return metrics.Settings(**config.model.metrics, cache=cache, device=device, fps=config.model.fps)


def measure(config: DictConfig) -> Measure:
    """The measure of the quality that is searched for. Raises SettingError if it cannot be computed."""
    name = config.quality_metric
    if name is None:
        return PSNR
    if name not in metrics.METRICS or not metrics.METRICS[name].against_full:
        known = sorted(name for name, metric in metrics.METRICS.items() if metric.against_full)
        raise SettingError(f"quality_metric={name} is not one of {', '.join(known)}")
    scorer = metrics.load([name], _metric_settings(config), kept=PROCESS)[name]
    if isinstance(scorer, Exception):
        raise SettingError(f"quality_metric={name}: {scorer}") from scorer

    def score(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return scorer(*(Samples(part, None, [""] * len(part)) for part in (images, reference))).numpy()

    try:
        same = score(*2 * [np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)])
    except SettingError as error:
        raise SettingError(f"quality_metric={name} {error}, and a search has images alone") from None
    metric = metrics.METRICS[name]
    return Measure(metric.title, score, None if metric.unit == "dB" else round(same.item()))


def scores(
    scorers: dict[str, Scorer | Exception], samples: Samples, reference: Samples, fine: Samples | None = None
) -> dict:
    """Metrics with intervals, reasons for missing ones, and scores per prompt, as they stand in `result.json`.

    fine: samples of many more steps; metrics that compare with the full-step run are then had against these as well,
    under the names of `eval.metrics.fine_name`.
    """
    values, unavailable, details = evaluate(scorers, samples, reference)
    if fine is not None:
        paired = {name: scorer for name, scorer in scorers.items() if metrics.METRICS[name].against_full}
        for into, part in zip((values, unavailable, details), evaluate(paired, samples, fine)):
            into |= {metrics.fine_name(name): value for name, value in part.items()}
    return {
        "metrics": {name: summarise(scores) | details.get(name, {}) for name, scores in values.items()},
        "metrics_unavailable": unavailable,
        "per_prompt": {"prompts": samples.prompts}
        | {name: scores for name, scores in values.items() if len(scores) == len(samples.prompts)},
    }


def for_store(batch: Batch) -> tuple:
    """A batch as `eval.store.load_or_make` takes it."""
    spent = float(np.mean([generations[-1] for generations in batch.report.spent.values()]))
    return batch.images, batch.latents, {"steps": list(batch.report.computed.values()), "spent": spent}


class Run:
    """One run's settings, pipeline and folder.

    Attributes:
        circumstances: what a calibration has to have been made for.
        made_by: all that decides what a call makes: the circumstances, and the other models of the pipeline.
    """

    def __init__(self, config: DictConfig, loaded: Loaded, folder: Path):
        self.config, self.loaded, self.pipe, self.folder = config, loaded, loaded.pipe, folder
        self.shared = Path(config.output_dir)
        self.call = OmegaConf.to_container(config.model.call)
        self.batch_size = config.batch_size or config.model.batch_size
        self.device = execution_device(self.pipe)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.pipe.set_progress_bar_config(disable=True)  # inside the bar of the batches
        self.fine_steps: int | None = config.reference.num_inference_steps
        self.circumstances = describe(self.pipe, config.num_inference_steps, **self.call)
        vae = {"vae_dtype": config.model.vae_dtype or config.model.dtype, "vae_tiling": config.model.vae_tiling}
        self.made_by = self.circumstances | vae | {"models": loaded.fingerprints}

    def check_model(self) -> None:
        """Raises SettingError if the folder holds samples or a result that another model has made."""
        _check_made_with(self.folder, "made_by", digest(self.made_by), "a model or a scheduler that has")

    def begin(self, calibration: str | None) -> None:
        """Leaves in the folder what its samples are made with. `calibration`: see `made_with`."""
        made_with = {"calibration": calibration, "files": digest(_files(self.config.model.path))}
        write_text(self.folder / MADE_WITH, json.dumps(made_with | {"made_by": digest(self.made_by)}))

    def _sample(self, method: Runnable, prompts, chunk: slice) -> Batch:
        seeds = range(self.config.seed, self.config.seed + len(prompts))
        return sample(self.pipe, method, prompts[chunk], seeds[chunk], **self.call)

    def fitting(self, make: Callable[[], T], recipe: Recipe, name: str, prompts: int) -> T:
        """`make()`, again with half the batch for as long as the device's memory is too small. The run then is the one
        that this batch size makes. Later jobs of the same pipeline and call do not try again what did not fit into
        memory in the reference, and those of the same method what did not fit with it.

        Args:
            recipe, name: of the method.
            prompts: the most that are batched.

        Raises SettingError for a batch of one that does not fit, and where half the batch would be another run: methods
        that decide online do so once per batch, and processes that share a run have to agree on its batches.
        """
        method = digest(self.call, OmegaConf.to_container(self.config.method, resolve=True))
        too_large = self.loaded.too_large
        while True:
            size = min(self.batch_size, prompts)
            if all(size < too_large.get(of, math.inf) for of in (digest(self.call), method)):
                try:
                    return make()
                except torch.OutOfMemoryError:
                    too_large[method] = size
                free_memory()  # here, where no exception holds on to it
                self.loaded.restore()
            self.batch_size = self._half(size, recipe, name)
            shutil.rmtree(self.folder / "samples", ignore_errors=True)

    def _half(self, size: int, recipe: Recipe, name: str) -> int:
        said = f"a batch of {size} does not fit into the memory of {self.device}"
        if size == 1:
            raise SettingError(f"{said}: try model.offload=true, model.vae_tiling=true or a smaller model.call")
        if recipe.example is None or isinstance(recipe.example.schedule, OnlineSchedule):
            raise SettingError(
                f"{said}, and method={name} may decide once per batch, so that a smaller one would change its results: "
                f"set batch_size={size // 2}"
            )
        if several_processes():
            raise SettingError(f"{said}, and the processes of a run share its batches: set batch_size={size // 2}")
        log.warning("%s: going on with batches of %s", said, size // 2)
        return size // 2

    def calibration(self, statistics: Sequence[Statistic], prompts: list[str]) -> tuple[Calibration, Path]:
        """The one given by `calibration.path`, else one of this model, steps and prompts, to which the statistics that
        it does not hold yet are added; and its file.

        Raises SettingError for a given file that was made for something else or that lacks a statistic.
        """
        c = self.config
        if path := c.calibration.path:
            calibration = Calibration.load(path)
            if calibration.num_inference_steps != c.num_inference_steps and statistics:
                calibration = carry(self.pipe, calibration, c.num_inference_steps, statistics)
            calibration.check(self.circumstances)
            if missing := calibration.missing(statistics):
                names = ", ".join(statistic.name for statistic in missing)
                raise SettingError(f"calibration.path={path} does not hold {names}, which this method needs")
            return calibration, Path(path)
        name = digest(self.made_by, identity(prompts), c.calibration.seed, self.batch_size)
        path = self.shared / "calibrations" / f"{name}.safetensors"
        with locked(path):
            if path.exists():
                calibration = Calibration.load(path).check(self.circumstances)
                if not calibration.missing(statistics):
                    return calibration, path
            else:
                seeds = [c.calibration.seed + index for index in range(len(prompts))]
                settings = {"statistics": (), "seeds": seeds, "batch_size": self.batch_size}
                calibration = calibrate(self.pipe, prompts, c.num_inference_steps, **settings, **self.call)
            calibration.measure(self.pipe, statistics)
            calibration.save(path)
            return calibration, path

    def reference_folder(self, prompts: list[str], num_inference_steps: int) -> Path:
        """Where full-step samples of these prompts are kept."""
        made_by = self.made_by | {"num_inference_steps": str(num_inference_steps)}
        name = digest(made_by, identity(prompts), self.config.seed, self.batch_size)
        return self.shared / "references" / name

    def reference(self, prompts: list[str], num_inference_steps: int) -> Samples:
        """Samples with so many steps, all computed, shared by all runs of the same model, prompts, seed and batch
        size."""
        method, folder = full(num_inference_steps), self.reference_folder(prompts, num_inference_steps)

        def make(chunk: slice):
            return for_store(self._sample(method, prompts, chunk))

        def read() -> Samples:
            name = f"reference of {num_inference_steps} steps"
            return load_or_make(folder, prompts, self.batch_size, make, name)[0]

        kind = "fine reference" if num_inference_steps == self.fine_steps else "reference"
        try:
            return self.loaded.kept.get(kind, str(folder.absolute()), read)
        except torch.OutOfMemoryError:
            self.loaded.too_large[digest(self.call)] = min(self.batch_size, len(prompts))
            raise

    def samples(self, method: Runnable, prompts: list[str]) -> tuple[Samples, list[dict]]:
        """The method's samples and, for every batch, the computed "steps" of each guidance branch and how many full
        steps were "spent". The samples are also written as image files; files that were deleted are written again."""
        (self.folder / "images").mkdir(parents=True, exist_ok=True)

        def make(chunk: slice):
            batch = self._sample(method, prompts, chunk)
            for index, prompt, image in zip(range(chunk.start, chunk.stop), prompts[chunk], batch.images):
                self._write_image(self._image_file(index, prompt), image)
            return for_store(batch)

        samples, computed = load_or_make(self.folder / "samples", prompts, self.batch_size, make, "samples")
        if main_process():
            for index, (prompt, image) in enumerate(zip(prompts, samples.images)):
                if not (path := self._image_file(index, prompt)).exists():
                    self._write_image(path, image.numpy())
        return samples, computed

    def _image_file(self, index: int, prompt: str) -> Path:
        slug = "".join(letter if letter.isalnum() else "-" for letter in prompt.lower())[:60].strip("-")
        return self.folder / "images" / f"{index:04d}-{slug}.png"

    def _write_image(self, path: Path, image: np.ndarray) -> None:
        """A PNG file; of a video its strip of frames, beside an MP4 file."""
        if image.ndim == 4:
            options = {"fps": self.config.model.fps, "macro_block_size": 2, "quality": 8}
            iio.imwrite(path.with_suffix(".mp4"), image, **options)
        Image.fromarray(pictures.still(image)).save(path)

    def evaluate(
        self,
        method: Runnable,
        samples: Samples,
        reference: Samples,
        fine: Samples | None,
        computed: list[dict],
        scorers: dict[str, Scorer | Exception],
    ) -> dict:
        """Metrics with intervals, timing, memory, FLOPs and versions, as they stand in `result.json`."""
        memory = timing.memory(self.device)  # before the timing, which resets the peak
        with phase("timing") if self.config.eval.timing.repeats else nullcontext():
            seconds, peaks = self._time(method, samples.prompts)
        with phase("FLOPs"):
            flops, kept = self._flops(method, samples.prompts)
        memory |= peaks | {"history": kept or None}
        measured = {"timing": seconds, "memory": memory, "flops": flops}
        with phase("metrics"):
            scored = scores(scorers, samples, reference, fine)  # last: its networks take memory too
        weights = [min(self.batch_size, len(samples.prompts) - i * self.batch_size) for i in range(len(computed))]
        return {
            "computed_steps": float(np.average([batch["spent"] for batch in computed], weights=weights)),
            # Guidance branches nearly always share theirs.
            "schedules": [list(steps) for batch in computed for steps in dict.fromkeys(map(tuple, batch["steps"]))],
            "reference": self.reference_folder(samples.prompts, self.config.num_inference_steps).name,
            "fine_reference": fine and self.reference_folder(samples.prompts, self.fine_steps).name,
            "settled": dict(method.decided),
            **scored,
            **measured,
            "versions": timing.versions(self.device),
        }

    def _time(self, method: Runnable, prompts: list[str]) -> tuple[dict, dict]:
        """Seconds, and on CUDA the peak memory in bytes that full and cached runs allocate."""
        settings = self.config.eval.timing
        if settings.repeats == 0:
            return {}, {}
        chunk = slice(0, settings.batch_size or self.batch_size)
        reference = full(self.config.num_inference_steps)
        rounds = {reference: [], method: []}
        cuda = self.device.type == "cuda"

        def timed(which):
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            with timing.phases(self.pipe) as phases:
                report = self._sample(which, prompts, chunk).report
            inside = sum(report.seconds_computed.values()) + sum(report.seconds_predicted.values())
            counts = [count for counts in report.spent.values() for count in counts]
            peak = torch.cuda.max_memory_allocated(self.device) if cuda else None
            rounds[which].append((phases() | {"transformer": inside}, np.mean(counts), peak))

        result = timing.compare(
            lambda: timed(reference), lambda: timed(method), settings.repeats, warmup=1, device=self.device
        )
        seconds, peaks = {}, {}
        for name, which in {"full": reference, "cached": method}.items():
            measured = rounds[which][1:]
            seconds[name] = {p: float(np.median([phases[p] for phases, *_ in measured])) for p in measured[0][0]}
            peaks[f"peak_{name}"] = measured[-1][2]
        seen = {which: [(phases["transformer"], count) for phases, count, _ in rounds[which][1:]] for which in rounds}
        computed = float(np.mean([count for _, count in seen[method]]))
        times = ([inside for inside, _ in seen[which]] for which in (reference, method))
        result |= timing.efficiency(self.config.num_inference_steps, computed, *times) | {"phases": seconds}
        result |= timing.reliability(result)
        return result, peaks | {"peak_added": peaks["peak_cached"] - peaks["peak_full"]} if cuda else {}

    def _flops(self, method, prompts: list[str]) -> tuple[dict[str, float | None], int]:
        """FLOPs of one image and of one step (all guidance branches) without and with the cache, as counted; and the
        bytes that the cache keeps for a batch."""
        models, one, single = list(denoisers(self.pipe).values()), slice(0, 1), full(1)
        total, steps = self.loaded.kept.get(
            "FLOPs without a method",
            [self.call, prompts[one], self.config.seed],
            lambda: timing.flops(models, lambda: self._sample(single, prompts, one))[:2],
        )
        full_step = float(sum(steps))
        cached, calls, batch = timing.flops(models, lambda: self._sample(method, prompts, one))
        branches = list(batch.report.computed.values())  # which take turns in every step
        kinds = {True: [], False: []}
        for index, count in enumerate(calls):
            kinds[index // len(branches) in branches[index % len(branches)]].append(count)
        computed, skipped = (len(branches) * float(np.mean(kind)) if kind else None for kind in kinds.values())
        return {
            "full": total + (self.config.num_inference_steps - 1) * full_step,
            "cached": float(cached),
            "full_step": full_step,
            "computed_step": computed,
            "skipped_step": skipped,
        }, batch.report.history_bytes * min(self.batch_size, len(prompts))

    def pictures(
        self, recipe: Recipe, calibration: Calibration | None, samples: Samples, reference: Samples, result: dict
    ) -> dict[str, Path]:
        """The side-by-side grid, the schedule and, where there are any, the cost tensor and the curve of the search
        for a quality. Returns their paths."""
        T, name, steps = result["num_inference_steps"], result["method"], result["schedules"][0]
        rows = {
            f"full, {T} steps": reference.images.numpy(),
            f"{name}, {result['computed_steps']:g} of {T}": samples.images.numpy(),
        }
        made = {
            "grid": pictures.grid(self.folder / "grid.png", rows, samples.prompts),
            "schedule": pictures.timeline(
                self.folder / "schedule.png", steps, recipe.num_inference_steps, f"{name}: {len(steps)} computed steps"
            ),
        }
        if isinstance(recipe, PlansOverCosts):
            made["cost"] = pictures.cost_heatmap(self.folder / "cost.png", recipe.costs(calibration), steps)
        if curve := result["quality"]:
            made["quality"] = pictures.quality_curve(self.folder / "quality.png", **curve)
        return made

    def rows(self, samples: Samples, reference: Samples, result: dict) -> list[tuple]:
        """(prompt, reference image, image, main metric) of every sample."""
        scores = result["per_prompt"].get(metrics.MAIN, [float("nan")] * len(samples.prompts))
        stills = ([pictures.still(image) for image in made.images.numpy()] for made in (reference, samples))
        return list(zip(samples.prompts, *stills, scores))
