"""`stage=eval`: scores finished runs again, from the samples and the reference that they have kept."""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from dpcache.errors import SettingError
from eval.console import summary
from eval.files import write_text
from eval.metrics import Scorer, check
from eval.results import plain_runs
from eval.runs import load_metrics, scores
from eval.store import check_prompts, locked, stored

log = logging.getLogger("run")


def rescore(config: DictConfig, compose: Callable[[str], DictConfig]) -> None:
    """Adds the metrics of `config.eval` to every `result.json` in and below `config.dir` and prints each run's table.
    Metrics that a run has already are kept, unless `config.overwrite`.

    Args:
        compose: from the name of a model, the command's configuration with this model, which says what metrics use.

    Raises:
        SettingError: there is nothing to score; a metric has wrong settings, or is unavailable and `eval.require_all`
            is set; some folders cannot be scored, which is raised after all others are, and each has been logged.
    """
    if config.dir is None:
        raise SettingError("stage=eval needs dir=FOLDER, a run folder or a folder of many")
    check(config.eval.metrics)
    folders = sorted(path.parent for path in Path(config.dir).expanduser().rglob("result.json"))
    if not folders:
        raise SettingError(f"dir={config.dir} holds no finished run: there is no result.json in it or below")
    names, failed = {}, {}  # by model, the metrics to load; by folder, why it cannot be scored
    for folder in folders:
        try:
            result = _result(folder)
            names.setdefault(result["model"], set()).update(_missing(result, config))
        except (OSError, ValueError) as error:
            failed[folder] = error
    scorers = {model: _load(compose, model, wanted) for model, wanted in names.items()}
    for folder in folders:
        if folder not in failed:
            try:
                _score(folder, scorers, config)
            except (OSError, ValueError) as error:
                failed[folder] = error
    for folder, error in failed.items():
        log.error("cannot be scored: %s: %s", folder, " ".join(str(error).split()))
    if failed:
        raise SettingError(f"{len(failed)} of {len(folders)} runs cannot be scored, for the reasons above")


def _result(folder: Path) -> dict:
    result = json.loads((folder / "result.json").read_text())
    needed = {"model", "method", "metrics", "per_prompt", "schedules", "timing"}
    lacking = needed - result.keys() if isinstance(result, dict) else needed
    if lacking:
        raise SettingError(f"result.json lacks {', '.join(sorted(lacking))}")
    if result.get("reference") is None:
        raise SettingError("result.json does not name its reference; overwrite=true with the run's command renews it")
    return result


def _missing(result: dict, config: DictConfig) -> list[str]:
    return [name for name in config.eval.metrics if config.overwrite or name not in result["metrics"]]


def _load(compose: Callable, model: str, names: Iterable[str]) -> dict[str, Scorer | Exception] | HydraException:
    try:
        config = compose(model)
    except HydraException as error:  # conf/ has no such model: runs of other models can still be scored
        return error
    wanted = [name for name in config.eval.metrics if name in names]
    return load_metrics(OmegaConf.merge(config, {"eval": {"metrics": wanted}}))


def _score(folder: Path, scorers: dict, config: DictConfig) -> None:
    with locked(folder / "run"):
        result = _result(folder)
        loaded = scorers[result["model"]]
        if isinstance(loaded, HydraException):
            raise SettingError(f"model={result['model']}: {loaded}")
        wanted = {name: loaded[name] for name in _missing(result, config) if name in loaded}
        check_fine(folder, config.reference.num_inference_steps)
        if wanted:
            prompts = result["per_prompt"]["prompts"]
            check_prompts(folder / "samples", prompts, result.get("batch_size") or len(prompts))
            samples, reference = stored(folder / "samples", prompts), _reference(folder, result["reference"])
            fine = result.get("fine_reference")
            fine = fine and stored(_reference(folder, fine), prompts)
            scored = scores(wanted, samples, stored(reference, prompts), fine)
            for part in ("metrics", "per_prompt"):
                result[part] |= scored[part]
            lost = result.get("metrics_unavailable", {}) | scored["metrics_unavailable"]
            result["metrics_unavailable"] = {name: lost[name] for name in lost if name not in result["metrics"]}
            write_text(folder / "result.json", json.dumps(result, indent=1))
    print(summary(result, folder, plain_runs(folder, result)))


def check_fine(folder: Path, steps: int | None) -> None:
    """Raises SettingError if a fine reference of so many steps is asked for, and the run has none or another one."""
    settings = folder / ".hydra" / "config.yaml"
    own = OmegaConf.select(OmegaConf.load(settings), "reference.num_inference_steps") if settings.exists() else None
    if steps not in (None, own):
        has = "no finer one" if own is None else f"one of {own}"
        raise SettingError(f"reference.num_inference_steps={steps}: this run has {has}, and scoring samples nothing")


def _reference(folder: Path, name: str) -> Path:
    """The shared reference of that name, below the `output_dir` that holds the run."""
    name = Path("references", Path(name).name)
    found = [parent / name for parent in folder.absolute().parents if (parent / name).is_dir()]
    if not found:
        raise FileNotFoundError(f"its reference {name} is in no folder above it")
    return found[0]
