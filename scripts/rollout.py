"""Runs a transformer with random weights in a sampling loop, with methods that need no calibration. This is enough to
measure speed and memory; the model's weights and its pipeline's encoders are not needed."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import dpcache
import eval.schema  # noqa: F401, registers the types of the settings
from baselines.dbcache import CALIBRATORS
from baselines.library import LibraryCache
from dpcache._diffusers import hook_on
from dpcache.lsq import FittedWeights
from dpcache.models.architectures import architecture
from dpcache.models.family import EXAMPLE_TIME
from dpcache.schedules import OnlineSchedule, Schedule
from dpcache.sites import transformer_blocks

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook

    from dpcache.session import Branch

CONF = Path(__file__).parents[1] / "conf"


def settings(*overrides: str) -> DictConfig:
    """The project's configuration with these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


class Rollout:
    """A transformer with random weights in an Euler loop of T steps with fixed inputs. It has what a session asks of a
    pipeline: `transformer` and `scheduler`.

    Args:
        name: of the model in `conf/model`.
        config, call: settings of the transformer's configuration and of the pipeline's call that differ from the
            model's, as "key=value key=value".
    """

    def __init__(
        self,
        name: str,
        steps: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        config: str = "",
        call: str = "",
    ):
        torch.manual_seed(0)
        model = settings(f"model={name}").model
        known, call = architecture(model.path), {**model.call, **_values(call)}
        known = replace(known, config={**known.config, **_values(config)})
        self.steps, self.device = steps, torch.device(device)
        self.transformer, self.branches = known.build(device, dtype), known.branches(call)
        self.conditions = known.inputs(call, 1, device, dtype)
        latents, timestep = self.conditions.pop("hidden_states"), self.conditions.pop("timestep")
        self.start, self.batch = latents[:1], len(latents)  # 2 where guidance is by the halves of a batch
        self.time_scale = timestep[0].item() / EXAMPLE_TIME
        self.scheduler, self.step = diffusers.FlowMatchEulerDiscreteScheduler(), 0

    @torch.inference_mode()
    def __call__(self, meter, steps: int | None = None, before: Callable[[int], None] | None = None) -> list:
        """Runs all steps, or the first `steps`. Returns what `meter` has counted inside the transformer in each step.

        Args:
            meter: a context manager, entered around every call of the transformer, with its count in `total`.
            before: called with each step's number before it.
        """
        self.scheduler.set_timesteps(self.steps, device=self.device)
        self.scheduler.set_begin_index(0)  # as pipelines do; else the scheduler waits for the GPU to find it
        sample, counts = self.start, []
        for step, timestep in enumerate(self.scheduler.timesteps[:steps]):
            self.step = step
            if before is not None:
                before(step)
            total = meter.total
            velocity = self._velocity(sample, timestep, meter)
            counts.append(meter.total - total)
            sample = self.scheduler.step(velocity, timestep, sample, return_dict=False)[0]
        return counts

    def _velocity(self, sample, timestep, meter):
        noisy, time_ = torch.cat([sample] * self.batch), timestep.expand(self.batch) * self.time_scale
        outputs = []
        for branch in self.branches:
            named = nullcontext() if branch == "default" else self.transformer.cache_context(branch)
            with meter, named:
                output = self.transformer(hidden_states=noisy, timestep=time_, return_dict=False, **self.conditions)[0]
            outputs += output
        outputs = [output[: sample.shape[1]] for output in outputs]  # without a learned variance
        conditional, unconditional = outputs[0], outputs[-1]
        return (unconditional + 4.0 * (conditional - unconditional))[None]


def _values(text: str) -> dict:
    return OmegaConf.to_container(OmegaConf.from_dotlist(text.split()))


def given(name: str, plan: list[int], steps: int, blocks: int) -> list[str]:
    """Settings with which a method needs no calibration. `plan`: the steps to compute, if the method can be told."""
    interval = max(round((steps - 2) / max(len(plan) - 2, 1)), 1)
    ratios = [2.0 if step in plan else 1.0 for step in range(steps)]  # an error above or below the threshold
    later = list(range(2 * blocks // 5, blocks))  # three fifths of the blocks, as one run
    special = {
        "dbcache": ["threshold=0"],
        "dbcache_taylorseer": ["threshold=0"],
        "dicache": ["threshold=0", "retention=0"],
        "diffusers_taylorseer": ["order=2"],
        "diffusers_taylorseer_lite": ["order=2"],
        "dpcache": [f"steps={plan}", "warmup=1"],
        "easycache": ["threshold=0", "warmup=2"],
        "first_block_cache": ["threshold=0"],
        "magcache": ["threshold=0.5", "retention=0", f"max_skip={steps}", f"ratios={ratios}"],
        "profilingdit": [f"interval={interval}", "warmup=2", f"blocks={later}"],
        "teacache": ["threshold=0", "polynomial=[1,0]"],
        "toca": [f"interval={interval}"],
    }
    return [f"method.{setting}" for setting in special.get(name, [])]


@contextmanager
def caching(rollout: Rollout, name: str, plan: list[int]) -> Iterator[Callable[[int], None] | None]:
    """The rollout's model cached by a method of `conf/method`. Yields what has to be called before each step, if
    anything. Whatever a library leaves behind on the model is undone."""
    model, steps, before = rollout.transformer, rollout.steps, None
    if name == "dpcache_lsq_output":
        sees_input = model.config.out_channels in (None, model.config.in_channels)
        weights = {step: (0.1, -0.3, 1.2, 0.05)[: 3 + sees_input] for step in range(steps)}  # any will do
        method = dpcache.Method(Schedule(plan, steps), "output", FittedWeights(3, weights, sees_input=sees_input))
    else:
        told = given(name, plan, steps, len(transformer_blocks(model)))
        config = settings(f"method={name}", f"budget={len(plan)}", f"num_inference_steps={steps}", *told)
        method = instantiate(config.method).build(None, None)
    if not isinstance(method, LibraryCache):
        if isinstance(method.schedule, OnlineSchedule):
            method = replace(method, schedule=Following(steps, method.schedule, tuple(plan)))
        with dpcache.cached(rollout, method):
            yield None
        return
    with untouched(model):
        if name.startswith("dbcache"):
            start_cache_dit(model, plan, steps, config.method.calibrator)
        else:
            method.start(rollout, model)
        if name == "first_block_cache":
            hook = hook_on(transformer_blocks(model)[0], "fbc_leader_block_hook")
            before = partial(follow, hook, plan)
        yield before
        if not name.startswith("dbcache"):
            method.stop(rollout, model)


def follow(hook: "ModelHook", plan: list[int], step: int) -> None:
    """Sets a threshold so that the step is computed or skipped as the plan says."""
    hook.threshold = -math.inf if step in plan else math.inf


@dataclass(frozen=True)
class Following(OnlineSchedule):
    """Computes everything that `schedule` computes for its decision, but decides as the plan says."""

    schedule: OnlineSchedule
    plan: tuple[int, ...]

    def start(self) -> object:
        return self.schedule.start()

    def decide(self, context: "Branch", block: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
        threshold = -math.inf if context.step in self.plan else math.inf
        return replace(self.schedule, threshold=threshold).decide(context, block, args, kwargs)

    def learn(self, context: "Branch", name: str | int, feature: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        self.schedule.learn(context, name, feature)

    def scale(self, context: "Branch", weights: tuple[float, ...]) -> tuple[float, ...]:
        return self.schedule.scale(context, weights)


def start_cache_dit(model: torch.nn.Module, plan: list[int], steps: int, calibrator: str | None) -> None:
    """Enables cache-dit on a transformer without a pipeline, which `baselines.dbcache` does not support, with the plan
    as cache-dit's mask."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,  # the fewest
        num_inference_steps=steps,
        steps_computation_mask=[int(step in plan) for step in range(steps)],
        steps_computation_policy="static",
    )
    kind = calibrator and getattr(cache_dit, CALIBRATORS[calibrator])
    cache_dit.enable_cache(model, cache_config=config, calibrator_config=kind and kind())


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """At its end all modules are as before, and in the same order: cache-dit replaces `forward` for good, and moves the
    blocks behind the output layers."""
    before = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, children in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
