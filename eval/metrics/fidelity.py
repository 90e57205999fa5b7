"""Distance to the full-step reference of the same prompt and noise, per image: PSNR, SSIM, error of the latents.

Of a video, the mean over its frames.
"""

import torch
from torch import Tensor

from dpcache.errors import SettingError
from eval.metrics.base import Metric, Samples, pairs


def psnr(sample: Samples, reference: Samples) -> Tensor:
    """Peak signal-to-noise ratio in dB per image, shape (N,), at most `dpcache.quality.HIGHEST`, because that of
    identical images is infinite. For scale: a 64 x 64 RGB image that differs by one grey level in one single value has
    89 dB, and rounding every value by half a level gives 54 dB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # imported here: it takes seconds

    from dpcache.quality import HIGHEST

    options = {"data_range": 255.0, "reduction": "none", "dim": (1, 2, 3)}
    values = [peak_signal_noise_ratio(x, ref, **options) for x, ref in pairs(sample, reference)]
    return torch.stack([frames.clamp(max=HIGHEST).mean() for frames in values])


def ssim(sample: Samples, reference: Samples) -> Tensor:
    """Structural similarity per image, shape (N,), 1 for identical images: Wang et al. 2004, 11 x 11 Gaussian window.

    Averaged over the windows that lie inside the image, as in the paper and scikit-image; torchmetrics' own average
    takes in a reflected border, which is a third of a 64 x 64 image. NaN for images with a side below 11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    options = {"data_range": 255.0, "reduction": "none", "return_full_image": True}
    maps = [structural_similarity_index_measure(x, ref, **options)[1] for x, ref in pairs(sample, reference)]
    return torch.stack([map_[..., 5:-5, 5:-5].mean() for map_ in maps])


def latent_error(sample: Samples, reference: Samples) -> Tensor:
    """Relative error ||z - z_ref|| / ||z_ref|| of the final latents in float32, shape (N,)."""
    if sample.latents is None or reference.latents is None:
        raise SettingError("needs the latents of the sample and of the reference")
    if sample.latents.shape != reference.latents.shape:
        raise SettingError(f"latent shapes differ: {tuple(sample.latents.shape)} and {tuple(reference.latents.shape)}")
    z, z_ref = (s.latents.detach().cpu().float().flatten(1) for s in (sample, reference))
    return (z - z_ref).norm(dim=1) / z_ref.norm(dim=1)


METRICS = (
    Metric(
        name="psnr",
        load=lambda settings: psnr,
        label="PSNR",
        unit="dB",
        higher_is_better=True,
        against_full=True,
        main=True,
    ),
    Metric(name="ssim", load=lambda settings: ssim, label="SSIM", digits=4, higher_is_better=True, against_full=True),
    Metric(
        name="latent_error",
        load=lambda settings: latent_error,
        label="latent error",
        digits=4,
        higher_is_better=False,
        against_full=True,
    ),
)
