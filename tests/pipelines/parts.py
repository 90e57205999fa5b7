"""Small parts that several pipelines share, and inputs of their calls."""

import diffusers
import numpy as np
import torch
from PIL import Image

WIDTH = 16  # of text features


def randn(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.long)


def image(size: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size, size, 3), dtype=np.uint8))


def mask(size: int) -> Image.Image:
    """White below the diagonal."""
    return Image.fromarray((np.tri(size) * 255).astype(np.uint8))


def video(frames: int, size: int) -> list[Image.Image]:
    return [image(size, seed) for seed in range(frames)]


def flow(**options) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


TEXT = {"prompt_embeds": randn(1, 7, WIDTH)}
NEGATIVE = {"negative_prompt_embeds": randn(1, 7, WIDTH, seed=6)}
MASKED = TEXT | {"prompt_attention_mask": ones(1, 7)}
NEGATIVE_MASKED = NEGATIVE | {"negative_prompt_attention_mask": ones(1, 7)}
