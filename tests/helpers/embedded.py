"""Calls of the embedded model, the `pipe` of the tests."""

import torch

from dpcache.sampler import generate

CALL = {"height": 64, "width": 64, "max_sequence_length": 12}


def run_once(pipe, steps: int = 10, **call) -> torch.Tensor:
    """Latents of one prompt."""
    return generate(pipe, ["dog"], [0], steps, decode=False, **CALL, **call).latents
