"""The one sampler interface: prompts and seeds in, images or videos and final latents out, whatever the method."""

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dpcache._diffusers import StepListener, watching
from dpcache.errors import SettingError
from dpcache.method import Runnable, cached
from dpcache.prompts import Prompt
from dpcache.session import Report

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from diffusers.schedulers.scheduling_utils import SchedulerOutput


@dataclass
class Batch:
    """What one pipeline call returned.

    Attributes:
        images: uint8, (B, H, W, 3), of a video pipeline (B, F, H, W, 3); None with `decode=False`.
        latents: the sampler's last latents, float32 on the CPU, (B, ...).
        report: what the caching method did, where there was one.
    """

    images: np.ndarray | None
    latents: torch.Tensor
    report: Report | None = None


def generate(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    decode: bool = True,
    **call,
) -> Batch:
    """One pipeline call. Each sample's noise comes from its own seed alone, so it is the same in every batch.

    Args:
        prompts: of a pipeline that takes class labels, their names or numbers; one `dpcache.Prompt` where the prompt
            comes with images.
        num_inference_steps: steps that are run, also with a `strength` below 1.
        decode: False: stop at the latents (class-to-image pipelines decode nevertheless).
        call: further arguments of the pipeline (height, width, guidance_scale, ...); `negative_prompt` is one string
            for all.

    Raises SettingError for a class label that the pipeline does not know, for an image that cannot be read, for several
    prompts with images, and for arguments that the pipeline refuses.
    """
    if "class_labels" in inspect.signature(pipe.__call__).parameters:
        call["class_labels"] = [class_of(pipe, prompt) for prompt in prompts]
    else:
        call |= _images(pipe, prompts, call)
        call["prompt"] = [str(prompt) for prompt in prompts]
    if isinstance(call.get("negative_prompt"), str):
        call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    listener = _Latents(pipe.scheduler, generators)
    try:
        with watching(pipe.scheduler, listener, copies=True):
            output = pipe(
                num_inference_steps=steps_to_ask_for(num_inference_steps, call.get("strength", 1.0)),
                generator=generators,
                output_type="np" if decode else "latent",
                **call,
            )
    except (ValueError, TypeError, AssertionError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1].name
        if place not in _CHECKS:
            raise
        reason = str(error) or f"{type(error).__name__} in {place}"
        raise SettingError(f"{type(pipe).__name__} does not take these arguments: {reason}") from error
    if listener.latents is None:
        raise SettingError(
            f"{type(pipe).__name__} samples with a copy of its scheduler, which the sampler cannot follow"
        )
    images = None
    if decode:
        images = output.frames if "frames" in output else output.images
        images = (np.asarray(images) * 255).round().astype(np.uint8)
    # Where guidance doubles the batch within the sampler, both halves hold the same latents in the end.
    return Batch(images, listener.latents[: len(seeds)].float().cpu())


_CHECKS = ("check_inputs", "retrieve_timesteps", "set_timesteps")
"""Where pipelines and schedulers of diffusers look at their arguments."""


def class_of(pipe: "DiffusionPipeline", prompt: str) -> int:
    """The class that a prompt names, or whose number it is, for a pipeline that takes classes. Raises SettingError for
    any other prompt."""
    if prompt in pipe.labels:
        return pipe.labels[prompt]
    numbers = pipe.labels.values() or range(pipe.transformer.config.num_embeds_ada_norm)  # of classes without names
    if prompt.isdecimal() and int(prompt) in numbers:
        return int(prompt)
    names = f" ({', '.join(list(pipe.labels)[:10])}, ...)" if pipe.labels else ""
    raise SettingError(f"prompt {prompt!r} is not one of the model's classes {min(numbers)} to {max(numbers)}{names}")


def _images(pipe, prompts: Sequence[str], call: Mapping) -> dict:
    """The images that come with the prompt, by the pipeline's argument."""
    if isinstance(call.get("image"), str):
        raise SettingError(f"image={call['image']}: an image comes with its prompt, dpcache.Prompt(text, image=FILE)")
    if not any(isinstance(prompt, Prompt) for prompt in prompts):
        return {}
    if len(prompts) > 1:  # many pipelines take one image, and would give it to all prompts
        raise SettingError(f"{len(prompts)} prompts in one call, but those with images are sampled with batch_size=1")
    images = prompts[0].load()
    if unknown := images.keys() - inspect.signature(pipe.__call__).parameters.keys():
        raise SettingError(f"{type(pipe).__name__} does not take {', '.join(sorted(unknown))}")
    if both := images.keys() & call.keys():
        raise SettingError(f"{', '.join(sorted(both))} is given twice, with the prompt and for all prompts")
    return images


def steps_to_ask_for(num_inference_steps: int, strength: float) -> int:
    """What a pipeline has to be asked for so that it runs `num_inference_steps`: one that starts from an image runs a
    share of them, its `strength`."""
    if strength >= 1:
        return num_inference_steps
    if strength <= 0:
        raise SettingError(f"strength={strength} must be above 0: a run of no steps has nothing to cache")
    asked = int(num_inference_steps / strength)
    while asked - int(max(asked - asked * strength, 0)) < num_inference_steps:
        asked += 1
    return asked


class _Latents(StepListener):
    """Keeps what the scheduler returned last. Schedulers that draw noise take it from the samples' own `generators`,
    also in pipelines that would leave it to the global one (DiT's)."""

    def __init__(self, scheduler: "SchedulerMixin", generators: list[torch.Generator]):
        self.scheduler, self.generators = scheduler, generators
        self.noisy = "generator" in inspect.signature(scheduler.step).parameters
        self.latents: torch.Tensor | None = None

    def before_step(self, scheduler: "SchedulerMixin", sample: torch.Tensor, kwargs: dict) -> None:
        if self.noisy and kwargs.get("generator") is None:
            kwargs["generator"] = self.generators * (len(sample) // len(self.generators))

    def after_step(self, scheduler: "SchedulerMixin", output: "SchedulerOutput | tuple") -> None:
        if scheduler is self.scheduler:  # not a copy, with which some pipelines step something else beside the image
            self.latents = output[0]


def sample(
    pipe: "DiffusionPipeline",
    method: Runnable,
    prompts: Sequence[str],
    seeds: Sequence[int],
    decode: bool = True,
    observe: Callable | None = None,
    **call,
) -> Batch:
    """`generate` with `method` enabled for the length of the call, and its report. `observe`: see `Session`."""
    with cached(pipe, method, observe) as session:
        batch = generate(pipe, prompts, seeds, method.num_inference_steps, decode, **call)
    batch.report = session.report()
    return batch
