"""Checks on a GPU everything that could not be tried without one, and writes a page of results to send to us.

    python scripts/gpu_check.py                  # minutes on one card
    python scripts/gpu_check.py --full           # published sizes of Wan and HunyuanVideo as well; longer

1. Every method on every small family: the same computed steps and the same latents on the device as on the CPU.
2. What a skipped step makes the host wait for, and how often memory is asked for, in each method.
3. Offloading and half precision.
4. The benchmark of published sizes (`scripts/bench_full_size.py`), with blocks compiled and not.

If a part fails, the page shows its error, and the other parts go on. The script runs on the CPU as well; there part 2
has nothing to count.
"""

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import diffusers  # noqa: E402
import torch  # noqa: E402
from hydra.utils import instantiate  # noqa: E402

from dpcache.errors import SettingError  # noqa: E402
from dpcache.models.pretrained import default_device  # noqa: E402
from dpcache.sites import transformer_blocks  # noqa: E402
from helpers.cases import T, case, settings  # noqa: E402
from helpers.families import FAMILIES  # noqa: E402
from scripts.bench_full_size import METHODS as BENCHED  # noqa: E402
from scripts.bench_full_size import SMALL, benchmark, table  # noqa: E402
from scripts.rollout import Rollout, caching  # noqa: E402

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
CLOSE = 1e-3  # relative distance of latents in float32 that rounding explains


def markdown(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: the CPU"
    return f"{name}, PyTorch {torch.__version__}, diffusers {diffusers.__version__}, Python {sys.version.split()[0]}"


@contextmanager
def on(pipe: "DiffusionPipeline", device: torch.device) -> Iterator[None]:
    """The pipeline on the device, and on the CPU again."""
    pipe.to(device)
    try:
        yield
    finally:
        pipe.to("cpu")


def same_as_on_the_cpu(device: torch.device, methods: Sequence[str], families: Sequence[str]) -> str:
    """A table: of every method on every family the relative distance of the latents, "steps" where other steps were
    computed (an online method may decide otherwise where rounding tips the scale), or "refused"."""
    rows = []
    for name in methods:
        cells = []
        for family in map(case, families):
            try:
                method = family.build(instantiate(settings(name)))
                expected, there = family.run(method)
                with on(family.pipe, device):
                    made, here = family.run(method)
                distance = float((made - expected).norm() / expected.norm())
                other = "" if here.computed == there.computed else " other steps"
                cells.append(f"{distance:.0e}{other}{'' if distance < CLOSE or other else ' FAR'}")
            except (SettingError, AssertionError):  # cache-dit refuses by assertions
                cells.append("refused")
            except Exception as error:
                cells.append(f"FAILED {type(error).__name__}: {str(error).splitlines()[0] if str(error) else '-'}")
        rows.append([name, *cells])
    return markdown(["method", *families], rows)


class Waits:
    """A meter for `Rollout`: counts how often the host waits for the GPU within it."""

    total = 0

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("warn")
        self.caught = warnings.catch_warnings(record=True)
        self.list = self.caught.__enter__()
        warnings.simplefilter("always")

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(*error)
        self.total += sum("synchroniz" in str(warning.message) for warning in self.list)


class Allocations:
    """A meter for `Rollout`: counts the allocations of GPU memory within it."""

    total = 0

    def _now(self) -> int:
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    def __enter__(self):
        self.began = self._now()

    def __exit__(self, *error):
        self.total += self._now() - self.began


def waits_and_allocations(device: torch.device, methods: Sequence[str], small: tuple[str, str]) -> str:
    """A table: of every method the waits and allocations of a computed and of a skipped step, medians."""
    if device.type != "cuda":
        return "Nothing to count without a GPU; `scripts/fake_cuda.py` counts the waits of a made-up one."
    rollout, plan, rows = Rollout("flux", 12, device, torch.bfloat16, *small), [0, 1, 2, 5, 8, 11], []
    for name in methods:
        try:
            with caching(rollout, name, plan) as before:
                rollout(Waits(), before=before)  # the first run makes the buffers
                counts = [rollout(meter(), before=before) for meter in (Waits, Allocations)]
            own, skipped = (
                [sorted(one[s] for s in steps) for one in counts] for steps in (plan, {*range(12)} - {*plan})
            )
            rows.append([name, *(part[len(part) // 2] for part in (*own, *skipped))])
        except Exception as error:
            rows.append(
                [name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else '-'}", *[""] * 3]
            )
    return markdown(["method", "waits, computed", "allocations", "waits, skipped", "allocations"], rows)


def offload_and_half_precision(device: torch.device, methods: Sequence[str], family: str) -> str:
    """A table: of every method on one family whether offloading changes the latents, and how far half precision is from
    float32."""
    rows = []
    for name in methods:
        one = case(family)
        method = one.build(instantiate(settings(name)))
        expected, _ = one.run(method)
        cells = []
        if device.type == "cuda":
            with on(one.pipe, device):
                there, _ = one.run(method)
            one.pipe.enable_model_cpu_offload(device=device)
            moved, _ = one.run(method)
            one.pipe.remove_all_hooks()
            one.pipe.to("cpu")
            cells.append("equal" if torch.equal(there, moved) else f"{(there - moved).norm() / there.norm():.0e}")
        else:
            cells.append("not without a GPU")
        for dtype in (torch.bfloat16, torch.float16):
            low = FAMILIES[family].make().to(device, dtype)
            one.pipe, whole = low, one.pipe
            try:
                made, _ = one.run(method)
                cells.append(f"{(made - expected).norm() / expected.norm():.0e}")
            except Exception as error:
                cells.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            finally:
                one.pipe = whole
        rows.append([name, *cells])
    return markdown(["method", "offloaded", "bfloat16", "float16"], rows)


def speed(
    device: torch.device, model: str, methods: Sequence[str], size: tuple[str, str], compiled: bool, T: int = 50
) -> str:
    """The benchmark's table at 9 of T steps. `size`: settings of the model that differ from the published ones."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rollout = Rollout(model, T, device, dtype, *size)
    if compiled:
        for block in transformer_blocks(rollout.transformer):
            block.compile()
    rows, budget = benchmark(rollout, methods, [min(9, T // 2)], repeats=2), min(9, T // 2)
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    millions = sum(parameter.numel() for parameter in rollout.transformer.parameters()) / 1e6
    return f"{millions:.0f} M parameters, {dtype}{peak}\n\n{table(rows, T, budget)}"


def part(title: str, make: Callable[[], str]) -> str:
    """A section of the page; of a part that fails, the end of its traceback."""
    print(f"{title} ...", file=sys.stderr, flush=True)
    began = time.time()
    try:
        text = make()
    except Exception:
        text = "FAILED\n\n```\n" + "".join(traceback.format_exc().splitlines(keepends=True)[-6:]) + "```"
    return f"## {title}\n\n{text}\n\n({time.time() - began:.0f} s)\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also Wan 14 B and HunyuanVideo at their published sizes")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--config", help="of FLUX's transformer, in place of its size: for a quick try")
    parser.add_argument("--call", default="", help="of FLUX's pipeline, likewise")
    parser.add_argument("--steps", type=int, default=50, help="of the benchmark")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.md"))
    args = parser.parse_args()

    diffusers.utils.logging.set_verbosity_error()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    benched = [name for name in BENCHED if name in args.methods]
    size = (args.config, args.call) if args.config else ("", "") if device.type == "cuda" else SMALL["flux"]
    half = [name for name in ("dpcache", "taylorseer", "teacache") if name in args.methods]
    parts = {
        f"The same as on the CPU, {T} steps": lambda: same_as_on_the_cpu(device, args.methods, args.families),
        "Waits and allocations": lambda: waits_and_allocations(device, benched, SMALL["flux"]),
        "Offloading and half precision": lambda: offload_and_half_precision(device, half, args.families[0]),
        "FLUX.1-dev": lambda: speed(device, "flux", benched, size, False, args.steps),
        "FLUX.1-dev, blocks compiled": lambda: speed(device, "flux", benched[:4], size, True, args.steps),
    }
    for model in ("wan21_t2v_14b", "hunyuan_video") if args.full else ():
        published = ("", "") if device.type == "cuda" else SMALL[model]
        parts[model] = lambda m=model, p=published: speed(device, m, benched, p, False, args.steps)
    page = f"# {machine(device)}\n"
    for title, make in parts.items():
        page += "\n" + part(title, make)
        args.out.write_text(page)  # a run that is cut off leaves what it has found
    failed = page.count("FAILED") + page.count(" FAR")
    print(page, f"{args.out}: {failed} cells or parts failed", sep="\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
