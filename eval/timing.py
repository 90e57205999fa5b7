"""Wall-clock speed, memory, FLOPs, and the versions they were measured with. Times are in seconds, memory in bytes."""

import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from dpcache._diffusers import execution_device
from dpcache.errors import SettingError
from dpcache.flops import FlopCounter
from dpcache.session import stopwatch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LARGEST_SPREAD = 0.1  # of the rounds' speed-ups; a timing with a larger spread is called unreliable


def compare(
    reference: Callable[[], object],
    accelerated: Callable[[], object],
    repeats: int = 3,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> dict:
    """Times two callables side by side: `warmup` unmeasured rounds, then `repeats` rounds of reference, accelerated.

    The two alternate, so that slow drift (clocks, temperature, other jobs) changes both alike; for the same reason
    `speedup` is the median of the ratios within the rounds. The device is synchronised before each clock reading.

    Returns medians `reference_s`, `cached_s` and `speedup`, the least and the largest of the rounds in `speedup_range`,
    and the raw seconds of every round in `reference_all_s` and `cached_all_s`. Raises SettingError for `repeats` < 1.
    """
    if repeats < 1:
        raise SettingError(f"repeats must be at least 1, got {repeats}")
    device = torch.device(device)

    def seconds(function: Callable[[], object]) -> float:
        synchronise(device)
        start = perf_counter()
        function()
        synchronise(device)
        return perf_counter() - start

    rounds = []
    for index in tqdm(range(warmup + repeats), desc="timing", unit="round", leave=False):
        pair = seconds(reference), seconds(accelerated)
        if index >= warmup:
            rounds.append(pair)
    ratios = [full / cached for full, cached in rounds]
    return {
        "reference_s": median(full for full, _ in rounds),
        "cached_s": median(cached for _, cached in rounds),
        "speedup": median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "reference_all_s": [full for full, _ in rounds],
        "cached_all_s": [cached for _, cached in rounds],
    }


def synchronise(device: torch.device) -> None:
    """Waits for work queued on an accelerator, which runs behind the Python code; the CPU has no queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def phases(pipe: "DiffusionPipeline") -> Iterator[Callable[[], dict[str, float]]]:
    """Times the parts of a diffusers pipeline around its transformer, on the device's own clock: gives a function that
    returns the seconds in `text_encoder` (its `encode_prompt`) and `vae` (`decode`), of those that it has."""
    watch, spans = stopwatch(execution_device(pipe)), {}
    parts = {"text_encoder": (pipe, "encode_prompt"), "vae": (getattr(pipe, "vae", None), "decode")}
    parts = {name: (owner, method) for name, (owner, method) in parts.items() if hasattr(owner, method)}

    def timed(function: Callable, taken: list) -> Callable:
        def call(*args, **kwargs):
            start = watch.now()
            output = function(*args, **kwargs)
            taken.append((start, watch.now()))
            return output

        return call

    for name, (owner, method) in parts.items():
        spans[name] = []
        setattr(owner, method, timed(getattr(owner, method), spans[name]))
    try:
        yield lambda: {name: watch.seconds(taken) for name, taken in spans.items()}
    finally:
        for owner, method in parts.values():
            delattr(owner, method)  # then the class's own method is found again


def flops(models: list[torch.nn.Module], generate: Callable[[], object]) -> tuple[int, list[int], object]:
    """Floating-point operations of `generate()`: in total, and for each call of one of the models; and what `generate`
    returned. PyTorch's counter counts matrix multiplications, convolutions and attention; a multiplication and its
    addition count as two."""
    counter, calls = FlopCounter(), []

    def before(*_):
        calls.append(-counter.get_total_flops())

    def after(*_):
        calls[-1] += counter.get_total_flops()

    hooks = [hook for m in models for hook in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        with counter:
            result = generate()
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops(), calls, result


def efficiency(num_inference_steps: int, budget: float, full_s: Sequence[float], cached_s: Sequence[float]) -> dict:
    """How much of the ideal speed-up the transformer reached.

    Args:
        num_inference_steps: T.
        budget: K, the computed steps, a mean where they vary between samples.
        full_s: seconds in the transformer over the full-step run of each round.
        cached_s: the same over the cached run of the same rounds, predicted steps included.

    Returns `transformer_speedup`, the median of full_s / cached_s within the rounds, with its least and largest
    `transformer_speedup_range`; `ideal_speedup` = T / K (prediction for free); and `efficiency`, the first over it.
    """
    ratios, ideal = [full / cached for full, cached in zip(full_s, cached_s, strict=True)], num_inference_steps / budget
    return {
        "transformer_speedup": median(ratios),
        "transformer_speedup_range": [min(ratios), max(ratios)],
        "ideal_speedup": ideal,
        "efficiency": median(ratios) / ideal,
    }


def reliability(timed: dict) -> dict:
    """Whether the rounds agree, from what `compare` and `efficiency` returned together.

    Returns `spread`, how much the speed-ups of the rounds differ at most (0.1: the largest is 10 % above the smallest),
    and `unreliable`, the reason why the timing does not describe the method well, or None. If there is a reason, also
    `efficiency`, with the value None.
    """
    ranges = timed["speedup_range"], timed["transformer_speedup_range"]
    spread = max(high / low for low, high in ranges) - 1
    least = timed["transformer_speedup_range"][0] / timed["ideal_speedup"]
    reason = None
    if len(timed["reference_all_s"]) == 1:
        reason = "a single round has no spread"
    elif spread > LARGEST_SPREAD:
        reason = f"the rounds differ by {spread:.0%}"
    elif least > 1:
        reason = f"every round is faster than its computed steps allow, by {least - 1:.1%} and more"
    return {"spread": spread, "unreliable": reason} | ({"efficiency": None} if reason else {})


def memory(device: torch.device | str = "cpu") -> dict[str, int]:
    """Peak memory in bytes: `peak_device` of PyTorch's CUDA allocator, elsewhere `peak_rss` of the process.

    Both are high-water marks since the start or, on CUDA, since `torch.cuda.reset_peak_memory_stats()`.
    """
    if torch.device(device).type == "cuda":
        return {"peak_device": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS and KiB on Linux
    return {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def versions(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Versions of Python and the packages that shape results, platform, processor and this project's git revision.

    None stands for a package that is not installed and for a project that is not a git checkout; a revision with
    uncommitted changes ends in `-dirty`.
    """
    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "torchmetrics", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    on_gpu = torch.device(device).type == "cuda"
    processor = torch.cuda.get_device_name(device) if on_gpu else _cpu_name()
    return found | {"platform": platform.platform(), "processor": processor, "git": _revision()}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _revision() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # git would otherwise report an unrelated checkout around an installed copy
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or no commit yet
        return None
