"""Full-step trajectories -> path-aware costs, in one safetensors file that knows what it was made for."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from dpcache.gram import gram
from dpcache.method import Method, _transformer, cached
from dpcache.pact import l1_cost
from dpcache.predictors import Predictor, Reuse, Taylor
from dpcache.sampler import generate, sample
from dpcache.schedules import OnlineSchedule, Schedule
from dpcache.sites import modulated_input

_FORMAT = "dpcache calibration 1"


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
    transformer = _transformer(pipe)
    scheduler = {k: v for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    return {
        "model": f"{type(transformer).__name__} {fingerprint(transformer)}",
        "num_inference_steps": str(num_inference_steps),
        "scheduler": json.dumps({"class": type(pipe.scheduler).__name__} | scheduler, sort_keys=True, default=str),
        "resolution": " x ".join(str(call.get(k, "default")) for k in ("num_frames", "height", "width") if k in call),
        "guidance": str({k: v for k, v in sorted(call.items()) if "guidance" in k or "cfg" in k}),
        "dtype": str(transformer.dtype).removeprefix("torch."),
    }


@dataclass
class Calibration:
    """What calibration learned from n full-step trajectories of T steps.

    Attributes:
        cost: path-aware cost tensor (T, T+1, T+1), float64, mean over the samples (arXiv 2602.22654, Eq. 6), of the
            last block's image stream, which alone reaches the output (the authors' code adds the text stream).
        input_change: (n, T) relative L1 change of the first block's modulated input against the step before (0 at
            step 0); n counts batches. Empty (0, T) where the model's modulated input is not known.
        output_change: (n, T) the same for the last block's output.
        gram, output_gram: Gram matrices (T, T) of the last block's output and of the model's prediction, mean over
            samples, guidance branches and elements (`dpcache.gram`).
        gain: (T,) how far the final latents move per unit of feature error at each step (`measure_gain`); empty (0,)
            where it was not asked for.
        latents: the final latents of the trajectories, float32 (n, ...).
        made_for: what `describe` said of the pipeline, and the predictor whose errors `cost` holds.
        made_from: prompts, seeds, batch_size and call (the pipeline's arguments), so that `rerun` can repeat them.
    """

    cost: np.ndarray
    input_change: np.ndarray
    output_change: np.ndarray
    gram: np.ndarray
    output_gram: np.ndarray
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
        """Raises ValueError if the file is not a calibration, FileNotFoundError if there is none."""
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
            raise ValueError(f"{path} is not a calibration file: {error}") from None

    def batches(self, limit: int | None = None) -> list[tuple[list[str], list[int]]]:
        """The (first `limit`) prompts and their seeds as they were batched."""
        prompts, seeds, size = (self.made_from[name] for name in ("prompts", "seeds", "batch_size"))
        prompts, seeds = prompts[:limit], seeds[:limit]
        return [(prompts[i : i + size], seeds[i : i + size]) for i in range(0, len(prompts), size)]

    def rerun(self, pipe, method, limit: int | None = None) -> np.ndarray:
        """Final latents (n, ...) of the calibration's (first `limit`) prompts under `method`; its report then covers
        all of them."""
        steps, call = method.num_inference_steps, self.made_from["call"]
        with cached(pipe, method):
            bar = tqdm(self.batches(limit), desc="trying on the calibration prompts", unit="batch", leave=False)
            latents = [generate(pipe, *batch, steps, decode=False, **call).latents for batch in bar]
        return torch.cat(latents).numpy()

    def check(self, expected: dict[str, str]) -> "Calibration":
        """Itself, if `made_for` agrees with `expected`; else a ValueError that names the fields that differ."""
        differing = [
            f"{name}: made for {self.made_for.get(name)}, this run has {value}"
            for name, value in expected.items()
            if self.made_for.get(name) != value
        ]
        if differing:
            raise ValueError("this calibration was made for something else: " + "; ".join(differing))
        return self


_ARRAYS = ("cost", "input_change", "output_change", "gram", "output_gram", "gain", "latents")


class _Recorder(OnlineSchedule):
    """Computes every step of one generation and records what passes: the features of every guidance branch, and the
    changes of the first one's modulated input."""

    def __init__(self, num_inference_steps: int):
        super().__init__(num_inference_steps)
        self.features: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.states: list[dict] = []

    def start(self):
        self.states.append({"previous": None, "input_change": []})
        return self.states[-1]

    def decide(self, state, step, block, args, kwargs):
        try:
            current = modulated_input(block, args, kwargs)
        except ValueError:  # not known for this model: a calibration without it
            return True
        previous, state["previous"] = state["previous"], current
        state["input_change"].append(0.0 if previous is None else relative_change(current, previous))
        return True

    def keep(self, branch: str, step: int, feature: torch.Tensor) -> None:
        self._put(self.features, branch, step, feature)
        self.branch, self.step = branch, step

    def keep_output(self, module, args, output) -> None:
        """A forward hook of the transformer: runs right after `keep`."""
        self._put(self.outputs, self.branch, self.step, output[0])

    def _put(self, kept, branch, step, tensor):
        if branch not in kept:
            kept[branch] = tensor.new_empty((self.num_inference_steps, *tensor.shape))
        kept[branch][step] = tensor


def relative_change(current: torch.Tensor, previous: torch.Tensor) -> float:
    """mean|current - previous| / mean|previous| (TeaCache, arXiv 2411.19108, Eq. 4)."""
    return ((current - previous).abs().mean() / previous.abs().mean()).item()


def calibrate(
    pipe,
    prompts: Sequence[str],
    num_inference_steps: int = 50,
    predictor: Predictor | None = None,
    seeds: Sequence[int] | None = None,
    batch_size: int = 1,
    measure_gains: bool = False,
    **call,
) -> Calibration:
    """Run `prompts` with every step computed and gather what the methods plan with.

    Only the T features of one batch are held at a time. Where the pipeline has several guidance branches, the costs
    are those of the first (the conditional one), as in the authors' code.

    Args:
        predictor: whose errors `cost` holds; default `Taylor(2)`, the paper's.
        seeds: one per prompt; default 0, 1, ...
        measure_gains: also measure how much an error at each step matters: a dozen more runs of two prompts.
        call: further arguments of the pipeline (height, width, guidance_scale, ...).
    """
    if not prompts:
        raise ValueError("calibration needs at least one prompt")
    predictor = predictor or Taylor(2)
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    transformer = _transformer(pipe)
    cost, grams, output_grams, shares, input_change, output_change, latents = 0.0, [], [], [], [], [], []
    for start in tqdm(range(0, len(prompts), batch_size), desc="calibrating", unit="batch", leave=False):
        chunk = slice(start, start + batch_size)
        share = len(prompts[chunk]) / len(prompts)
        recorder = _Recorder(num_inference_steps)
        method = Method(recorder, "stack", Reuse(), observe=recorder.keep)
        handle = transformer.register_forward_hook(recorder.keep_output)
        try:
            latents.append(sample(pipe, method, prompts[chunk], seeds[chunk], decode=False, **call).latents)
        finally:
            handle.remove()
        features = next(iter(recorder.features.values()))
        cost = cost + share * l1_cost(features, predictor)
        output_change.append([0.0, *(relative_change(b.float(), a.float()) for a, b in pairwise(features))])
        input_change += [recorder.states[0]["input_change"]] if recorder.states[0]["input_change"] else []
        shares += [share / len(recorder.features)] * len(recorder.features)
        grams += [gram(branch) for branch in recorder.features.values()]
        output_grams += [gram(branch) for branch in recorder.outputs.values()]
    calibration = Calibration(
        cost,
        np.reshape(np.array(input_change, dtype=float), (-1, num_inference_steps)),
        np.array(output_change),
        np.tensordot(shares, grams, 1),
        np.tensordot(shares, output_grams, 1),
        np.zeros(0),
        torch.cat(latents).numpy(),
        describe(pipe, num_inference_steps, **call) | {"predictor": repr(predictor)},
        {"prompts": list(prompts), "seeds": seeds, "batch_size": batch_size, "call": call},
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
    G, T = calibration.gram, len(calibration.gram)
    steps = np.unique(np.linspace(1, T - 1, min(points, T - 1)).round().astype(int))
    moved = []
    for step in tqdm(steps, desc="measuring gains", unit="run", leave=False):
        method = Method(Schedule([s for s in range(T) if s != step], T), "stack", Reuse())
        latents = calibration.rerun(pipe, method, prompts)
        moved.append(np.linalg.norm(latents - calibration.latents[:prompts]))
    error = np.sqrt(np.maximum(G[steps, steps] - 2 * G[steps, steps - 1] + G[steps - 1, steps - 1], 1e-12))
    gain = np.exp(np.interp(np.arange(T), steps, np.log(np.maximum(moved, 1e-12) / error)))
    return gain / gain.mean()
