"""`dry_run=true`: tells what a run would do and need, without loading the model's weights."""

from omegaconf import DictConfig, OmegaConf

from dpcache.calibration import Calibration
from dpcache.estimate import history_bytes
from dpcache.method import Method, PlansOverCosts, Recipe
from dpcache.models.architectures import Architecture, architecture
from dpcache.models.pretrained import float_type
from dpcache.predictors import Reuse
from dpcache.schedules import OnlineSchedule, Schedule
from dpcache.statistics import Folded


def describe(config: DictConfig, model: str, name: str, recipe: Recipe, prompts: int, calibrating: int) -> str:
    """The composed plan, its schedule and the memory it takes.

    Args:
        model, name: of the model and the method on the command line.
        prompts, calibrating: how many prompts are sampled, and calibrated with.

    Raises SettingError for a model whose architecture is not known, or that does not offer the method's site.
    """
    known, T, example = architecture(config.model.path), recipe.num_inference_steps, recipe.example
    call, dtype = _call(config), float_type("dtype", config.model.dtype)
    batch_size = _batch_size(config, prompts)
    transformer = known.build("meta", dtype)
    weights = known.count * sum(p.numel() * p.element_size() for p in transformer.parameters())
    count, branches = known.count * sum(p.numel() for p in transformer.parameters()), known.branches(call)
    memory = [f"transformer {_size(weights)}", _cache_memory(config, recipe, prompts, known, transformer)]
    if recipe.statistics is None:
        schedule = "the library's own" if example is None else _steps(example.schedule)
    elif isinstance(recipe, PlansOverCosts) and config.calibration.path:
        calibration = Calibration.load(config.calibration.path).check({"num_inference_steps": str(T)})
        schedule = _steps(recipe.build(None, calibration).schedule)
    else:
        source = f"{calibrating} prompts" if calibrating else f"calibration.path={config.calibration.path}"
        schedule = f"decided by calibration: {source}"
        features = [s.site for s in recipe.statistics if isinstance(s, Folded)] if calibrating else []
        if features:
            kept = [history_bytes(known, transformer, _keeping_one(site), call, batch_size) for site in features]
            memory.append(f"while calibrating {_size(T * max(kept))}")
    told = call | dict.fromkeys(config.model.images, "of each prompt")
    settings = ", ".join(f"{key} {value}" for key, value in told.items())
    return "\n".join(
        [
            f"{model}  {name}  {config.budget} of {config.num_inference_steps} steps (dry run, no weights)",
            f"  model                  {config.model.path}, {known.count} {type(transformer).__name__}",
            f"  parameters             {count:,} in {config.model.dtype}",
            f"  call                   {settings}",
            f"  samples                {prompts} in batches of {batch_size}, guidance branches: {len(branches)}",
            f"  schedule               {schedule}",
            f"  site, features kept    {_kept(example)}",
            f"  memory                 {', '.join(memory)}",
        ]
    )


def _steps(schedule: Schedule | OnlineSchedule) -> str:
    return "decided online" if isinstance(schedule, OnlineSchedule) else str(schedule.steps)


def _kept(example: Method | None) -> str:
    return "the library's own" if example is None else f"{example.site.name}, {example.predictor.history}"


def _keeping_one(site: str) -> Method:
    return Method(Schedule([0], 1), site, Reuse())


def announce(config: DictConfig, recipe: Recipe, prompts: int) -> str:
    """A line that tells, before the weights are loaded, the memory of the method's cache on the device; or why it is
    not known."""
    try:
        known = architecture(config.model.path)
        transformer = known.build("meta", float_type("dtype", config.model.dtype))
        return _cache_memory(config, recipe, prompts, known, transformer)
    except Exception as error:  # an estimate does not end a run
        return f"cache: not known in advance: {type(error).__name__}: {error}"


def _cache_memory(config: DictConfig, recipe: Recipe, prompts: int, known: Architecture, transformer) -> str:
    if recipe.example is None:
        return "cache: the library's own, not known in advance"
    call = _call(config)
    return f"cache {_size(history_bytes(known, transformer, recipe.example, call, _batch_size(config, prompts)))}"


def _call(config: DictConfig) -> dict:
    """Arguments of the pipeline; those that come with each prompt are None."""
    return dict.fromkeys(config.model.images) | OmegaConf.to_container(config.model.call)


def _batch_size(config: DictConfig, prompts: int) -> int:
    return min(config.batch_size or config.model.batch_size, max(prompts, 1))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"
