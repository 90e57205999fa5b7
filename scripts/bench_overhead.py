"""What a skipped step costs: transformer-only speed-up against the ideal T / K on a FLUX transformer of random weights.

    python scripts/bench_overhead.py                                # about 100 M parameters, 1,024 image tokens
    python scripts/bench_overhead.py --width 3072 --double 19 --single 38 --tokens 4096 --dtype bfloat16 --device cuda

Rollouts of T steps take turns: full, DPCache, least squares at the output, and diffusers' own TaylorSeer in lite mode,
each with K computed steps.
"""

import argparse
import statistics
import time

import torch
from diffusers import FluxTransformer2DModel, TaylorSeerCacheConfig
from tqdm import tqdm

import dpcache
from dpcache.lsq import FittedWeights
from dpcache.method import dpcache as dpcache_method
from dpcache.models.pretrained import default_device

STEPS = [0, 1, 2, 5, 9, 14, 20, 26, 33, 41]  # K = 10
LITE_STEPS = [0, 1, 2, 4, 11, 18, 25, 32, 39, 46]  # what diffusers computes with the settings below: K = 10 as well


class Rollout:
    """T Euler steps with fixed inputs; `rollout()` -> seconds inside the transformer, for each step."""

    def __init__(self, model, tokens, text_tokens, steps):
        side = int(tokens**0.5)
        like = next(model.parameters())
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(side * 1.0), torch.arange(tokens // side * 1.0))
        random = torch.Generator("cpu").manual_seed(0)
        self.model, self.steps, self.cuda = model, steps, like.is_cuda
        self.start = torch.randn(1, tokens, model.config.in_channels, generator=random).to(like)
        self.fixed = {
            "encoder_hidden_states": torch.randn(1, text_tokens, model.config.joint_attention_dim, generator=random).to(
                like
            ),
            "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, generator=random).to(like),
            "img_ids": ids.to(like.device),
            "txt_ids": torch.zeros(text_tokens, 3, device=like.device),
        }
        self.times = [torch.full((1,), 1 - step / steps).to(like) for step in range(steps)]

    @torch.inference_mode()
    def __call__(self) -> list[float]:
        sample, seconds = self.start, []
        for time_ in self.times:
            began = self._now()
            with self.model.cache_context("cond"):
                velocity = self.model(hidden_states=sample, timestep=time_, return_dict=False, **self.fixed)[0]
            seconds.append(self._now() - began)
            sample = sample - velocity / self.steps
        return seconds

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--double", type=int, default=3, help="double-stream blocks")
    parser.add_argument("--single", type=int, default=4, help="single-stream blocks")
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()

    torch.manual_seed(0)
    with torch.device(args.device):
        model = FluxTransformer2DModel(
            num_layers=args.double,
            num_single_layers=args.single,
            num_attention_heads=args.width // 128,
            joint_attention_dim=512,
            pooled_projection_dim=256,
        )
    model = model.to(getattr(torch, args.dtype)).eval()
    rollout = Rollout(model, args.tokens, args.text_tokens, 50)
    method = dpcache_method(len(STEPS), 50, steps=STEPS)
    weights = {step: (0.1, -0.3, 1.2, 0.05) for step in range(50)}  # any: three keys and the input, as in lsq3x
    output = dpcache.Method(method.schedule, "output", FittedWeights(3, weights, sees_input=True))
    lite = TaylorSeerCacheConfig(
        cache_interval=7,
        disable_cache_before_step=3,
        max_order=2,
        taylor_factors_dtype=next(model.parameters()).dtype,
        use_lite_mode=True,
    )

    def cached(which) -> list[float]:
        with dpcache.cached(model, which):
            return rollout()

    def diffusers_lite() -> list[float]:
        model.enable_cache(lite)
        try:
            return rollout()
        finally:
            model.disable_cache()

    runs = {
        "full": rollout,
        "dpcache (ours)": lambda: cached(method),
        "dpcache_lsq_output (ours)": lambda: cached(output),
        "TaylorSeer lite (diffusers)": diffusers_lite,
    }
    seconds = {name: [] for name in runs}
    for _ in tqdm(range(args.repeats), desc="rounds"):
        for name, run in runs.items():
            seconds[name].append(run())
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {args.tokens} image tokens, {args.dtype}"
    )
    print(f"{'T=50, K=10':<28} {'seconds':>8} {'speed-up':>9} {'efficiency':>11} {'skipped step':>13} {'computed':>9}")
    computed_steps = dict(zip(runs, (range(50), STEPS, STEPS, LITE_STEPS)))
    totals = {name: [sum(steps) for steps in rounds] for name, rounds in seconds.items()}
    for name, rounds in seconds.items():
        speedup = statistics.median(full / own for full, own in zip(totals["full"], totals[name]))
        line = f"{name:<28} {statistics.median(totals[name]):8.2f} {speedup:8.2f}x"
        computed = statistics.median(steps[i] for steps in rounds for i in computed_steps[name])
        skipped = [s for steps in rounds for i, s in enumerate(steps) if i not in computed_steps[name]]
        if skipped:
            line += f" {speedup / 5:11.3f} {1000 * statistics.median(skipped):10.2f} ms"
        print(f"{line:<73} {1000 * computed:6.0f} ms")


if __name__ == "__main__":
    main()
