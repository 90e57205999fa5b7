"""Run one method at one budget and compare it with the full-step reference: `python run.py model=... method=...`.

`python run.py stage=eval dir=outputs eval=...` scores finished runs with further metrics. Processes that `accelerate
launch run.py ...` starts share the batches of a run; the main one does everything else.
"""

import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from eval import sweep
from eval.files import write_text
from eval.schema import Stage, config_hash, label

log = logging.getLogger("run")


class RunError(CompactHydraException):
    """A mistake of the user's: Hydra prints its one line and exits with 1."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    """Returns what a tuning sweep maximises, see `eval.sweep.objective`."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if config.stage is Stage.eval:
            score(config)
            return None
        if config.stage is Stage.calibrate:
            settle(config)
            return None
        result = run(config, folder)
        sweep.succeed(folder)
        return sweep.objective(result)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        known = isinstance(error, (ValueError, OSError, InstantiationException))
        line = f"error: {' '.join(str(cause).split())}"
        if config.stage is Stage.run:
            sweep.fail(folder, line if known else f"{type(cause).__name__} {line}")
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

    if not sweep.main_process():
        return
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError("stage=eval takes all runs of a folder in one command: dir=FOLDER, without -m")
    others = [override for override in HydraConfig.get().overrides.task if not override.startswith("model=")]
    rescore.rescore(config, lambda model: compose("config", [*others, f"model={model}"]))


def settle(config: DictConfig) -> None:
    """Calibrate and let the method settle what it needs; print that and leave it in a file."""
    from hydra.utils import instantiate

    from eval import experiment

    choices, method = HydraConfig.get().runtime.choices, instantiate(config.method)
    if not method.needs_calibration:
        raise ValueError(f"stage=calibrate: method={choices.method} has nothing to calibrate")
    experiment.check(config)
    _, prompts = experiment.read_prompts(config, True)
    trial = experiment.Experiment(config, experiment.load_pipeline(config), Path(config.output_dir))
    calibration, path = trial.calibration(method, prompts)
    method.prepare(trial.pipe, calibration)
    name = f"{choices.model}-{choices.method}-K{config.budget}-T{config.num_inference_steps}.json"
    steps = {} if method.schedule.steps is None else {"steps": method.schedule.steps}
    settled = steps | method.settled | {"made_from": str(path)}
    write_text(path.with_name(name), json.dumps(settled, indent=1))
    print(*(f"{key}: {json.dumps(value)}" for key, value in settled.items()), path.with_name(name), sep="\n")


def run(config: DictConfig, folder: Path) -> dict:
    """Compose, prepare the method, sample, evaluate, report. Returns what `result.json` holds."""
    from hydra.utils import instantiate  # here: a wrong command is answered before torch is loaded

    from eval import dry_run, experiment, tracking

    choices = HydraConfig.get().runtime.choices
    method = instantiate(config.method)
    name = label(config, choices.method, method.needs_calibration, HydraConfig.get().overrides.task)
    experiment.check(config)
    experiment.warn_few_steps(config)
    prompts, calibration_prompts = experiment.read_prompts(config, method.needs_calibration)
    main = sweep.main_process()
    if config.dry_run:
        plan = dry_run.describe(config, choices.model, choices.method, method, len(prompts), len(calibration_prompts))
        print(plan)
        return {}
    with experiment.locked(folder / "run") if main else nullcontext():
        if (folder / "result.json").exists() and not config.overwrite:
            result = json.loads((folder / "result.json").read_text())
            if main and result.get("label") != name:
                result["label"] = name
                write_text(folder / "result.json", json.dumps(result, indent=1))
            if main:
                print(experiment.summary(result, folder), "(finished earlier; overwrite=true runs it again)", sep="\n")
            return result
        if config.overwrite:
            if main:
                shutil.rmtree(folder / "samples", ignore_errors=True)
            experiment.wait_for_all()  # no process may take an old batch for a new one
        tracker = None
        if main and config.logger.name == "wandb":
            group = config.logger.group or sweep.group(HydraConfig.get()) or choices.model
            settings = OmegaConf.to_container(config, resolve=True)
            tracker = tracking.start(config.logger.project, settings, folder.name, group, folder, config.logger.mode)

        if main:
            print(f"{choices.model}  {choices.method}  {dry_run.announce(config, method, len(prompts))}")
        scorers = experiment.load_metrics(config) if main else {}
        pipe = experiment.load_pipeline(config)
        trial = experiment.Experiment(config, pipe, folder)
        calibration = trial.calibration(method, calibration_prompts)[0] if method.needs_calibration else None
        method.prepare(trial.pipe, calibration)
        reference = trial.reference(prompts)
        samples, computed = trial.samples(method, prompts)
        if not main:
            return {}
        result = {
            "model": choices.model,
            "method": choices.method,
            "label": name,
            "budget": config.budget,
            "num_inference_steps": config.num_inference_steps,
            "seed": config.seed,
            "config_hash": config_hash(config),
            "calibration_prompts": len(calibration.made_from["prompts"]) if calibration else 0,
            **trial.evaluate(method, samples, reference, computed, scorers),
        }
        pictures = trial.pictures(method, samples, reference, result)
        write_text(folder / "result.json", json.dumps(result, indent=1))
        tracking.log(
            tracker, result | {"objective": sweep.objective(result)}, pictures, trial.rows(samples, reference, result)
        )
        tracking.finish(tracker)
        print(experiment.summary(result, folder))
        return result


if __name__ == "__main__":
    main()
