"""The one sampler interface: prompts and seeds in, images or videos and final latents out, whatever the method."""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import load_image

from dpcache.method import cached


@dataclass
class Batch:
    """What one pipeline call returned.

    Attributes:
        images: uint8, (B, H, W, 3), of a video pipeline (B, F, H, W, 3); None with `decode=False`.
        latents: the sampler's last latents, float32 on the CPU, (B, ...).
    """

    images: np.ndarray | None
    latents: torch.Tensor


def generate(
    pipe, prompts: Sequence[str], seeds: Sequence[int], num_inference_steps: int, decode: bool = True, **call
) -> Batch:
    """One pipeline call. Each sample's noise comes from its own seed alone, so it is the same in every batch.

    Args:
        prompts: of a pipeline that takes class labels, their names or numbers.
        decode: False: stop at the latents (class-to-image pipelines decode nevertheless).
        call: further arguments of the pipeline (height, width, guidance_scale, ...); `image`, where the pipeline
            starts from one, may be a path, and `negative_prompt` is one string for all.

    Raises ValueError for a class label that the pipeline does not know.
    """
    if "class_labels" in inspect.signature(pipe.__call__).parameters:
        call["class_labels"] = [_class(pipe, prompt) for prompt in prompts]
    else:
        call["prompt"] = list(prompts)
    if isinstance(call.get("image"), str):
        call["image"] = load_image(call["image"])
    if isinstance(call.get("negative_prompt"), str):
        call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with _watched(pipe.scheduler, generators) as last:
        output = pipe(
            num_inference_steps=num_inference_steps,
            generator=generators,
            output_type="np" if decode else "latent",
            **call,
        )
    images = None
    if decode:
        images = output.frames if "frames" in output else output.images
        images = (np.asarray(images) * 255).round().astype(np.uint8)
    # Where guidance doubles the batch within the sampler, both halves hold the same latents in the end.
    return Batch(images, last["latents"][: len(seeds)].float().cpu())


def _class(pipe, prompt: str) -> int:
    if prompt.isdecimal():
        return int(prompt)
    if prompt not in pipe.labels:
        some = ", ".join(list(pipe.labels)[:10])
        raise ValueError(
            f"prompt {prompt!r} is not one of the {len(pipe.labels)} class names of this model ({some}, ...)"
        )
    return pipe.labels[prompt]


@contextmanager
def _watched(scheduler, generators: list[torch.Generator]) -> Iterator[dict[str, torch.Tensor]]:
    """In this context `latents` of the dictionary is what the scheduler returned last. Schedulers that draw noise take
    it from the samples' own `generators`, also in pipelines that would leave it to the global one (DiT's)."""
    step, last = scheduler.step, {}
    noisy = "generator" in inspect.signature(step).parameters

    @functools.wraps(step)  # pipelines look at its arguments
    def watched(model_output, timestep, sample, *args, **kwargs):
        if noisy and kwargs.get("generator") is None:
            kwargs["generator"] = generators * (len(sample) // len(generators))
        output = step(model_output, timestep, sample, *args, **kwargs)
        last["latents"] = output[0]
        return output

    scheduler.step = watched
    try:
        yield last
    finally:
        del scheduler.step  # the class's own shows again


def sample(pipe, method, prompts: Sequence[str], seeds: Sequence[int], decode: bool = True, **call) -> Batch:
    """`generate` with `method` (prepared) attached for the length of the call; `method.report()` tells what it did."""
    with cached(pipe, method):
        return generate(pipe, prompts, seeds, method.num_inference_steps, decode, **call)
