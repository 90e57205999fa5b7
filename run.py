"""Run one method at one budget and compare it with the full-step reference: `python run.py model=... method=...`."""

import hashlib
import json
import logging
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf

import eval.schema  # noqa: F401  registers the configuration's types

log = logging.getLogger("run")


class RunError(CompactHydraException):
    """A mistake of the user's: Hydra prints its one line and exits with 1."""


def config_hash(config: DictConfig) -> str:
    """12 hex digits of everything that shapes the results; where they go and who is told does not count."""
    keys = [key for key in config if key not in ("hydra", "logger", "output_dir", "overwrite", "experiment")]
    content = OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def run_name(_root_: DictConfig) -> str:
    """Name of the run folder: the same command always gets the same one, so a killed run resumes."""
    choices, c = _root_.hydra.runtime.choices, _root_
    return f"{choices.model}-{choices.method}-K{c.budget}-T{c.num_inference_steps}-seed{c.seed}-{config_hash(_root_)}"


OmegaConf.register_new_resolver("run_name", run_name)


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
    prompts, calibration_prompts = experiment.read_prompts(config)
    with experiment.locked(folder / "run"):
        if (folder / "result.json").exists() and not config.overwrite:
            result = json.loads((folder / "result.json").read_text())
            print(experiment.summary(result, folder), "(finished earlier; overwrite=true runs it again)", sep="\n")
            return result
        tracker = None
        if config.logger.name == "wandb":
            group = config.logger.group or choices.model
            settings = OmegaConf.to_container(config, resolve=True)
            tracker = tracking.start(config.logger.project, settings, folder.name, group, folder, config.logger.mode)

        model = config.model
        pipe = get_method(model.loader)(model.path, model.dtype, model.device, model.offload)
        trial = experiment.Experiment(config, pipe, folder)
        calibration = trial.calibration(method, calibration_prompts) if method.needs_calibration else None
        method.prepare(pipe, calibration)
        reference = trial.reference(prompts)
        samples, computed = trial.samples(method, prompts)
        result = {
            "model": choices.model,
            "method": choices.method,
            "budget": config.budget,
            "num_inference_steps": config.num_inference_steps,
            "seed": config.seed,
            "config_hash": config_hash(config),
            **trial.evaluate(method, samples, reference, computed),
        }
        pictures = trial.pictures(method, calibration, samples, reference, result)
        experiment.write_text(folder / "result.json", json.dumps(result, indent=1))
        tracking.log(tracker, result, pictures, trial.rows(samples, reference, result))
        tracking.finish(tracker)
        print(experiment.summary(result, folder))
        return result


if __name__ == "__main__":
    main()
