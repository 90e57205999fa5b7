"""Measures what a skipped step costs on transformers of published sizes, for our methods and for the caches of other
libraries.

    python -m scripts.bench_full_size --model flux                # the published size on CUDA, a small one on the CPU
    python -m scripts.bench_full_size --model wan21_t2v_14b --budgets 9 13 --methods dpcache first_block_cache

The models are those of `conf/model` whose configuration the library knows, the methods those of `conf/method`. The
weights are random, because speed does not depend on their values. Nor does it depend on which steps are computed, so
nothing is calibrated: `given` has settings with which every method computes K of the T steps, or about as many. A
method that decides online measures what it always measures, and is then told the step. A method that does not work on
a model has the reason in its row.

Before every run of a method a few uncached steps are timed. Results are relative to these, so that a drift of the
machine's speed cancels.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from dpcache.models.pretrained import default_device
from dpcache.schedules import EvenlySpaced
from dpcache.sites import transformer_blocks
from scripts.rollout import Rollout, caching

METHODS = (
    *("dpcache", "dpcache_lsq_output", "taylorseer", "fora", "teacache", "dicache", "easycache", "toca"),
    *("profilingdit", "uniform_skip", "diffusers_taylorseer", "diffusers_taylorseer_lite", "first_block_cache"),
    *("magcache", "dbcache", "dbcache_taylorseer"),
)
SMALL = {  # for a CPU: what the configuration and the pipeline's call have instead
    "flux": ("num_layers=6 num_single_layers=12 num_attention_heads=4", "height=192 width=192 max_sequence_length=48"),
    "dit": ("num_layers=12 num_attention_heads=12 attention_head_dim=64 sample_size=16", ""),
    "hunyuan_video": (
        "num_layers=6 num_single_layers=12 num_attention_heads=4 text_embed_dim=1024",
        "height=128 width=96 num_frames=9 max_sequence_length=48",
    ),
    "wan21_t2v_14b": (
        "num_layers=12 num_attention_heads=6 ffn_dim=3072",
        "height=128 width=96 num_frames=5 max_sequence_length=48",
    ),
}
UNCACHED = 5  # steps, before every run of a method


class Seconds:
    """Time within it. On a GPU it waits at both ends until all work is done."""

    def __init__(self, device: torch.device, clock: Callable[[], float]):
        self.device, self.clock, self.total = device, clock, 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    def __enter__(self):
        self.began = self._now()

    def __exit__(self, *error):
        self.total += self._now() - self.began


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches within it."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.total += 1
        return function(*args, **(kwargs or {}))


@dataclass
class Row:
    """What was measured of one method at one budget; `failure` where it does not work.

    Attributes:
        operations: of every step.
        memory: added, in bytes.
        times: of every round the median seconds of an uncached, a computed and a skipped step.
    """

    name: str
    budget: int
    computed: list[int] = field(default_factory=list)
    operations: list[int] = field(default_factory=list)
    memory: int = 0
    times: list[tuple[float, float, float]] = field(default_factory=list)
    failure: str = ""

    @property
    def skipped(self) -> list[int]:
        return [step for step in range(len(self.operations)) if step not in self.computed]

    def speedups(self) -> list[float]:
        """Of every round."""
        k, left = len(self.computed), len(self.skipped)
        return [(k + left) * uncached / (k * own + left * skip) for uncached, own, skip in self.times]

    def median(self, index: int) -> float:
        return statistics.median(times[index] for times in self.times)


def held_bytes() -> int:
    """Memory of all tensors that are alive, except for those that were frozen."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_bytes(rollout: Rollout, run: Callable[[], None]) -> int:
    """Most memory in use during `run`; without CUDA, what is held after it."""
    if rollout.device.type != "cuda":
        run()
        return held_bytes()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def probe(rollout: Rollout, plan: list[int], row: Row, uncached: int) -> None:
    """Finds computed steps, those in which the last block's attention runs, operations and memory; also a warm-up."""
    last_block, computed = transformer_blocks(rollout.transformer)[-1], set()
    attention = next(module for name, module in last_block.named_modules() if name.endswith("to_q"))
    with caching(rollout, row.name, plan) as before:

        def run():
            row.operations = rollout(Operations(), before=before)

        handle = attention.register_forward_hook(lambda *_: computed.add(rollout.step))
        row.memory = peak_bytes(rollout, run) - uncached
        handle.remove()
    row.computed = sorted(computed)


def time_once(rollout: Rollout, plan: list[int], row: Row, clock: Callable[[], float]) -> None:
    uncached = rollout(Seconds(rollout.device, clock), steps=UNCACHED)
    with caching(rollout, row.name, plan) as before:
        seconds = rollout(Seconds(rollout.device, clock), before=before)
    own, skip = ([seconds[step] for step in steps] for steps in (row.computed, row.skipped))
    row.times.append(tuple(map(statistics.median, (uncached, own, skip))))


def said(error: Exception) -> str:
    """In one line. The error itself must not be kept: its frames hold tensors, which would count as memory."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def benchmark(
    rollout: Rollout,
    methods: Sequence[str],
    budgets: Sequence[int],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """The row of the uncached model, and those of every method at every budget, in rounds in which all take turns."""
    full = Row("full", rollout.steps, list(range(rollout.steps)), rollout(Operations(), steps=1))
    gc.collect()
    gc.freeze()  # the model and all modules: to walk through them for every row would take long
    peak = peak_bytes(rollout, lambda: rollout(Operations(), steps=2))
    rows = [Row(name, budget) for budget in budgets for name in methods]

    def attempt(measure, label, *args):
        for row in tqdm([row for row in rows if not row.failure], desc=label):
            plan = [*EvenlySpaced(row.budget, rollout.steps, min(3, row.budget)).steps[:-1], rollout.steps - 1]
            try:
                measure(rollout, plan, row, *args)
            except Exception as error:  # a method of a library may fail in any way
                row.failure = said(error.__cause__ or error)  # Hydra wraps what a method raises as it is made

    attempt(probe, "what each does", peak)
    for _ in range(repeats):
        attempt(time_once, "rounds", clock)
    gc.unfreeze()
    full.times = [(uncached, uncached, 0.0) for row in rows for uncached, *_ in row.times]
    return [full, *rows]


COLUMNS = ("computed", "computed step, ms", "skipped step, ms", "operations of it", "speed-up", "efficiency")
COLUMNS += ("added memory, MiB",)


def table(rows: list[Row], steps: int, budget: int) -> str:
    """Markdown. The speed-up is that of all steps inside the transformer, the efficiency its share of the ideal one,
    all steps over the computed ones. In brackets: operations of an uncached step."""
    lines = [[f"T = {steps}, K = {budget}: ideal {steps / budget:.2f}x", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    for row in rows:
        if row.failure:
            cells = [row.failure.replace("|", "/"), *[""] * (len(COLUMNS) - 1)]
        elif not row.skipped:
            step = f"{1000 * row.median(1):.1f}" if row.times else "-"
            cells = [steps, step, "", f"({row.operations[0]})", "1.00x", "", ""]
        else:
            speedup, k = statistics.median(row.speedups()), len(row.computed)
            cells = [k, f"{1000 * row.median(1):.1f}", f"{1000 * row.median(2):.2f}"]
            cells += [statistics.median_low(row.operations[step] for step in row.skipped)]
            cells += [f"{speedup:.2f}x", f"{speedup * k / steps:.3f}", f"{row.memory / 2**20:.1f}"]
        lines.append([row.name, *cells])
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a file of conf/model")
    parser.add_argument("--budgets", type=int, nargs="+", default=[9, 13], help="computed steps K")
    parser.add_argument("--steps", type=int, default=50, help="all steps T")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--size", choices=("full", "small"), help="default: full on CUDA, else small")
    parser.add_argument("--config", default="", help='of the transformer, instead of the size\'s: "num_layers=2 ..."')
    parser.add_argument("--call", default="", help='of the pipeline, instead of the size\'s: "height=256 width=256"')
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="of this process alone, on one thread")
    args = parser.parse_args()

    diffusers.utils.logging.set_verbosity_error()
    cuda = torch.device(args.device).type == "cuda"
    if args.cpu_time:
        torch.set_num_threads(1)
    size, dtype = args.size or ("full" if cuda else "small"), torch.bfloat16 if cuda else torch.float32
    if size == "small" and args.model not in SMALL and not args.config:
        parser.error(f"there is no small size of {args.model}, only of {', '.join(SMALL)}: give --config and --call")
    config, call = SMALL.get(args.model, ("", "")) if size == "small" else ("", "")
    config, call = f"{config} {args.config}", f"{call} {args.call}"
    rollout = Rollout(args.model, args.steps, args.device, dtype, config, call)
    clock = time.process_time if args.cpu_time else time.perf_counter
    rows = benchmark(rollout, args.methods, args.budgets, args.repeats, clock)
    cpu = f"{torch.get_num_threads()} CPU threads{', CPU time' * args.cpu_time}"
    millions = sum(parameter.numel() for parameter in rollout.transformer.parameters()) / 1e6
    print(
        f"{args.model}, {size}: {millions:.0f} M parameters, latents {tuple(rollout.start.shape)}, {dtype}, "
        f"{torch.cuda.get_device_name() if cuda else cpu}, PyTorch {torch.__version__}"
    )
    for budget in args.budgets:
        print("\n" + table([row for row in rows if row.budget in (budget, args.steps)], args.steps, budget))


if __name__ == "__main__":
    main()
