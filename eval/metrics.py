"""Per-sample metrics of accelerated samples against the full-step reference.

A metric is a function `(sample, reference) -> Tensor` with one value per sample, shape (N,), registered in `METRICS`.
A metric of the whole set (FID) returns shape (1,); one that needs no reference ignores it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

MAX_PSNR = 100.0
"""Cap in dB. Identical images have infinite PSNR, which would make every mean infinite. For scale: a 64 x 64 RGB image
that differs by one grey level in one single value has 89 dB, and rounding every value by half a level gives 54 dB."""


@dataclass(frozen=True)
class Samples:
    """What a sampler produced for N prompts.

    images: uint8 tensor or array (N, H, W, 3). latents: float tensor (N, ...), or None where a sampler has none.
    prompts: N strings.

    Raises ValueError for images of another dtype or shape, and for lengths that disagree.
    """

    images: Tensor
    latents: Tensor | None
    prompts: list[str]

    def __post_init__(self):
        images = torch.as_tensor(self.images).cpu()
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
        sizes = {len(images), len(self.prompts)} | ({len(self.latents)} if self.latents is not None else set())
        if len(sizes) != 1:
            raise ValueError(f"images, latents and prompts must have one length, got lengths {sorted(sizes)}")
        object.__setattr__(self, "images", images)


def _pairs(sample: Samples, reference: Samples) -> Iterable[tuple[Tensor, Tensor]]:
    """Pairs of float64 images (1, 3, H, W) in 0..255: in float32 SSIM's variances of flat regions are rounding noise.
    One at a time, because SSIM keeps five filtered copies of its input."""
    if sample.images.shape != reference.images.shape:
        raise ValueError(f"image shapes differ: {tuple(sample.images.shape)} and {tuple(reference.images.shape)}")
    for pair in zip(sample.images, reference.images, strict=True):
        yield tuple(image.permute(2, 0, 1)[None].double() for image in pair)


def psnr(sample: Samples, reference: Samples) -> Tensor:
    """Peak signal-to-noise ratio in dB per image, shape (N,), capped at `MAX_PSNR`. Higher is better."""
    values = [peak_signal_noise_ratio(x, ref, data_range=255.0) for x, ref in _pairs(sample, reference)]
    return torch.stack(values).clamp(max=MAX_PSNR)


def ssim(sample: Samples, reference: Samples) -> Tensor:
    """Structural similarity per image, shape (N,), 1 for identical images: Wang et al. 2004, 11 x 11 Gaussian window.

    Averaged over the windows that lie inside the image, as in the paper and scikit-image; torchmetrics' own average
    takes in a reflected border, which is a third of a 64 x 64 image. NaN for images with a side below 11 pixels.
    """
    options = {"data_range": 255.0, "reduction": "none", "return_full_image": True}
    maps = [structural_similarity_index_measure(x, ref, **options)[1] for x, ref in _pairs(sample, reference)]
    return torch.stack([map_[..., 5:-5, 5:-5].mean() for map_ in maps])


def latent_error(sample: Samples, reference: Samples) -> Tensor:
    """Relative error ||z - z_ref|| / ||z_ref|| of the final latents in float32, shape (N,). Lower is better."""
    if sample.latents is None or reference.latents is None:
        raise ValueError("needs the latents of the sample and of the reference")
    if sample.latents.shape != reference.latents.shape:
        raise ValueError(f"latent shapes differ: {tuple(sample.latents.shape)} and {tuple(reference.latents.shape)}")
    z, z_ref = (s.latents.detach().cpu().float().flatten(1) for s in (sample, reference))
    return (z - z_ref).norm(dim=1) / z_ref.norm(dim=1)


METRICS: dict[str, Callable[[Samples, Samples], Tensor]] = {"psnr": psnr, "ssim": ssim, "latent_error": latent_error}


def check(names: Iterable[str]) -> None:
    """Raises ValueError for a name that is not in `METRICS`."""
    if unknown := sorted(set(names) - METRICS.keys()):
        raise ValueError(f"unknown metrics {unknown}; choose from {sorted(METRICS)}")


def evaluate(
    names: Iterable[str], sample: Samples, reference: Samples
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Scores of `sample` against `reference`: `(values, unavailable)`.

    `values[name]` holds one float per sample. A metric that raises, or yields a value that is not finite, is left out
    of `values` and its reason is one line in `unavailable[name]`; the others still run.

    Raises ValueError for a name that is not in `METRICS`, and when the two were not made from the same prompts.
    """
    names = list(names)
    check(names)
    if list(sample.prompts) != list(reference.prompts):
        raise ValueError("sample and reference were made from different prompts, so they cannot be compared in pairs")
    values, unavailable = {}, {}
    for name in names:
        try:
            scores = METRICS[name](sample, reference).double()
            if bad := int((~scores.isfinite()).sum()):
                raise FloatingPointError(f"{bad} of {scores.numel()} values are not finite")
            values[name] = scores.tolist()
        except Exception as error:  # any failure of a metric must cost that metric only
            unavailable[name] = " ".join(f"{type(error).__name__}: {error}".split())
    return values, unavailable
