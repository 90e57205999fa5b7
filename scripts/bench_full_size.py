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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import diffusers
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, MagCacheConfig, TaylorSeerCacheConfig
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
from dpcache.models.architectures import Architecture, architecture
from dpcache.models.family import EXAMPLE_TIME
from dpcache.models.pretrained import default_device
from dpcache.schedules import EvenlySpaced, Schedule
from dpcache.sites import transformer_blocks

REFERENCE_STEPS = 5  # uncached, before every rollout


# --- Models


def heads(number: int, size: int, **others) -> dict:
    return {"num_attention_heads": number, "attention_head_dim": size, **others}


def size(height: int, width: int, frames: int = 1, text: int = 0) -> dict:
    return {"height": height, "width": width, "num_frames": frames, "max_sequence_length": text}


_NARROW_FLUX = {"joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}
_NARROW_HUNYUAN = {"text_embed_dim": 16, "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6)}
# The path on the hub; for each scale, what the configuration has instead, and the pipeline's arguments.
MODELS = {
    "flux": (
        "black-forest-labs/FLUX.1-dev",
        {
            "full": ({}, size(1024, 1024, text=512)),
            "small": (heads(4, 128, num_layers=6, num_single_layers=12), size(192, 192, text=48)),
            "tiny": (
                heads(2, 16, num_layers=2, num_single_layers=3, in_channels=8, **_NARROW_FLUX),
                size(48, 48, text=3),
            ),
        },
    ),
    "dit": (
        "facebook/DiT-XL-2-256",
        {
            "full": ({}, {}),
            "small": (heads(12, 64, num_layers=12, sample_size=16), {}),
            "tiny": (heads(2, 16, num_layers=3, sample_size=6), {}),
        },
    ),
    "hunyuan_video": (
        "hunyuanvideo-community/HunyuanVideo",
        {
            "full": ({}, size(480, 848, 33, text=256)),
            "small": (
                heads(4, 128, num_layers=6, num_single_layers=12, text_embed_dim=1024),
                size(128, 96, 9, text=48),
            ),
            "tiny": (
                heads(2, 16, num_layers=2, num_single_layers=2, num_refiner_layers=1, **_NARROW_HUNYUAN),
                size(48, 48, text=3),
            ),
        },
    ),
    "wan21": (
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        {
            "full": ({}, size(480, 832, 33, text=512)),
            "small": (heads(6, 128, num_layers=12, ffn_dim=3072), size(128, 96, 5, text=48)),
            "tiny": (heads(2, 16, num_layers=3, ffn_dim=32, text_dim=16, freq_dim=16), size(48, 48, text=3)),
        },
    ),
}


def scaled(name: str, scale: str) -> tuple[Architecture, dict]:
    """A model's architecture, and its pipeline's arguments."""
    path, scales = MODELS[name]
    changes, call = scales[scale]
    known = architecture(path)
    return replace(known, config={**known.config, **changes}), call


def random_weights(known: Architecture, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Made on the device itself, because the full sizes in float32 on the CPU would take long and much memory."""
    model = known.build("meta", dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(part in name for part in model._keep_in_fp32_modules or ()):  # as `from_pretrained` does
            tensor.data = tensor.data.float()
    model.to_empty(device=device)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
    if not isinstance(model, CacheMixin):  # diffusers' caches ask for it, and need nothing else of it
        kind = type(model)
        model.__class__ = type(kind.__name__, (kind, CacheMixin), {"__module__": kind.__module__})
    return model


class Rollout:
    """A transformer in an Euler loop of T steps with fixed inputs. It stands for the pipeline whose scheduler tells a
    session the steps."""

    def __init__(self, name: str, scale: str, steps: int, device: str, dtype: torch.dtype, clock=time.perf_counter):
        torch.manual_seed(0)
        self.clock, self.steps, self.device = clock, steps, torch.device(device)
        known, call = scaled(name, scale)
        self.model, self.branches = random_weights(known, device, dtype), known.family.branches(call)
        self.transformer = self.model  # as pipelines have it
        self.conditions = known.inputs(call, 1, device, dtype)
        latents, timestep = self.conditions.pop("hidden_states"), self.conditions.pop("timestep")
        self.start, self.batch = latents[:1], len(latents)  # 2 where guidance is by the halves of a batch
        self.time_scale = timestep[0].item() / EXAMPLE_TIME
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
        noisy = torch.cat([sample] * self.batch)
        time_ = timestep.expand(len(noisy)) * self.time_scale
        output = torch.cat([self._call(branch, noisy, time_) for branch in self.branches])
        output = output[:, : sample.shape[1]]  # without a learned variance
        if len(output) == 1:
            return output
        conditional, unconditional = output.chunk(2)
        return unconditional + 4.0 * (conditional - unconditional)

    def _call(self, branch, noisy, time_):
        began = self._now()
        with self.around(), self.model.cache_context(branch):
            output = self.model(hidden_states=noisy, timestep=time_, return_dict=False, **self.conditions)[0]
        self.spent += self._now() - began
        return output

    def _now(self) -> float:
        if self.wait and self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


# --- Methods: name -> (rollout, plan, T) -> a context in which its model is cached. What it yields is called before
# every step with its number, if anything. `plan`: the K steps to compute, where a method can be told.


def own(make):
    @contextmanager
    def attached(rollout, plan, steps):
        with dpcache.cached(rollout, make(rollout.model, plan, steps)):
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
    def attached(rollout, plan, steps):
        method, plan = make(len(plan), steps), {*plan[:-1], steps - 1}

        def drive(step):
            method.schedule.threshold = -math.inf if step in plan else math.inf

        with dpcache.cached(rollout, method):
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
    def attached(rollout, plan, steps):
        model = rollout.model
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
def diffusers_first_block(rollout, plan, steps):
    rollout.model.enable_cache(FirstBlockCacheConfig())
    hook = transformer_blocks(rollout.model)[0]._diffusers_hook.get_hook("fbc_leader_block_hook")

    def drive(step):
        hook.threshold = -1.0 if step in plan else math.inf

    yield drive


@contextmanager
def diffusers_magcache(rollout, plan, steps):
    """Its ratios are the model's, so any may be given."""
    ratios = torch.tensor([2.0 if step in plan else 1.0 for step in range(steps)])
    rollout.model.enable_cache(
        MagCacheConfig(
            threshold=0.5, max_skip_steps=steps, retention_ratio=0.0, num_inference_steps=steps, mag_ratios=ratios
        )
    )
    yield


def cache_dit_dbcache(order: int | None):
    @contextmanager
    def attached(rollout, plan, steps):
        model = rollout.model
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

    with attach(rollout, plan, rollout.steps) as drive:
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
    with attach(rollout, plan, rollout.steps) as drive:
        seconds, loop = rollout(drive=drive)
    if rollout.device.type == "cuda":
        with attach(rollout, plan, rollout.steps) as drive:
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
    parser.add_argument("--model", choices=MODELS, required=True)
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
