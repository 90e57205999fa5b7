"""`+dry_run=true`: what a run would do and need, said without loading the model's weights."""

from omegaconf import DictConfig, OmegaConf

from dpcache.calibration import Calibration
from dpcache.estimate import history_bytes
from dpcache.method import Method
from dpcache.models.architectures import architecture
from dpcache.models.pretrained import float_type
from dpcache.predictors import Reuse
from dpcache.schedules import Schedule


def describe(config: DictConfig, model: str, name: str, method: Method, prompts: int, calibrating: int) -> str:
    """The composed plan, its schedule and the memory it takes.

    Args:
        model, name: of the model and the method on the command line.
        prompts, calibrating: how many prompts are sampled, and calibrated with.

    Raises ValueError for a model whose architecture is not known, or that does not offer the method's site.
    """
    known, T = architecture(config.model.path), method.num_inference_steps
    call, dtype = OmegaConf.to_container(config.model.call), float_type("dtype", config.model.dtype)
    batch_size = _batch_size(config, prompts)
    transformer = known.build("meta", dtype)
    weights = known.count * sum(p.numel() * p.element_size() for p in transformer.parameters())
    count, branches = known.count * sum(p.numel() for p in transformer.parameters()), known.family.branches(call)
    memory = [f"transformer {_size(weights)}", _cache_memory(config, method, prompts, known, transformer)]
    schedule = method.schedule.steps
    if method.needs_calibration and config.calibration.path and type(method) is Method:
        calibration = Calibration.load(config.calibration.path)
        method.prepare(None, calibration.check({"num_inference_steps": str(T)}))
        schedule = method.schedule.steps
    elif method.needs_calibration:
        source = f"{calibrating} full-step runs" if calibrating else f"calibration.path={config.calibration.path}"
        schedule = f"settled by calibration: {source}"
        if calibrating:
            site = method.calibration_options.get("site", "stack")
            feature = history_bytes(known, transformer, Method(Schedule([0], 1), site, Reuse()), call, batch_size)
            memory.append(f"while calibrating {_size(T * feature)}")
    settings = ", ".join(f"{key} {value}" for key, value in call.items())
    return "\n".join(
        [
            f"{model}  {name}  {config.budget} of {config.num_inference_steps} steps (dry run, no weights)",
            f"  model                  {config.model.path}, {known.count} {type(transformer).__name__}",
            f"  parameters             {count:,} in {config.model.dtype}",
            f"  call                   {settings}",
            f"  samples                {prompts} in batches of {batch_size}, guidance branches: {', '.join(branches)}",
            f"  schedule               {schedule}",
            f"  site, features kept    {method.site.name}, {method.history or 'not known'}",
            f"  memory                 {', '.join(memory)}",
        ]
    )


def announce(config: DictConfig, method: Method, prompts: int) -> str:
    """What the method will keep on the device, said before the weights are loaded; or why that is not known."""
    try:
        known = architecture(config.model.path)
        transformer = known.build("meta", float_type("dtype", config.model.dtype))
        return _cache_memory(config, method, prompts, known, transformer)
    except Exception as error:  # an estimate does not end a run
        return f"cache: not known in advance: {type(error).__name__}: {error}"


def _cache_memory(config, method, prompts, known, transformer) -> str:
    if method.history is None:
        return "cache: the library's own, not known in advance"
    call = OmegaConf.to_container(config.model.call)
    return f"cache {_size(history_bytes(known, transformer, method, call, _batch_size(config, prompts)))}"


def _batch_size(config: DictConfig, prompts: int) -> int:
    return min(config.batch_size or config.model.batch_size, max(prompts, 1))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"
