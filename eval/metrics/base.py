"""What a metric is, what it is given, and what it raises when something that it needs is missing."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dpcache.errors import SettingError
from eval.schema import MetricsConfig

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Samples:
    """What a sampler produced for N prompts.

    images: uint8 tensor or array (N, H, W, 3), or videos (N, F, H, W, 3). latents: float tensor (N, ...), or None where
    a sampler has none. prompts: N strings.

    Raises SettingError for images of another dtype or shape, and for lengths that disagree.
    """

    images: Tensor
    latents: Tensor | None
    prompts: list[str]

    def __post_init__(self):
        images = torch.as_tensor(self.images).cpu()
        if images.dtype != torch.uint8 or images.ndim not in (4, 5) or images.shape[-1] != 3:
            raise SettingError(
                f"images must be uint8 (N, H, W, 3) or (N, F, H, W, 3), got {images.dtype} {tuple(images.shape)}"
            )
        sizes = {len(images), len(self.prompts)} | ({len(self.latents)} if self.latents is not None else set())
        if len(sizes) != 1:
            raise SettingError(f"images, latents and prompts must have one length, got lengths {sorted(sizes)}")
        object.__setattr__(self, "images", images)

    @property
    def videos(self) -> Tensor:
        """(N, F, H, W, 3): an image is a video of one frame."""
        return self.images if self.images.ndim == 5 else self.images[:, None]


def pairs(sample: Samples, reference: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of float64 frames (F, 3, H, W) in 0..255: in float32 SSIM's variances of flat regions are rounding noise.
    One image or video at a time, because SSIM and LPIPS keep several filtered copies of their input."""
    if sample.images.shape != reference.images.shape:
        raise SettingError(f"image shapes differ: {tuple(sample.images.shape)} and {tuple(reference.images.shape)}")
    for pair in zip(sample.videos, reference.videos, strict=True):
        yield tuple(frames.permute(0, 3, 1, 2).double() for frames in pair)


@dataclass
class Settings(MetricsConfig):
    """The model's `metrics` settings and frames per second, the folder that keeps features of reference images, and the
    torch device."""

    cache: Path = Path("outputs/features")
    device: str = "cpu"
    fps: float = 16.0


Scorer = Callable[[Samples, Samples], Tensor | tuple[Tensor, dict]]
"""`scorer(sample, reference)`: one value per sample, shape (N,), or one of the whole set, shape (1,), which may come
with a dictionary of what else belongs into the result (counts, a warning)."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """How tables, pictures and the page show one number of a result.

    name: as in `result.json`. label, unit: for readers. digits: after the decimal point. higher_is_better: None where
    this is not known; then no run is called better by it.
    """

    name: str
    label: str
    unit: str = ""
    digits: int = 2
    higher_is_better: bool | None

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True, kw_only=True)
class Metric(Column):
    """One metric of `eval.metrics.METRICS`.

    load: loads what the metric needs and returns its scorer. Raises SettingError for wrong settings, and `Unavailable`,
    or any other error, where something is missing. against_full: whether it compares with the full-step run, which
    itself is then perfect and shown in no picture. main: whether it is the one that is shown where there is room for
    one, and that tuning maximises.
    """

    load: Callable[[Settings], Scorer]
    against_full: bool = False
    main: bool = False


class Unavailable(Exception):
    """Something that a metric needs is missing. The message says what, and how to get it."""


@contextmanager
def placed(network: nn.Module, device: str) -> Iterator[nn.Module]:
    """`network` on `device` within a `with` block, so that between jobs of a sweep the GPU's memory is free for the
    sampler."""
    try:
        yield network.to(device)
    finally:
        network.to("cpu")


@contextmanager
def weights(what: str, command: str) -> Iterator[None]:
    """A `with` block in which weights are loaded. Pickled code in them is refused, whatever the loading library asks
    for. A failure becomes `Unavailable`, with the `command` that fetches `what`. Progress messages are hidden."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    logging.disable(logging.INFO)
    try:
        yield
    except Exception as error:
        raise Unavailable(
            f"{what} cannot be loaded ({type(error).__name__}: {error}); once, with a connection: {command}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
