"""FreqCa: Accelerating Image Generation and Editing via Frequency-Aware Caching (Liu et al., arXiv 2510.08669), as in
the authors' code."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dpcache._diffusers import Hook, leave_uncompiled
from dpcache.errors import SettingError
from dpcache.hooks import StreamHook
from dpcache.method import Method
from dpcache.predictors import Hermite, Predictor, Taylor
from dpcache.schedules import EvenlySpaced
from dpcache.sites import Stack, transformer_blocks

if TYPE_CHECKING:
    from dpcache.session import Session


def freqca(
    budget: int,
    num_inference_steps: int,
    transform: str | None = None,
    cutoff: float = 0.1,
    order: int = 2,
    low_order: int = 0,
    scale: float = 0.71,
    warmup: int = 3,
) -> Method:
    """The last block's output in two bands of spatial frequency: the low one is reused, the high one extrapolated with
    scaled Hermite polynomials, between evenly spaced steps.

    The experimental look-ahead of the authors' code (`use_z_cache`), which is off by default, is not implemented.

    Args:
        transform, cutoff: see `Bands`.
        order, low_order, scale: order of the Hermite polynomials in the high band and in the low band, and their
            contraction.
        warmup: steps that are computed first.
    """
    bands = BandWise(Hermite(low_order, max(warmup - 2, 0), scale), Hermite(order, max(warmup - 2, 0), scale))
    return Method(EvenlySpaced(budget, num_inference_steps, warmup), Bands(transform=transform, cutoff=cutoff), bands)


@dataclass(frozen=True)
class BandWise(Predictor):
    """A predictor for each of the two bands that `Bands` keeps."""

    low: Taylor
    high: Taylor

    @property
    def history(self) -> int:
        return max(self.low.history, self.high.history)

    def weights(self, keys: Sequence[int], step: int) -> np.ndarray:
        """(n, 2, 1, 1, 1)."""
        both = [predictor.weights(keys, step) for predictor in (self.low, self.high)]
        table = np.zeros((max(map(len, both)), 2))
        for band, weights in enumerate(both):
            table[len(table) - len(weights) :, band] = weights
        return table[:, :, None, None, None]


@dataclass(frozen=True)
class Bands(Stack):
    """The last block's output (B, N, D), kept as the part of low spatial frequency and the rest, (2, B, N, D).

    For FLUX the authors use the two-dimensional cosine transform of a square image. For Qwen-Image they use the Fourier
    transform along the sequence of all tokens, which works for any image size.

    Args:
        transform: "dct" or "fft"; None: dct where the tokens are a square, else fft.
        cutoff: the highest frequency of the low band, as a share of the highest of all.
    """

    name = "bands"
    transform: str | None = None
    cutoff: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.transform not in (None, "dct", "fft") or not 0 <= self.cutoff <= 1:
            raise SettingError(f"transform={self.transform}, cutoff={self.cutoff}: must be dct or fft, and from 0 to 1")

    def hooks(self, session: "Session", transformer: torch.nn.Module) -> list[tuple[torch.nn.Module, Hook]]:
        pairs, last = super().hooks(session, transformer), transformer_blocks(transformer)[-1]
        return [(module, BandHook(session, self, last) if module is last else hook) for module, hook in pairs]

    def split(self, feature: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (2, B, N, D)."""
        tokens = feature.shape[1]
        side = math.isqrt(tokens)
        if self.transform == "dct" and side**2 != tokens:
            raise SettingError(f"transform=dct: {tokens} tokens are not a square: set method.transform=fft")
        x = feature if feature.dtype == torch.float64 else feature.float()
        if side**2 == tokens and self.transform != "fft":
            low = low_cosines(x, self.cutoff)
        else:
            low = low_frequencies(x, self.cutoff)
        low = low.to(feature.dtype)
        return torch.stack([low, feature - low])


class BandHook(StreamHook):
    """On the last block: keeps its image stream in two bands, and returns the sum of the predicted bands."""

    def __init__(self, session: "Session", site: Bands, block: torch.nn.Module):
        super().__init__(session, block)
        self.site = site
        if self.streams.both:
            raise SettingError(f"site={site.name}: the last {self.block.kind} has two streams to keep")

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        if self.session.current.skip:
            return self.result(self.session.predict("stack").sum(0), self.other_in(args, kwargs))
        output = self.forward(*args, **kwargs)
        self.session.keep("stack", self.site.split(self.image(output)))
        return output


def low_frequencies(x: torch.Tensor, cutoff: float) -> torch.Tensor:
    """The part of x, (B, N, D), with Fourier frequencies along N up to `cutoff` times the highest."""
    frequencies = torch.fft.fftfreq(x.shape[1], device=x.device).abs()
    kept = frequencies <= cutoff * frequencies.max()
    return torch.fft.ifft(torch.fft.fft(x, dim=1) * kept[:, None], dim=1).real


def low_cosines(x: torch.Tensor, cutoff: float) -> torch.Tensor:
    """The part of x, (B, N, D), N tokens in a square, with pairs of cosine frequencies whose length is up to `cutoff`
    times the greatest length."""
    side = math.isqrt(x.shape[1])
    place = torch.arange(side, dtype=x.dtype, device=x.device)
    cosines = torch.cos(math.pi / side * place[:, None] * (place + 0.5)) * (2 / side) ** 0.5
    cosines[0] *= 0.5**0.5  # now orthonormal: row f holds the frequency f
    length = torch.hypot(place[:, None], place)
    kept = length <= cutoff * length.max()
    grid = x.unflatten(1, (side, side))
    spectrum = torch.einsum("fh,gw,bhwd->bfgd", cosines, cosines, grid) * kept[:, :, None]
    return torch.einsum("fh,gw,bfgd->bhwd", cosines, cosines, spectrum).flatten(1, 2)
