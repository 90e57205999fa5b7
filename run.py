"""Run one method at one budget and compare it with the full-step reference: `python run.py model=... method=...`."""

import json
import logging
import shutil
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf

from eval.schema import config_hash

log = logging.getLogger("run")


class RunError(CompactHydraException):
    """A mistake of the user's: Hydra prints its one line and exits with 1."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    try:
        run(config)
    except (ValueError, OSError, InstantiationException) as error:
        log.debug("", exc_info=True)
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        raise RunError(f"error: {' '.join(str(cause).split())}") from None


def run(config: DictConfig) -> dict:
    """Compose, prepare the method, sample, evaluate, report. Returns what `result.json` holds."""
    from hydra.utils import get_method, instantiate  # here: a wrong command is answered before torch is loaded

    from eval import experiment, tracking

    choices = HydraConfig.get().runtime.choices
    folder = Path(HydraConfig.get().runtime.output_dir)
    method = instantiate(config.method)
    experiment.check(config)
    prompts, calibration_prompts = experiment.read_prompts(config)
    with experiment.locked(folder / "run"):
        if (folder / "result.json").exists() and not config.overwrite:
            result = json.loads((folder / "result.json").read_text())
            print(experiment.summary(result, folder), "(finished earlier; overwrite=true runs it again)", sep="\n")
            return result
        if config.overwrite:
            shutil.rmtree(folder / "samples", ignore_errors=True)
        tracker = None
        if config.logger.name == "wandb":
            group = config.logger.group or choices.model
            settings = OmegaConf.to_container(config, resolve=True)
            tracker = tracking.start(config.logger.project, settings, folder.name, group, folder, config.logger.mode)

        scorers = experiment.load_metrics(config)
        load, model = get_method(config.model.loader), config.model
        trial = experiment.Experiment(config, load(model.path, model.dtype, model.device, model.offload), folder)
        calibration = trial.calibration(method, calibration_prompts) if method.needs_calibration else None
        method.prepare(trial.pipe, calibration)
        reference = trial.reference(prompts)
        samples, computed = trial.samples(method, prompts)
        result = {
            "model": choices.model,
            "method": choices.method,
            "budget": config.budget,
            "num_inference_steps": config.num_inference_steps,
            "seed": config.seed,
            "config_hash": config_hash(config),
            **trial.evaluate(method, samples, reference, computed, scorers),
        }
        pictures = trial.pictures(method, calibration, samples, reference, result)
        experiment.write_text(folder / "result.json", json.dumps(result, indent=1))
        tracking.log(tracker, result, pictures, trial.rows(samples, reference, result))
        tracking.finish(tracker)
        print(experiment.summary(result, folder))
        return result


if __name__ == "__main__":
    main()
