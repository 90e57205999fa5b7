"""Measures time and memory of a calibration's Gram matrix and of the paper's L1 tensor, to compare them.

    python -m scripts.bench_calibration

Features of FLUX.1-dev's last block (T x 4,608 x 3,072) by default. The forward passes that make them are estimated from
one single-stream block of that size, which is timed: the model has 57 blocks, of which 19 cost about twice as much.
Memory is read from /proc, so the script needs Linux.
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import torch

from dpcache.gram import gram
from dpcache.models import flux
from dpcache.pact import l1_cost
from dpcache.predictors import Taylor


def measure(
    name: str, steps: int, shape: tuple[int, int], dtype: str, threads: int, report: multiprocessing.Queue
) -> None:
    """Runs in a process of its own. Reports the seconds, the peak of memory beyond the features in bytes, and the
    features' own bytes."""
    torch.set_num_threads(threads)
    features = torch.empty(steps, *shape, dtype=getattr(torch, dtype))
    torch.manual_seed(0)
    features[0].normal_()
    for step in range(1, steps):
        features[step] = features[step - 1] + 0.1 * torch.randn_like(features[step])
    small = features[:, :1]
    work = {"gram": gram, "l1": lambda rows: l1_cost(rows, Taylor(2))}[name]
    work(small)  # warm-up
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is in use
    before = peak_memory()
    start = time.perf_counter()
    work(features)
    seconds = time.perf_counter() - start
    report.put((seconds, peak_memory() - before, features.nbytes))


def peak_memory() -> int:
    """Peak memory of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@torch.no_grad()
def block_seconds(tokens: int, dtype: str, threads: int) -> float:
    """One single-stream block of FLUX.1-dev over `tokens`, the faster of two calls."""
    torch.set_num_threads(threads)
    text = 512
    model = flux.FAMILY.transformer_class(num_layers=0, num_single_layers=1).to(getattr(torch, dtype)).eval()
    (block,), rope = model.single_transformer_blocks, model.pos_embed(torch.zeros(tokens, 3))
    hidden = torch.randn(1, tokens, 3072, dtype=getattr(torch, dtype))
    temb = torch.randn(1, 3072, dtype=hidden.dtype)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        block(hidden[:, text:], hidden[:, :text], temb, image_rotary_emb=rope)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps T of the trajectory")
    parser.add_argument("--tokens", type=int, default=4608, help="tokens of the feature and of the block")
    parser.add_argument("--dtype", default="bfloat16", help="of the features")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    results = {}
    for name in ("gram", "l1"):
        report = context.Queue()
        process = context.Process(
            target=measure, args=(name, args.steps, (args.tokens, 3072), args.dtype, args.threads, report)
        )
        process.start()
        results[name] = report.get()
        process.join()
    block = block_seconds(args.tokens, "float32", args.threads)
    forward = args.steps * block * (38 + 19 * 2)

    print(f"T={args.steps}, {args.tokens} x 3072 {args.dtype} features ({results['gram'][2] / 2**30:.2f} GiB)")
    print(f"{'':<28}{'seconds':>10}{'more memory, MiB':>18}{'of the forward passes':>23}")
    for name, label in (("gram", "Gram matrix, float64"), ("l1", "L1 tensor (order-2 Taylor)")):
        seconds, memory, _ = results[name]
        print(f"{label:<28}{seconds:>10.1f}{memory / 2**20:>18.0f}{seconds / forward:>23.3%}")
    print(f"one float32 block {block:.1f} s, so {args.steps} forward passes about {forward:.0f} s")


if __name__ == "__main__":
    main()
