"""Full-step trajectories -> path-aware costs, in one safetensors file that knows what it was made for."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from dpcache.errors import SettingError
from dpcache.gram import gram
from dpcache.method import Method, cached
from dpcache.models.family import modulated_input
from dpcache.pact import l1_cost
from dpcache.predictors import Predictor, Reuse, Taylor
from dpcache.sampler import Batch, generate, sample
from dpcache.schedules import EvenlySpaced, OnlineSchedule, Schedule
from dpcache.session import Report, denoisers

_FORMAT = "dpcache calibration 3"
_SHAPE = ("num_frames", "height", "width")


def fingerprint(transformer: torch.nn.Module) -> str:
    """16 hex digits of the model's class, configuration, parameter shapes and a sample of every parameter."""
    digest = hashlib.sha256(type(transformer).__name__.encode())
    config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(transformer.named_parameters()):
        values = parameter.detach().flatten()[:: max(parameter.numel() // 8, 1)][:8].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{values.tolist()}".encode())
    return digest.hexdigest()[:16]


def describe(pipe, num_inference_steps: int, **call) -> dict[str, str]:
    """The circumstances under which a pipeline's samples and features stay the same, field by field."""
    models = list(denoisers(pipe).values())
    shape, guidance, rest = {}, {}, {}
    for name, value in sorted(call.items()):
        kind = shape if name in _SHAPE else guidance if "guidance" in name or "cfg" in name else rest
        kind[name] = value
    scheduler = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    return {
        "model": ", ".join(f"{type(model).__name__} {fingerprint(model)}" for model in models),
        "num_inference_steps": str(num_inference_steps),
        "scheduler": json.dumps({"class": type(pipe.scheduler).__name__} | scheduler, sort_keys=True, default=str),
        "resolution": " x ".join(str(shape[name]) for name in _SHAPE if name in shape),
        "guidance": str(guidance),
        "call": str(rest),
        "dtype": str(models[0].dtype).removeprefix("torch."),
    }


@dataclass
class Calibration:
    """What calibration learned from n full-step trajectories of T steps.

    Attributes:
        cost: path-aware cost tensor (T, T+1, T+1), float64, mean over samples and guidance branches (arXiv
            2602.22654, Eq. 6). Of the last block it takes the image stream, which alone reaches the output (the
            authors' code adds the text).
        input_change: (n, T) relative L1 change of the first block's modulated input against the step before (0 at
            step 0); n counts batches. Empty (0, T) where the model's modulated input is not known.
        output_change: (n, T) the same for the feature. Both are of the first guidance branch.
        gram: Gram matrix of the features, mean over samples, guidance branches and elements (`dpcache.gram`): (T, T)
            at site=stack; (2T, 2T) at site=output, features and then the model's inputs, or (T, T) where the two
            differ in shape.
        gain: (T,) how far the final latents move per unit of feature error at each step (`measure_gain`); empty (0,)
            where it was not asked for.
        latents: the final latents of the trajectories, float32 (n, ...).
        made_for: what `describe` said of the pipeline, and the `purpose`.
        made_from: prompts, seeds, batch_size and call (the pipeline's arguments), so that `rerun` can repeat them.
    """

    cost: np.ndarray
    input_change: np.ndarray
    output_change: np.ndarray
    gram: np.ndarray
    gain: np.ndarray
    latents: np.ndarray
    made_for: dict[str, str]
    made_from: dict

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        metadata = {"format": _FORMAT, "made_for": json.dumps(self.made_for), "made_from": json.dumps(self.made_from)}
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        save_file(arrays, part, metadata)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Raises SettingError if the file is not a calibration, FileNotFoundError if there is none."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"calibration file {path} does not exist")
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
            arrays = load_file(path)
            return cls(
                **{name: arrays[name] for name in _ARRAYS},
                made_for=json.loads(metadata["made_for"]),
                made_from=json.loads(metadata["made_from"]),
            )
        except Exception as error:
            raise SettingError(f"{path} is not a calibration file: {error}") from None

    def batches(self, limit: int | None = None) -> list[tuple[list[str], list[int]]]:
        """The (first `limit`) prompts and their seeds as they were batched."""
        prompts, seeds, size = (self.made_from[name] for name in ("prompts", "seeds", "batch_size"))
        prompts, seeds = prompts[:limit], seeds[:limit]
        return [(prompts[i : i + size], seeds[i : i + size]) for i in range(0, len(prompts), size)]

    def rerun(
        self, pipe, method, limit: int | None = None, observe: Callable | None = None
    ) -> tuple[np.ndarray, Report]:
        """Final latents (n, ...) of the calibration's (first `limit`) prompts under `method`, and what it did in all of
        them. `observe`: see `Session`."""
        steps, call = method.num_inference_steps, self.made_from["call"]
        with cached(pipe, method, observe) as session:
            bar = tqdm(self.batches(limit), desc="trying on the calibration prompts", unit="batch", leave=False)
            latents = [generate(pipe, *batch, steps, decode=False, **call).latents for batch in bar]
        return torch.cat(latents).numpy(), session.report()

    @property
    def switches(self) -> list[int]:
        """Steps at which the pipeline's second model took over, if it has one."""
        return self.made_from.get("switches", [])

    def check(self, expected: dict[str, str]) -> "Calibration":
        """Itself, if `made_for` agrees with `expected`; else a ValueError that names the fields that differ."""
        differing = [
            f"{name}: made for {self.made_for.get(name)}, this run has {value}"
            for name, value in expected.items()
            if self.made_for.get(name) != value
        ]
        if differing:
            raise SettingError("this calibration was made for something else: " + "; ".join(differing))
        return self


_ARRAYS = ("cost", "input_change", "output_change", "gram", "gain", "latents")


class _Recorder:
    """An observer: `kept[branch][name]` holds, in order, the features at the computed steps (K, B, ...) and the
    model's inputs at all steps (T, B, ...)."""

    def __init__(self, schedule: Schedule):
        every = list(range(schedule.num_inference_steps))
        self.every, self.computed = every, schedule.steps or every
        self.kept: dict[str, dict[str, torch.Tensor]] = {}
        self.filled: dict[tuple[str, str], list[int]] = {}

    def __call__(self, branch, step, name, tensor):
        if isinstance(tensor, tuple):
            raise SettingError(f"calibration takes features of one tensor, but {name!r} has {len(tensor)}")
        steps, kept = self._steps(name), self.kept.setdefault(branch, {})
        if name not in kept:
            kept[name] = _room(tensor, len(steps))
        kept[name][steps.index(step)] = tensor
        self.filled.setdefault((branch, name), []).append(step)

    def _steps(self, name: str) -> list[int]:
        return self.every if name == "input" else self.computed

    def check(self) -> None:
        """Raises SettingError where a branch was not there at every step: what is kept of the others is undefined."""
        for (branch, name), steps in self.filled.items():
            if steps != self._steps(name):
                raise SettingError(
                    f"calibration: the guidance branch {branch!r} passed {name!r} at the steps {steps}, not at "
                    f"{self._steps(name)}"
                )


def _room(like: torch.Tensor, steps: int) -> torch.Tensor:
    """An empty tensor for `steps` of `like`, on its device if that leaves half of the free memory, else on the CPU."""
    fits = like.device.type != "cuda" or steps * like.nbytes < torch.cuda.mem_get_info(like.device)[0] / 2
    return torch.empty((steps, *like.shape), dtype=like.dtype, device=like.device if fits else "cpu")


def record(pipe, method, prompts, seeds, **call) -> tuple[Batch, dict[str, dict[str, torch.Tensor]]]:
    """Sample with `method` and keep everything that passes at its site.

    Returns:
        The batch, and for every guidance branch the features of the computed steps (K, B, ...) under the
        site's name, with site=output also the model's inputs at all steps (T, B, ...) under "input".
    """
    recorder = _Recorder(method.schedule)
    batch = sample(pipe, method, prompts, seeds, decode=False, observe=recorder, **call)
    recorder.check()
    return batch, recorder.kept


class _InputChanges(OnlineSchedule):
    """Computes every step of one generation and records the changes of the modulated input, branch by branch."""

    def __init__(self, num_inference_steps: int):
        super().__init__(num_inference_steps)
        self.changes: dict[str, list[float]] = {}

    def decide(self, context, block, args, kwargs):
        try:
            current = modulated_input(block, args, kwargs)
        except ValueError:  # not known for this model: a calibration without it
            return True
        previous, context.online["previous"] = context.online.get("previous"), current
        change = 0.0 if previous is None else relative_change(current, previous).item()
        self.changes.setdefault(context.name, []).append(change)
        return True


def relative_change(current: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """mean|current - previous| / mean|previous| (TeaCache, arXiv 2411.19108, Eq. 4)."""
    return (current - previous).abs().mean() / previous.abs().mean()


def purpose(
    predictor: Predictor | None = None,
    site: str = "stack",
    path_aware: bool = True,
    cumulative: bool = True,
    measure_gains: bool = False,
) -> dict[str, str]:
    """What a calibration made with these arguments of `calibrate` is good for, field by field. Measured gains do no
    harm where they are not needed, so they are not among the fields."""
    dimensions, sums = "3D" if path_aware else "2D", "cumulative" if cumulative else "not cumulative"
    return {"site": site, "cost": f"{predictor or Taylor(2)!r}, {dimensions}, {sums}"}


def calibrate(
    pipe,
    prompts: Sequence[str],
    num_inference_steps: int = 50,
    predictor: Predictor | None = None,
    site: str = "stack",
    path_aware: bool = True,
    cumulative: bool = True,
    measure_gains: bool = False,
    seeds: Sequence[int] | None = None,
    batch_size: int = 1,
    **call,
) -> Calibration:
    """Run `prompts` with every step computed and gather what the methods plan with.

    Only the T features of one batch are held at a time, of every guidance branch.

    Args:
        predictor: whose errors `cost` holds; default `Taylor(2)`, the paper's.
        site: whose features: `stack`, or `output`, which takes any denoiser that diffusers has, U-Nets too.
        path_aware, cumulative: of `cost`, see `dpcache.pact.l1_cost`; the paper's ablation.
        measure_gains: also measure how much an error at each step matters: a dozen more runs of two prompts.
        seeds: one per prompt; default 0, 1, ...
        call: further arguments of the pipeline (height, width, guidance_scale, ...).
    """
    if not prompts:
        raise SettingError("calibration needs at least one prompt")
    if site not in ("stack", "output"):
        raise SettingError(f"site={site}: calibration takes stack or output")
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    stack, full = site == "stack", EvenlySpaced(num_inference_steps, num_inference_steps)
    device, cost, pooled = pipe._execution_device, 0.0, 0.0
    input_change, output_change, latents = [], [], []
    for start in tqdm(range(0, len(prompts), batch_size), desc="calibrating", unit="batch", leave=False):
        chunk = slice(start, start + batch_size)
        share = len(prompts[chunk]) / len(prompts)
        schedule = _InputChanges(num_inference_steps) if stack else full
        batch, kept = record(pipe, Method(schedule, site, Reuse()), prompts[chunk], seeds[chunk], **call)
        latents.append(batch.latents)
        features = next(iter(kept.values()))[site]
        output_change.append([0.0, *(relative_change(b.float(), a.float()).item() for a, b in pairwise(features))])
        if stack and schedule.changes:
            input_change.append(next(iter(schedule.changes.values())))
        for branch in kept.values():
            cost = cost + share / len(kept) * l1_cost(
                branch[site], predictor or Taylor(2), path_aware=path_aware, cumulative=cumulative, device=device
            )
            rows, inputs = branch[site], branch.get("input")
            joined = [rows, inputs] if inputs is not None and inputs.shape == rows.shape else rows
            pooled = pooled + share / len(kept) * gram(joined, device=device)
    calibration = Calibration(
        cost,
        np.reshape(np.array(input_change, dtype=float), (-1, num_inference_steps)),
        np.array(output_change),
        pooled,
        np.zeros(0),
        torch.cat(latents).numpy(),
        describe(pipe, num_inference_steps, **call) | purpose(predictor, site, path_aware, cumulative),
        {"prompts": list(prompts), "seeds": seeds, "batch_size": batch_size, "call": call}
        | ({"switches": batch.report.switches} if batch.report.switches else {}),
    )
    if measure_gains:
        calibration.gain = measure_gain(pipe, calibration)
    return calibration


def measure_gain(pipe, calibration: Calibration, points: int = 12, prompts: int = 2) -> np.ndarray:
    """How far the final latents move per unit of feature error at each step, (T,), mean 1.

    A run that skips one step alone and reuses the feature before it makes a known error there, |h_k - h_{k-1}| by the
    Gram matrix, and ends a measured distance from the full-step latents. Measured at `points` steps and interpolated
    on a logarithmic scale between them. It holds the scheduler's step size, the output layers' sensitivity and the
    sampler's own in one figure.
    """
    G, T, site = calibration.gram, len(calibration.cost), calibration.made_for["site"]
    steps = np.unique(np.linspace(1, T - 1, min(points, T - 1)).round().astype(int))
    moved = []
    for step in tqdm(steps, desc="measuring gains", unit="run", leave=False):
        method = Method(Schedule([s for s in range(T) if s != step], T), site, Reuse())
        latents, _ = calibration.rerun(pipe, method, prompts)
        moved.append(np.linalg.norm(latents - calibration.latents[:prompts]))
    error = np.sqrt(np.maximum(G[steps, steps] - 2 * G[steps, steps - 1] + G[steps - 1, steps - 1], 1e-12))
    gain = np.exp(np.interp(np.arange(T), steps, np.log(np.maximum(moved, 1e-12) / error)))
    return gain / gain.mean()
