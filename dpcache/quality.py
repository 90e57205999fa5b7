"""The smallest budget that reaches a quality, found on the calibration prompts."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import Method, Recipe, Runnable, cached
from dpcache.predictors import Reuse
from dpcache.sampler import generate
from dpcache.schedules import EvenlySpaced

log = logging.getLogger(__name__)

HIGHEST = 100.0  # dB of identical images, whose PSNR would be infinite


@dataclass(frozen=True)
class Found:
    """A method that reaches the quality.

    Attributes:
        method, budget: with so many computed steps.
        tried: of every budget that was tried, the quality in dB of PSNR, mean over the calibration prompts.
    """

    method: Runnable
    budget: int
    tried: dict[int, float]


def psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each image, (N,), of uint8 (N, H, W, 3); of videos (N, F, H, W, 3) the mean
    over frames."""
    error = np.square(images.astype(np.float64) - reference).mean((-3, -2, -1))
    with np.errstate(divide="ignore"):
        decibels = np.minimum(10 * np.log10(255**2 / error), HIGHEST)
    return decibels.reshape(len(images), -1).mean(1)


def find_budget(pipe, make: Callable[[int], Recipe], calibration: Calibration, quality: float) -> Found:
    """The smallest budget with which the images of the calibration prompts come as close to the full-step ones as
    `quality` says, by bisection: quality is taken to grow with the budget. About log2(T) budgets are tried, each on all
    calibration prompts; a budget that the method does not take counts as too small.

    Args:
        make: the recipe for a budget.
        quality: dB of PSNR, mean over the prompts.

    Raises SettingError for a quality that is not above 0 and at most 100, and as the recipes do where no budget is
    taken.
    """
    if not 0 < quality <= HIGHEST:
        raise SettingError(f"quality={quality} must be above 0 and at most {HIGHEST:g} dB")
    T, tried, methods = calibration.num_inference_steps, {}, {}
    reference = _images(pipe, Method(EvenlySpaced(T, T), "output", Reuse()), calibration)

    def reaches(budget: int) -> bool:
        try:
            recipe = make(budget)
            calibration.measure(pipe, recipe.statistics or ())
            methods[budget] = recipe.build(pipe, calibration)
            images = _images(pipe, methods[budget], calibration)
        except SettingError:
            if budget == T:
                raise
            return False
        tried[budget] = float(psnr(images, reference).mean())
        log.info("budget=%s reaches %.2f dB on the calibration prompts", budget, tried[budget])
        return tried[budget] >= quality

    if not reaches(T):
        raise SettingError(f"quality={quality} is not reached: with all {T} steps this method is at {tried[T]:.2f} dB")
    low, high = 0, T
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return Found(methods[high], high, dict(sorted(tried.items())))


def _images(pipe, method: Runnable, calibration: Calibration) -> np.ndarray:
    """Of all calibration prompts, uint8 (N, ...). What it takes is counted in `calibration.reran`."""
    call, batches = calibration.made_from["call"], calibration.batches()
    with cached(pipe, method) as session:
        made = [generate(pipe, *batch, method.num_inference_steps, **call).images for batch in batches]
    calibration.count(session.report(), [len(prompts) for prompts, _ in batches])
    return np.concatenate(made)
