"""Run one method at one budget and compare it with the full-step reference: `python run.py model=... method=...`.

`python run.py stage=eval dir=outputs eval=...` scores finished runs with further metrics. Processes that `accelerate
launch run.py ...` starts share the batches of a run; the main one does everything else.
"""

import json
import logging
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dpcache.errors import SettingError
from eval import failures, published, sweep
from eval.files import write_text
from eval.processes import main_process, wait_for_all
from eval.schema import Stage, config_hash, label

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dpcache.calibration import Calibration
    from dpcache.method import Recipe
    from eval.runs import Run

log = logging.getLogger("run")


class RunError(CompactHydraException):
    """A mistake of the user's: Hydra prints its one line and exits with 1."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    """Returns what a tuning sweep maximises, see `eval.results.objective`."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if not (sys.stderr.isatty() and main_process()):  # bars are for terminals; tqdm reads this when it is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        given = [override.lstrip("+") for override in HydraConfig.get().overrides.task]
        if config.quality is not None and any(override.startswith("budget=") for override in given):
            raise SettingError(f"budget={config.budget} and quality={config.quality}: give one of the two")
        if config.dry_run and config.stage is not Stage.run:
            raise SettingError(f"dry_run=true tells of stage=run alone, not of stage={config.stage.name}")
        if config.stage is Stage.eval:
            score(config)
            return None
        if config.stage is Stage.calibrate:
            calibrate(config, folder)
            return None
        result = run(config, folder)
        failures.clear(folder)

        from eval.results import objective

        return objective(result)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        known = isinstance(cause, (SettingError, OSError, ImportError))
        known |= isinstance(error, InstantiationException) and isinstance(cause, TypeError)  # an unknown argument
        line = f"error: {' '.join(str(cause).split())}"
        if config.stage is Stage.run:
            failures.record(folder, line if known else f"{type(cause).__name__} {line}")
        log.log(logging.DEBUG if known else logging.ERROR, "", exc_info=True)
        sweeping = HydraConfig.get().mode == RunMode.MULTIRUN and config.stage is Stage.run
        if sweeping:  # the other jobs go on, and the sweep ends with its failures
            log.error(line)
        elif known:
            raise RunError(line) from None
        else:
            raise


def score(config: DictConfig) -> None:
    """Score finished runs again, without a model."""
    from eval import rescore

    if not main_process():
        return
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise SettingError("stage=eval takes all runs of a folder in one command: dir=FOLDER, without -m")
    others = [override for override in HydraConfig.get().overrides.task if not override.startswith("model=")]
    rescore.rescore(config, lambda model: compose("config", [*others, f"model={model}"]))


def calibrate(config: DictConfig, folder: Path) -> None:
    """Calibrate and build the method, and leave it in a file, beside those of other budgets; print what was decided.
    Methods that were calibrated on something else, or have other settings, get another file: the names end with a
    digest."""
    from dpcache import storage
    from eval import runs
    from eval.store import locked

    choices, recipe = HydraConfig.get().runtime.choices, recipe_for(config)
    if recipe.statistics is None and config.quality is None:
        raise SettingError(f"stage=calibrate: method={choices.method} has nothing to calibrate")
    runs.check(config)
    _, prompts = runs.read_prompts(config, True)
    made_with = runs.made_with(config, recipe.statistics or (), prompts)
    with runs.pipeline(config) as loaded:
        runs.check_pipeline(config, loaded.pipe, prompts)
        one = runs.Run(config, loaded, folder)

        def make() -> tuple:
            calibration, path = one.calibration(recipe.statistics or (), prompts)
            return calibration, path, *build(config, one.pipe, recipe, calibration)

        calibration, path, method, budget, quality = one.fitting(make, recipe, choices.method, len(prompts))
    cost = {"statistics": calibration.took(recipe.statistics or ()), "method": calibration.reran}
    model, name, T = choices.model, choices.method, config.num_inference_steps
    settings = OmegaConf.to_container(OmegaConf.merge(config, {"budget": T}).method, resolve=True)
    key = runs.digest(path.stem, made_with, settings)
    file = path.with_name(f"{model}-{name}-T{T}-{key}.method.safetensors")
    with locked(file):
        storage.save({**(storage.load(file) if file.exists() else {}), budget: method}, file)
    found = dict(method.decided) | {"quality": quality} if quality else dict(method.decided)
    found |= {"calibration_trajectories": cost, "made_from": str(path), "method": str(file)}
    write_text(path.with_name(f"{model}-{name}-K{budget}-T{T}-{key}.json"), json.dumps(found, indent=1))
    print(*(f"{key}: {json.dumps(value)}" for key, value in found.items()), sep="\n")


def recipe_for(config: DictConfig, budget: int | None = None) -> "Recipe":
    """The `Recipe` of the method's file for a budget; for that of `config`, or with a quality for all steps."""
    from hydra.utils import instantiate  # here: a wrong command is answered before torch is loaded

    if budget is None:
        budget = config.budget if config.quality is None else config.num_inference_steps
    choices, settings = HydraConfig.get().runtime.choices, OmegaConf.merge(config, {"budget": budget}).method
    try:
        return instantiate(published.resolve(settings, choices.model, choices.method))
    except InstantiationException as error:
        raise error.__cause__ if isinstance(error.__cause__, SettingError) else error  # noqa: B904, its own cause


def build(config: DictConfig, pipe: "DiffusionPipeline", recipe: "Recipe", calibration: "Calibration | None") -> tuple:
    """The method, its budget and, if a quality was asked for instead, the curve of the search for it."""
    from dpcache.quality import find_budget
    from eval import runs

    if config.quality is None:
        return recipe.build(pipe, calibration), config.budget, None
    found = find_budget(pipe, partial(recipe_for, config), calibration, config.quality, runs.measure(config))
    print(*(f"  {line}" for line in found.lines()), sep="\n")
    curve = {"wanted": config.quality, "of": found.measure.label, "tried": found.tried, "predicted": found.predicted}
    return found.method, found.budget, curve


def run(config: DictConfig, folder: Path) -> dict:
    """Compose, build the method, sample, evaluate, report. Returns what `result.json` holds."""
    from hydra.utils import instantiate

    from eval import dry_run, runs
    from eval.console import phase, summary
    from eval.results import objective, plain_runs
    from eval.store import locked

    choices = HydraConfig.get().runtime.choices
    recipe = recipe_for(config)
    calibrates = recipe.statistics is not None or config.quality is not None
    name = label(config, choices.method, calibrates, HydraConfig.get().overrides.task)
    runs.check(config)
    runs.warn_few_steps(config)
    prompts, calibration_prompts = runs.read_prompts(config, calibrates)
    main = main_process()
    if config.dry_run and config.quality is not None:
        raise SettingError("dry_run=true takes a budget: which one a quality takes is only known after a search")
    if config.dry_run:
        plan = dry_run.describe(config, choices.model, choices.method, recipe, len(prompts), len(calibration_prompts))
        print(plan)
        return {}
    made_with = runs.made_with(config, recipe.statistics or (), calibration_prompts) if calibrates else None
    with locked(folder / "run") if main else nullcontext():
        if config.overwrite:
            if main:
                runs.remove_made(folder)
            wait_for_all()  # no process may take an old batch or result for a new one
        runs.check_samples(config, folder, prompts, made_with)
        if (folder / "result.json").exists():
            result = json.loads((folder / "result.json").read_text())
            if main and result.get("label") != name:
                result["label"] = name
                write_text(folder / "result.json", json.dumps(result, indent=1))
            if main:
                table = summary(result, folder, plain_runs(folder, result))
                print(table, "(finished earlier; overwrite=true runs it again)", sep="\n")
            return result
        logger = instantiate(config.logger)
        if main:
            group = sweep.group(HydraConfig.get()) or choices.model
            logger.start(OmegaConf.to_container(config, resolve=True), folder.name, group, folder)
            print(f"{choices.model}  {choices.method}  {dry_run.announce(config, recipe, len(prompts))}")
        with phase("metrics loaded"):
            scorers = runs.load_metrics(config) if main else {}
        with runs.pipeline(config) as loaded:
            runs.check_pipeline(config, loaded.pipe, [*prompts, *calibration_prompts])
            one = runs.Run(config, loaded, folder)
            one.check_model()
            if main:
                one.begin(made_with)
            most = max(len(prompts), len(calibration_prompts))
            make = partial(make_samples, config, one, recipe, prompts, calibration_prompts if calibrates else None)
            calibration, (method, budget, quality), references, (samples, computed) = one.fitting(
                make, recipe, choices.method, most
            )
            if not main:
                return {}
            result = {
                "model": choices.model,
                "method": choices.method,
                "label": name,
                "budget": budget,
                "quality": quality,
                "num_inference_steps": config.num_inference_steps,
                "seed": config.seed,
                "batch_size": one.batch_size,
                "config_hash": config_hash(config),
                "calibration_prompts": len(calibration.made_from["prompts"]) if calibration else 0,
                "calibration_trajectories": {
                    "statistics": calibration.took(recipe.statistics or ()) if calibration else 0.0,
                    "method": calibration.reran if calibration else 0.0,
                },
                **one.evaluate(method, samples, *references, computed, scorers),
                "ended": datetime.now(UTC).isoformat(),
            }
        with phase("pictures"):
            pictures = one.pictures(recipe, calibration, samples, references[0], result)
        write_text(folder / "result.json", json.dumps(result, indent=1))
        logger.log(result | {"objective": objective(result)}, pictures, one.rows(samples, references[0], result))
        logger.finish()
        print(summary(result, folder, plain_runs(folder, result)))
        return result


def make_samples(
    config: DictConfig, one: "Run", recipe: "Recipe", prompts: list[str], calibration_prompts: list[str] | None
) -> tuple:
    """Everything that a run samples, in one batch size: the calibration (None if `calibration_prompts` is None), what
    `build` returns, the full-step and the fine reference, and what `Run.samples` returns."""
    from eval.console import phase

    calibration = fine = None
    if calibration_prompts is not None:
        with phase("calibration"):
            calibration, _ = one.calibration(recipe.statistics or (), calibration_prompts)
    with phase("method built"):
        method, *found = build(config, one.pipe, recipe, calibration)
        # It was made for this very pipeline, so that no batch, a timed one least of all, need compare them again.
        built = replace(method, made_for={}), *found
    with phase("full-step reference"):
        reference = one.reference(prompts, config.num_inference_steps)
    if one.fine_steps:
        with phase("fine reference"):
            fine = one.reference(prompts, one.fine_steps)
    with phase("samples"):
        return calibration, built, (reference, fine), one.samples(built[0], prompts)


if __name__ == "__main__":
    main()
