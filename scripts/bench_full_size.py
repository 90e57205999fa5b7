"""What caching costs and saves on the real transformer configurations, beside the caches of diffusers and cache-dit.

    python scripts/bench_full_size.py --model flux                  # the real size on CUDA, a small one on the CPU
    python scripts/bench_full_size.py --model wan21 --budgets 9 13 --methods dpcache diffusers_first_block

The weights are random, because latency does not depend on their values; nor does it depend on which steps are computed,
so every method computes the same number K of the T steps, driven by its own knobs. Where these are thresholds on
measured changes, the measuring stays and the threshold is set for each step. cache-dit is told its steps, which spares
it the measuring. A method that does not work on a model leaves its reason in the table.

Each rollout of a method comes right after a few uncached steps, which it is compared with: the machine's drift cancels.
"""

import argparse
import gc
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import diffusers
import torch
from diffusers import (
    DiTTransformer2DModel,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    WanTransformer3DModel,
)
from diffusers.models.cache_utils import CacheMixin
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import dpcache
from baselines.dicache import dicache
from baselines.easycache import easycache
from baselines.fora import fora
from baselines.profilingdit import ProfilingDiT
from baselines.taylorseer import taylorseer
from baselines.teacache import teacache
from baselines.toca import toca
from baselines.uniform_skip import uniform_skip
from dpcache.lsq import FittedWeights
from dpcache.method import dpcache as dpcache_method
from dpcache.models.architectures import PUBLISHED
from dpcache.models.pretrained import default_device
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.sites import transformer_blocks

REFERENCE_STEPS = 5  # uncached, before every rollout


# --- Models: class, (configuration, latents of one sample, text tokens) for each scale, conditions, guidance


def flux_conditions(config, latents: tuple[int, ...], text: int) -> dict:
    rows = math.isqrt(latents[0])
    return {
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(rows * 1.0), torch.arange(latents[0] / rows)),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((1,), 3.5),
    }


def dit_conditions(config, latents: tuple[int, ...], text: int) -> dict:
    return {"class_labels": torch.tensor([1, config.num_embeds_ada_norm])}  # the last one is "no class"


def hunyuan_video_conditions(config, latents: tuple[int, ...], text: int) -> dict:
    return {
        "encoder_hidden_states": torch.randn(1, text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.bool),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "guidance": torch.full((1,), 6000.0),
    }


def wan_conditions(config, latents: tuple[int, ...], text: int) -> dict:
    return {"encoder_hidden_states": torch.randn(1, text, config.text_dim)}


@dataclass(frozen=True)
class Family:
    """A model. Guidance is embedded, or by the two halves of a batch (`batch=2`), or by two calls (two `branches`)."""

    transformer: type
    conditions: Callable
    sizes: dict[str, tuple[dict, tuple[int, ...], int]]
    branches: tuple[str, ...] = ("cond",)
    batch: int = 1
    time_scale: int = 1  # timesteps are divided by it


# diffusers' caches ask for CacheMixin, which DiT has not. Nothing else keeps them from working on it.
DiT = type(
    DiTTransformer2DModel.__name__,
    (DiTTransformer2DModel, CacheMixin),
    {"__module__": DiTTransformer2DModel.__module__},
)


def published(path: str) -> dict:
    return {name: value for name, value in PUBLISHED[path].items() if name != "_class_name"}


def heads(number: int, size: int, **others) -> dict:
    return {"num_attention_heads": number, "attention_head_dim": size, **others}


_FLUX_TINY = {"joint_attention_dim": 16, "pooled_projection_dim": 16, "in_channels": 8, "axes_dims_rope": (4, 6, 6)}
_HUNYUAN_SMALL = {"num_refiner_layers": 2, "text_embed_dim": 1024}
_HUNYUAN_TINY = {"num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6)}
FAMILIES = {
    "flux": Family(  # FLUX.1-dev, 1024 x 1024
        FluxTransformer2DModel,
        flux_conditions,
        {
            "full": (published("black-forest-labs/FLUX.1-dev"), (4096, 64), 512),
            "small": (heads(4, 128, num_layers=6, num_single_layers=12, guidance_embeds=True), (144, 64), 48),
            "tiny": (heads(2, 16, num_layers=2, num_single_layers=3, guidance_embeds=True, **_FLUX_TINY), (9, 8), 3),
        },
        time_scale=1000,
    ),
    "dit": Family(  # DiT-XL/2-256
        DiT,
        dit_conditions,
        {
            "full": (published("facebook/DiT-XL-2-256"), (4, 32, 32), 0),
            "small": (heads(12, 64, num_layers=12, in_channels=4, out_channels=8, sample_size=16), (4, 16, 16), 0),
            "tiny": (heads(2, 16, num_layers=3, in_channels=4, out_channels=8, sample_size=6), (4, 6, 6), 0),
        },
        batch=2,
    ),
    "hunyuan_video": Family(  # HunyuanVideo, 848 x 480, 33 frames
        HunyuanVideoTransformer3DModel,
        hunyuan_video_conditions,
        {
            "full": (published("hunyuanvideo-community/HunyuanVideo"), (16, 9, 60, 106), 256),
            "small": (heads(4, 128, num_layers=6, num_single_layers=12, **_HUNYUAN_SMALL), (16, 3, 16, 12), 48),
            "tiny": (heads(2, 16, num_layers=2, num_single_layers=2, **_HUNYUAN_TINY), (16, 1, 6, 6), 3),
        },
    ),
    "wan21": Family(  # Wan2.1-T2V-14B, 832 x 480, 33 frames
        WanTransformer3DModel,
        wan_conditions,
        {
            "full": (published("Wan-AI/Wan2.1-T2V-14B-Diffusers"), (16, 9, 60, 104), 512),
            "small": (heads(6, 128, num_layers=12, ffn_dim=3072), (16, 2, 16, 12), 48),
            "tiny": (heads(2, 16, num_layers=3, ffn_dim=32, text_dim=16, freq_dim=16), (16, 1, 6, 6), 3),
        },
        branches=("cond", "uncond"),
    ),
}


def random_weights(transformer: type, config: dict, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Made on the device itself, because the full sizes in float32 on the CPU would take long and much memory."""
    with torch.device("meta"):
        model = transformer(**config).to(dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(part in name for part in model._keep_in_fp32_modules or ()):  # as `from_pretrained` does
            tensor.data = tensor.data.float()
    model.to_empty(device=device)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
    return model.eval()


class Rollout:
    """A transformer in an Euler loop of T steps with fixed inputs."""

    def __init__(self, name: str, scale: str, steps: int, device: str, dtype: torch.dtype, clock=time.perf_counter):
        torch.manual_seed(0)
        self.clock = clock
        self.family, self.steps, self.device = FAMILIES[name], steps, torch.device(device)
        config, latents, text = self.family.sizes[scale]
        self.model = random_weights(self.family.transformer, config, device, dtype)
        self.start = torch.randn(1, *latents).to(device, dtype)
        self.conditions = {
            branch: {
                name: value.to(device, dtype if value.is_floating_point() else None)
                for name, value in self.family.conditions(self.model.config, latents, text).items()
            }
            for branch in self.family.branches
        }
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.spent, self.wait, self.around = 0.0, True, nullcontext

    @torch.inference_mode()
    def __call__(self, steps=None, drive=None, around=None, wait=True) -> tuple[list[float], float]:
        """Seconds inside the transformer for each step, and of the whole loop.

        Args:
            steps: stop after so many.
            drive: called with each step's number before it.
            around: from a step's number, the context in which the transformer is called.
            wait: let the device finish before and after every step; without, only the loop's seconds mean anything.
        """
        self.scheduler.set_timesteps(self.steps, device=self.device)
        self.scheduler.set_begin_index(0)  # as pipelines do; it would search for it, and wait for the device
        sample, seconds, self.wait = self.start, [], True
        began = self._now()
        self.wait = wait
        for step, timestep in enumerate(self.scheduler.timesteps[:steps]):
            if drive is not None:
                drive(step)
            self.spent, self.around = 0.0, nullcontext if around is None else partial(around, step)
            velocity = self._velocity(sample, timestep)
            seconds.append(self.spent)
            sample = self.scheduler.step(velocity, timestep, sample, return_dict=False)[0]
        self.wait = True
        return seconds, self._now() - began

    def _velocity(self, sample, timestep):
        noisy = torch.cat([sample] * self.family.batch)
        time_ = timestep.expand(len(noisy)) / self.family.time_scale
        output = torch.cat([self._call(branch, noisy, time_) for branch in self.family.branches])
        output = output[:, : sample.shape[1]]  # without a learned variance
        if len(output) == 1:
            return output
        conditional, unconditional = output.chunk(2)
        return unconditional + 4.0 * (conditional - unconditional)

    def _call(self, branch, noisy, time_):
        began = self._now()
        with self.around(), self.model.cache_context(branch):
            output = self.model(hidden_states=noisy, timestep=time_, return_dict=False, **self.conditions[branch])[0]
        self.spent += self._now() - began
        return output

    def _now(self) -> float:
        if self.wait and self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


# --- Methods: name -> (model, plan, T) -> a context in which the model is cached. What it yields is called before every
# step with its number, if anything. `plan`: the K steps to compute, where a method can be told.


def own(make):
    @contextmanager
    def attached(model, plan, steps):
        with dpcache.cached(model, make(model, plan, steps)):
            yield

    return attached


def lsq_output(model, plan, steps):
    """Any weights: of three keys and the current latents, where these are of the prediction's shape."""
    sees_input = model.config.out_channels in (None, model.config.in_channels)
    weights = {step: (0.1, -0.3, 1.2, 0.05)[: 3 + sees_input] for step in range(steps)}
    return dpcache.Method(Schedule(plan, steps), "output", FittedWeights(3, weights, sees_input=sees_input))


def driven(make):
    """An online schedule is told by its threshold, but for the last step, which it computes whatever that is."""

    @contextmanager
    def attached(model, plan, steps):
        method, plan = make(len(plan), steps), {*plan[:-1], steps - 1}

        def drive(step):
            method.schedule.threshold = -math.inf if step in plan else math.inf

        with dpcache.cached(model, method):
            yield drive

    return attached


def toca_of(model, plan, steps):
    method = toca(len(plan), steps, interval=steps)
    method.schedule.spread(len(plan))
    return method


def profilingdit_of(model, plan, steps):
    """The later three fifths of the blocks, as one run."""
    count = len(transformer_blocks(model))
    method = ProfilingDiT(len(plan), steps, blocks=range(2 * count // 5, count), interval=steps)
    method.schedule = Schedule(plan, steps)
    return method


def diffusers_taylorseer(lite: bool):
    @contextmanager
    def attached(model, plan, steps):
        if lite and not hasattr(model, "proj_out"):
            raise ValueError("lite mode predicts proj_out, which this model has not")
        settings = (
            (warmup, interval)
            for warmup in (3, 2, 4, 1, *range(5, steps))
            for interval in range(2, steps)
            if sum(s < warmup or (s - warmup - 1) % interval == 0 for s in range(steps)) == len(plan)
        )
        warmup, interval = next(settings)
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=warmup,
            max_order=2,
            taylor_factors_dtype=model.dtype,
            use_lite_mode=lite,
            # The modules of the default patterns, and attn1 and attn2, which these miss.
            cache_identifiers=None if lite else [r"(single_)?(transformer_)?blocks\.\d+\.attn\d?"],
        )
        model.enable_cache(config)
        yield

    return attached


@contextmanager
def diffusers_first_block(model, plan, steps):
    model.enable_cache(FirstBlockCacheConfig())
    hook = transformer_blocks(model)[0]._diffusers_hook.get_hook("fbc_leader_block_hook")

    def drive(step):
        hook.threshold = -1.0 if step in plan else math.inf

    yield drive


@contextmanager
def diffusers_magcache(model, plan, steps):
    """Its ratios are the model's, so any may be given."""
    ratios = torch.tensor([2.0 if step in plan else 1.0 for step in range(steps)])
    model.enable_cache(
        MagCacheConfig(
            threshold=0.5, max_skip_steps=steps, retention_ratio=0.0, num_inference_steps=steps, mag_ratios=ratios
        )
    )
    yield


def cache_dit_dbcache(order: int | None):
    @contextmanager
    def attached(model, plan, steps):
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        try:
            import cache_dit
        except ImportError as error:
            raise ImportError(f"{error}: pip install -e '.[peers]'") from None
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,  # the fewest
            Bn_compute_blocks=0,
            num_inference_steps=steps,
            steps_computation_mask=[int(step in plan) for step in range(steps)],
            steps_computation_policy="static",
        )
        calibrator = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
        cache_dit.enable_cache(model, cache_config=config, calibrator_config=calibrator)
        try:
            yield
        finally:
            cache_dit.disable_cache(model)

    return attached


METHODS = {
    "dpcache": own(lambda model, plan, steps: dpcache_method(len(plan), steps, steps=plan)),
    "dpcache_lsq_output": own(lsq_output),
    "taylorseer": own(lambda model, plan, steps: taylorseer(len(plan), steps)),
    "fora": own(lambda model, plan, steps: fora(len(plan), steps)),
    "teacache": driven(lambda budget, steps: teacache(budget, steps, threshold=0.0, polynomial="flux")),
    "dicache": driven(lambda budget, steps: dicache(budget, steps, threshold=0.0, retention=0.0)),
    "easycache": driven(lambda budget, steps: easycache(budget, steps, threshold=0.0, warmup=2)),
    "toca": own(toca_of),
    "profilingdit": own(profilingdit_of),
    "uniform_skip": own(lambda model, plan, steps: uniform_skip(len(plan), steps)),
    "diffusers_taylorseer": diffusers_taylorseer(lite=False),
    "diffusers_taylorseer_lite": diffusers_taylorseer(lite=True),
    "diffusers_first_block": diffusers_first_block,
    "diffusers_magcache": diffusers_magcache,
    "cache_dit_dbcache": cache_dit_dbcache(None),
    "cache_dit_dbcache_taylorseer": cache_dit_dbcache(2),
}


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Whatever a peer leaves behind is undone, the order of the submodules included: cache-dit patches forwards for
    good, and moves the blocks behind the output layers."""
    before = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, children in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)


# --- Measurements


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def held_bytes() -> int:
    """Memory of all tensors that are alive, but for those that are frozen."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass
class Row:
    """What was measured of one method at one budget; `failure` where it does not work."""

    name: str
    budget: int
    computed: list[int] = field(default_factory=list)
    operations: list[int] = field(default_factory=list)  # dispatched at every step
    memory: int = 0  # bytes
    kernels: int | None = None  # of a skipped step, and its synchronisations
    syncs: int | None = None
    full: list[float] = field(default_factory=list)  # a median per round, seconds
    own: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)  # speed-ups
    failure: str = ""

    def median_of(self, seconds: list[float], computed: bool) -> float:
        return statistics.median(s for step, s in enumerate(seconds) if (step in self.computed) == computed)

    @property
    def skipped_steps(self) -> list[int]:
        return [step for step in range(len(self.operations)) if step not in self.computed]

    def full_step_equivalents(self) -> list[float]:
        k, skipped = len(self.computed), len(self.skipped_steps)
        return [(k * own + skipped * skip) / full for full, own, skip in zip(self.full, self.own, self.skipped)]


def peak_bytes(rollout: Rollout, run) -> int:
    """Most memory in use during `run`; without CUDA, what is held after it."""
    if rollout.device.type != "cuda":
        run()
        return held_bytes()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def probe(rollout: Rollout, attach, plan: list[int], row: Row, uncached_peak: int) -> None:
    """Which steps are computed, operations, memory; kernels and synchronisations on CUDA. Also the warm-up."""
    last_block = transformer_blocks(rollout.model)[-1]
    attention = next(module for name, module in last_block.named_modules() if name.endswith("to_q"))
    row.operations, step_now, computed = [0] * rollout.steps, 0, set()

    @contextmanager
    def counting(step):
        nonlocal step_now
        step_now = step
        with Operations() as operations:
            yield
        row.operations[step] += operations.count

    @contextmanager
    def on_the_device(step):
        first, *_, last = row.skipped_steps
        if step == first:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                yield
                torch.cuda.synchronize()
            row.kernels = (row.kernels or 0) + sum(
                event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()
            )
        elif step == last:
            with warnings.catch_warnings(record=True, action="always") as caught:
                torch.cuda.set_sync_debug_mode("warn")
                yield
                torch.cuda.set_sync_debug_mode("default")
            row.syncs = (row.syncs or 0) + sum("synchroniz" in str(warning.message) for warning in caught)
        else:
            yield

    with attach(rollout.model, plan, rollout.steps) as drive:
        handle = attention.register_forward_hook(lambda *_: computed.add(step_now))
        row.memory = peak_bytes(rollout, lambda: rollout(drive=drive, around=counting)) - uncached_peak
        handle.remove()
        row.computed = sorted(computed)
        if rollout.device.type == "cuda" and len(row.skipped_steps) > 1:
            rollout(drive=drive, around=on_the_device, wait=False)


def time_once(rollout: Rollout, attach, plan: list[int], row: Row) -> None:
    reference, reference_loop = rollout(steps=REFERENCE_STEPS)
    if rollout.device.type == "cuda":  # how the loop runs when nobody waits for single steps
        reference_loop = rollout(steps=REFERENCE_STEPS, wait=False)[1]
    with attach(rollout.model, plan, rollout.steps) as drive:
        seconds, loop = rollout(drive=drive)
    if rollout.device.type == "cuda":
        with attach(rollout.model, plan, rollout.steps) as drive:
            loop = rollout(drive=drive, wait=False)[1]
    row.full.append(statistics.median(reference))
    row.own.append(row.median_of(seconds, True))
    row.skipped.append(row.median_of(seconds, False))
    row.loop.append(reference_loop / len(reference) * rollout.steps / loop)


def benchmark(rollout: Rollout, methods: list[str], budgets: list[int], repeats: int, compiled=False) -> list[Row]:
    """The row of every method at every budget, "full" first; rounds in which all take turns."""
    full = Row("full", rollout.steps, computed=list(range(rollout.steps)), operations=[0])
    rollout(steps=1)
    gc.collect()
    gc.freeze()  # the model and all modules: walking through them for every row would take long
    uncached_peak = peak_bytes(rollout, lambda: rollout(steps=2))

    @contextmanager
    def counting(step):
        with Operations() as operations:
            yield
        full.operations[step] += operations.count

    rollout(steps=1, around=counting)
    rows = [Row(name, budget) for budget in budgets for name in methods]

    def attempt(row, measure, *args):
        plan = EvenlySpaced(row.budget, rollout.steps, warmup=min(3, row.budget)).steps
        try:
            with untouched(rollout.model):
                measure(rollout, METHODS[row.name], plan, row, *args)
        except Exception as error:  # a peer may fail in any way, and says why in the table
            row.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"

    for row in tqdm(rows, desc="what each does"):
        attempt(row, probe, uncached_peak)
    if compiled:  # only now, because counting operations and hooks inside would break the graphs
        for block in transformer_blocks(rollout.model):
            block.compile()
        for row in tqdm([row for row in rows if not row.failure], desc="compiling"):
            attempt(row, time_once)
            row.full, row.own, row.skipped, row.loop = [], [], [], []
    for _ in range(repeats):
        for row in tqdm([row for row in rows if not row.failure], desc="rounds"):
            attempt(row, time_once)
    gc.unfreeze()
    full.full = full.own = [seconds for row in rows for seconds in row.full]
    return [full, *rows]


COLUMNS = (
    "T = {steps}, K = {budget}: ideal {ideal:.2f}x",
    "computed",
    "full-step equivalents",
    "computed step, ms",
    "skipped step, ms",
    "speed-up",
    "loop speed-up",
    "efficiency",
    "added memory, MiB",
    "operations of a skipped step",
    "kernels",
    "synchronisations",
)


def table(rows: list[Row], steps: int, budget: int) -> str:
    """Markdown. Full-step equivalents: what all T steps together cost, in uncached steps. In parentheses: operations of
    an uncached step. The loop includes the scheduler and guidance."""
    header = [COLUMNS[0].format(steps=steps, budget=budget, ideal=steps / budget), *COLUMNS[1:]]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for row in rows:
        if row.name == "full":
            step = f"{1000 * statistics.median(row.full):.1f}" if row.full else "-"
            cells = [steps, steps, step, "-", "1.00x", "1.00x", "-", "-", f"({row.operations[0]})", "-", "-"]
        elif row.failure:
            cells = [row.failure.replace("|", "/"), *[""] * (len(COLUMNS) - 2)]
        else:
            equivalents = statistics.median(row.full_step_equivalents())
            speedup, k = steps / equivalents, len(row.computed)
            cells = [
                k,
                f"{equivalents:.2f}",
                f"{1000 * statistics.median(row.own):.1f}",
                f"{1000 * statistics.median(row.skipped):.2f}",
                f"{speedup:.2f}x",
                f"{statistics.median(row.loop):.2f}x",
                f"{speedup * k / steps:.3f}",
                f"{row.memory / 2**20:.1f}",
                statistics.median_low(row.operations[step] for step in row.skipped_steps),
                "-" if row.kernels is None else row.kernels,
                "-" if row.syncs is None else row.syncs,
            ]
        lines.append("| " + " | ".join(map(str, [row.name, *cells])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=FAMILIES, required=True)
    parser.add_argument("--budgets", type=int, nargs="+", default=[9, 13], help="computed steps K")
    parser.add_argument("--steps", type=int, default=50, help="all steps T")
    parser.add_argument("--scale", choices=("full", "small", "tiny"), help="default: full on CUDA, else small")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, once operations are counted")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch on the CPU")
    parser.add_argument("--cpu-time", action="store_true", help="of this process and no other: on one thread alone")
    args = parser.parse_args()

    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    cuda = torch.device(args.device).type == "cuda"
    scale, dtype = args.scale or ("full" if cuda else "small"), args.dtype or ("bfloat16" if cuda else "float32")
    clock = time.process_time if args.cpu_time else time.perf_counter
    rollout = Rollout(args.model, scale, args.steps, args.device, getattr(torch, dtype), clock)
    rows = benchmark(rollout, args.methods, args.budgets, args.repeats, args.compile)
    where = (
        torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads{', CPU time' * args.cpu_time}"
    )
    millions = sum(parameter.numel() for parameter in rollout.model.parameters()) / 1e6
    print(
        f"{args.model}, {scale}: {millions:.0f} M parameters, latents {tuple(rollout.start.shape)}, {dtype}, {where}"
        f"{', compiled blocks' if args.compile else ''}, PyTorch {torch.__version__}"
    )
    for budget in args.budgets:
        print("\n" + table([row for row in rows if row.budget in (budget, args.steps)], args.steps, budget))


if __name__ == "__main__":
    main()
