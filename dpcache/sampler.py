"""The one sampler interface: prompts and seeds in, images and final latents out, whatever the method."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpcache.method import cached


@dataclass
class Batch:
    """What one pipeline call returned.

    Attributes:
        images: uint8, (B, H, W, 3); None with `decode=False`.
        latents: the sampler's last latents, float32 on the CPU, (B, ...).
    """

    images: np.ndarray | None
    latents: torch.Tensor


def generate(
    pipe, prompts: Sequence[str], seeds: Sequence[int], num_inference_steps: int, decode: bool = True, **call
) -> Batch:
    """One pipeline call. Each sample's noise comes from its own seed alone, so it is the same in every batch.

    Args:
        call: further arguments of the pipeline (height, width, guidance_scale, ...).
    """
    last = {}

    def remember(pipe, step, timestep, tensors):
        last["latents"] = tensors["latents"]
        return {}

    output = pipe(
        prompt=list(prompts),
        num_inference_steps=num_inference_steps,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        callback_on_step_end=remember,
        output_type="np" if decode else "latent",
        **call,
    )
    images = (output.images * 255).round().astype(np.uint8) if decode else None
    return Batch(images, last["latents"].float().cpu())


def sample(pipe, method, prompts: Sequence[str], seeds: Sequence[int], decode: bool = True, **call) -> Batch:
    """`generate` with `method` (prepared) attached for the length of the call; `method.report()` tells what it did."""
    with cached(pipe, method):
        return generate(pipe, prompts, seeds, method.num_inference_steps, decode, **call)
