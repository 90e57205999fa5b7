"""Folders of results of any size, without running a model."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from eval.methods import FULL, records

GAIN = {"plain": 0, "reuse": 1, "forecast": 4, "online": 2, "planned": 7, "learned": 5, "partial": -3, "library": 0}


def make(folder: Path, methods: int, budgets: list[int], models: list[str], prompts: int = 12, seed: int = 0) -> None:
    """Runs of the first `methods` methods at every budget on every model, T = 50, with images of eight prompts. The
    last method computes more than its budget, the timing of every seventh run is not reliable, and in every method the
    second prompt is the worst, by about 12 dB."""
    rng, names = np.random.default_rng(seed), [FULL, *(name for name in records() if name != FULL)][: methods + 1]
    texts = [f"prompt {index}: a lamp on a table" for index in range(prompts)]
    for model in models:
        own, hard = rng.normal(0, 3), rng.normal(0, 2, prompts)
        pictures = _pictures(folder / "pictures" / model, rng)
        for place, name in enumerate(names):
            gain = GAIN.get(records()[name].group.value, 0) + rng.normal(0, 2)
            for budget in budgets if name != FULL else budgets[:1]:
                full, number = name == FULL, place + len(names) * budget
                psnr = 30 + own + gain + 8 * np.log2(budget / 7) + hard + rng.normal(0, 0.7, prompts)
                psnr[1] -= 12
                scores = {"psnr": psnr, "ssim": 1 - 10 ** (-psnr / 12), "latent_error": 10 ** (-psnr / 25)}
                if full:
                    scores = {"psnr": psnr * 0 + 100, "ssim": psnr * 0 + 1, "latent_error": psnr * 0}
                steps = sorted(rng.choice(np.arange(1, 50), budget - 1, replace=False).tolist())
                speed = 1.0 if full else 50 / budget * 0.95 * rng.uniform(0.9, 1)
                run = folder / f"{model}-{name}-K{budget}"
                command = [f"model={model}", f"method={name}", f"budget={budget}", "num_prompts=12"]
                (run / ".hydra").mkdir(parents=True)
                (run / ".hydra" / "overrides.yaml").write_text("".join(f"- {part}\n" for part in command))
                (run / "images").mkdir()
                for index in range(min(prompts, 8)):
                    picture = pictures[index][0 if full else 1 + number % (len(pictures[index]) - 1)]
                    os.link(picture, run / "images" / f"{index:04d}-lamp.png")
                result = {
                    "model": model,
                    "method": name,
                    "label": name,
                    "budget": budget,
                    "num_inference_steps": 50,
                    "seed": 0,
                    "config_hash": "0",
                    "calibration_trajectories": {"statistics": float(place % 3 * 10), "method": float(place % 5)},
                    "computed_steps": 50.0 if full else budget + 3.0 * (place == len(names) - 1),
                    "schedules": [
                        list(range(50)) if full else list(range(budget)) if records()[name].own_grid else [0, *steps]
                    ],
                    "reference": "0",
                    "metrics": {metric: _interval(values) for metric, values in scores.items()},
                    "metrics_unavailable": {},
                    "per_prompt": {"prompts": texts} | {metric: v.tolist() for metric, v in scores.items()},
                    "timing": {
                        "speedup": speed,
                        "transformer_speedup": speed * 1.1,
                        "efficiency": 0.95,
                        "unreliable": None if number % 7 else "the rounds differ by 30 %",
                    },
                    "memory": {"peak_rss": 2**30, "history": 2**20 * (1 + place)},
                    "flops": {"full": 50e9, "cached": (50 if full else budget * 1.01) * 1e9},
                    "versions": {"torch": "2", "python": "3", "processor": "a processor"},
                }
                (run / "result.json").write_text(json.dumps(result))


def _interval(values: np.ndarray) -> dict:
    mean, spread = values.mean(), 2 * values.std() / len(values) ** 0.5
    return {"mean": mean, "ci95": [mean - spread, mean + spread], "n": len(values)}


def _pictures(folder: Path, rng: np.random.Generator) -> list[list[Path]]:
    """Of each of eight prompts the full-step image and ten that are more and more unlike it."""
    folder.mkdir(parents=True)
    x, y = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64))
    found = []
    for prompt in range(8):
        a, b, hue = *rng.uniform(-0.5, 0.5, 2), rng.uniform(0.2, 1, 3)
        found.append([])
        for level in range(11):
            radius = 0.35 + 0.02 * level + 0.1 * np.sin(5 * np.arctan2(y - b, x - a) + prompt + level / 4)
            inside = 1 / (1 + np.exp(40 * (np.hypot(x - a, y - b) - radius)))[..., None]
            image = 235 - 180 * inside * hue + rng.normal(0, 1 + level, (64, 64, 3))
            found[-1].append(folder / f"{prompt}-{level}.png")
            Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(found[-1][-1])
    return found
