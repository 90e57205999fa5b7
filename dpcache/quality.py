"""The fewest computed steps that reach a quality, found on the calibration prompts."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from dpcache.calibration import Calibration
from dpcache.errors import SettingError
from dpcache.method import Method, Recipe, Runnable, cached
from dpcache.predictors import Reuse
from dpcache.sampler import generate
from dpcache.schedules import EvenlySpaced, OnlineSchedule
from dpcache.session import Report

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)

HIGHEST = 100.0  # dB of identical images, whose PSNR would be infinite; of a distance, that of 1e-5
TRIES = 10  # values of an online method's setting


@dataclass(frozen=True)
class Measure:
    """How close images are to those of all steps.

    Attributes:
        label: what it is called.
        score: from images and full-step images, uint8 (N, H, W, 3) or (N, F, H, W, 3), one value per sample, (N,).
        best: the value for identical images, 0 or 1; the further a value is from it, the worse. None: the values are
            decibels, and more is better.
    """

    label: str
    score: Callable[[np.ndarray, np.ndarray], np.ndarray]
    best: float | None = None

    def decibels(self, value: float) -> float:
        """The value on a decibel scale: more is better, and it compares with errors of the latents in decibels."""
        return value if self.best is None else float(-20 * np.log10(max(abs(self.best - value), 10 ** (-HIGHEST / 20))))

    def value(self, decibels: float) -> float:
        """The inverse of `decibels`."""
        if self.best is None:
            return decibels
        distance = float(10 ** (-decibels / 20))
        return distance if self.best == 0 else self.best - distance

    def text(self, value: float) -> str:
        """The value with its unit or label."""
        return f"{value:.2f} dB" if self.best is None else f"{self.label} {value:.4g}"

    def check(self, wanted: float) -> None:
        """Raises SettingError for a quality outside of the possible range."""
        if self.best is None and not 0 < wanted <= HIGHEST:
            raise SettingError(f"quality={wanted} must be above 0 and at most {HIGHEST:g} dB")
        if self.best is not None and not 0 < wanted < 1:
            raise SettingError(f"quality={wanted} must be above 0 and below 1: it is of {self.label}")


@dataclass(frozen=True)
class Found:
    """A method that reaches the quality.

    Attributes:
        method, budget: the method, and its number of computed steps; for an online method the mean over the prompts,
            rounded.
        measure: of the values in `tried` and `predicted`.
        tried: the quality that was reached, mean over the calibration prompts, by number of computed steps (for an
            online method their mean).
        predicted: by budget, the quality that the simulator and the *other* budgets that were run predict; empty if the
            method has no simulator.
    """

    method: Runnable
    budget: int
    measure: Measure
    tried: dict[float, float]
    predicted: dict[int, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The curve, a line for each number of computed steps."""
        lines = []
        for steps in sorted({*self.tried, *self.predicted}):
            known = [self.measure.text(self.tried[steps])] if steps in self.tried else []
            known += [f"{self.measure.text(self.predicted[steps])} predicted"] if steps in self.predicted else []
            lines.append(f"budget={steps:g}: {', '.join(known)}")
        return lines


class Knob(Protocol):
    """The one setting of a method that decides online.

    Attributes:
        make: the method for a value of the setting. The larger the value, the fewer steps are computed.
        first: the value to begin with.
        setting: what it is called.
        whole: whole numbers only.
    """

    make: Callable[[float], Runnable]
    first: float
    setting: str
    whole: bool


@runtime_checkable
class HasKnob(Protocol):
    """A recipe of a method that decides online."""

    def knob(self, calibration: Calibration) -> Knob | None:
        """Its one setting; None if something else depends on the budget as well. Raises SettingError if the setting is
        given."""
        ...


@runtime_checkable
class Simulated(Protocol):
    """A recipe that can predict, without running the model, how its quality grows with the budget."""

    def promised(self, calibration: Calibration) -> float:
        """Decibels of the final latents with its budget, up to a constant that all budgets share."""
        ...


def psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each image, (N,), of uint8 (N, H, W, 3); of videos (N, F, H, W, 3) the mean
    over frames."""
    error = np.square(images.astype(np.float64) - reference).mean((-3, -2, -1))
    with np.errstate(divide="ignore"):
        decibels = np.minimum(10 * np.log10(255**2 / error), HIGHEST)
    return decibels.reshape(len(images), -1).mean(1)


PSNR = Measure("PSNR (dB)", psnr)


def find_budget(
    pipe: "DiffusionPipeline",
    make: Callable[[int], Recipe],
    calibration: Calibration,
    quality: float,
    measure: Measure = PSNR,
) -> Found:
    """The smallest budget with which the images of the calibration prompts come as close to the full-step ones as
    `quality` says. Quality is assumed to grow with the budget. A budget that the method refuses counts as too small.
    Every budget that is tried is run on all calibration prompts. Which ones are tried depends on the recipe:

    - `Simulated` recipe: the smallest budget that is predicted to be enough, until one budget reaches the quality and
      the one below it does not;
    - online method with one setting (`HasKnob`): values of that setting;
    - others: about log2(T) budgets, by bisection.

    Args:
        make: the recipe for a budget.
        quality: the value of the measure, mean over the prompts, that is to be reached.

    Raises SettingError for a quality outside of its range, if the quality is not reached, for an online method whose
    setting is given, and as the recipes do if they refuse every budget.
    """
    measure.check(quality)
    wanted, T = measure.decibels(quality), calibration.num_inference_steps
    widest = make(T)
    if isinstance(widest, Method) and isinstance(widest.schedule, OnlineSchedule):
        raise SettingError(f"quality={quality}: this method's threshold is given, which leaves nothing to search for")
    calibration.measure(pipe, widest.statistics or ())
    reference, _ = _images(pipe, Method(EvenlySpaced(T, T), "output", Reuse()), calibration)

    def confirm(method: Runnable) -> tuple[float, float]:
        """Its quality on the calibration prompts in decibels, and the mean of the computed steps."""
        images, report = _images(pipe, method, calibration)
        reached, spent = float(measure.score(images, reference).mean()), float(np.mean([*report.spent.values()]))
        log.info("%.4g computed steps reach %s on the calibration prompts", spent, measure.text(reached))
        return measure.decibels(reached), spent

    knob = make((T + 1) // 2).knob(calibration) if isinstance(widest, HasKnob) else None
    if knob is not None:
        found = _by_setting(confirm, knob, quality, measure)
        return replace(found, method=calibration.sign(found.method))
    methods, tried = {}, {}

    @cache
    def promised(budget: int) -> float:
        try:
            recipe = make(budget)
        except SettingError:
            return -np.inf
        return recipe.promised(calibration)

    def predict(budget: int) -> float:
        """What the simulator promises of the final latents, plus how far the images of other budgets were from that."""
        others = [other for other in sorted(tried) if other != budget]
        off = np.interp(budget, others, [tried[other] - promised(other) for other in others]) if others else 0.0
        return float(min(promised(budget) + off, HIGHEST))

    def reaches(budget: int) -> bool:
        try:
            recipe = make(budget)
            calibration.measure(pipe, recipe.statistics or ())
            methods[budget] = recipe.build(pipe, calibration)
            tried[budget], _ = confirm(methods[budget])
        except SettingError:
            if budget == T:
                raise
            return False
        return tried[budget] >= wanted

    simulated, low, high = isinstance(widest, Simulated), 0, T + 1
    while high - low > 1:
        budget = _smallest(lambda budget: predict(budget) >= wanted, low, high) if simulated else (low + high) // 2
        low, high = (low, budget) if reaches(budget) else (budget, high)
    if high > T:
        best = measure.text(measure.value(tried[T]))
        raise SettingError(f"quality={quality} is not reached: with all {T} steps this method is at {best}")
    predicted = {}
    if simulated:
        shown = np.unique(np.geomspace(1, T, 12).round().astype(int)).tolist()
        predicted = {budget: predict(budget) for budget in sorted({*shown, *tried}) if {*tried} - {budget}}
        predicted = {budget: decibels for budget, decibels in predicted.items() if np.isfinite(decibels)}
    tried, predicted = (
        {budget: measure.value(decibels) for budget, decibels in sorted(known.items())} for known in (tried, predicted)
    )
    return Found(calibration.sign(methods[high]), high, measure, tried, predicted)


def _smallest(enough: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number between `low` and `high`, both excluded, that is enough; the largest if none is."""
    while high - low > 2:
        middle = (low + high) // 2
        low, high = (low, middle + 1) if enough(middle) else (middle, high)
    return high - 1


def _by_setting(
    confirm: Callable[[Runnable], tuple[float, float]], knob: Knob, quality: float, measure: Measure
) -> Found:
    """The largest value of the setting that reaches the quality. The first value is doubled or halved until one value
    reaches the quality and another does not. Then their geometric mean is tried, until their computed steps differ by
    half a step or less."""
    enough, short, value, known, tried, wanted = None, None, knob.first, {}, {}, measure.decibels(quality)
    for _ in range(TRIES):
        value = max(round(value), 1) if knob.whole else value
        if value in known:
            break
        known[value] = reached, spent = confirm(knob.make(value))
        tried[round(spent, 2)] = max(reached, tried.get(round(spent, 2), reached))  # several values may spend the same
        enough, short = (value, short) if reached >= wanted else (enough, value)
        if enough is None or short is None:
            value = 2 * enough if enough is not None else short / 2
            continue
        if abs(known[enough][1] - known[short][1]) <= 0.5:
            break
        value = (enough * short) ** 0.5
    if enough is None:
        best = measure.text(measure.value(max(reached for reached, _ in known.values())))
        raise SettingError(f"quality={quality} is not reached: with {knob.setting}={min(known):.3g} it is {best}")
    method, spent = knob.make(enough), known[enough][1]
    method = replace(method, decided={**method.decided, knob.setting: enough, "spent": spent})
    curve = {steps: measure.value(reached) for steps, reached in sorted(tried.items())}
    return Found(method, max(round(spent), 1), measure, curve)


def _images(pipe, method: Runnable, calibration: Calibration) -> tuple[np.ndarray, Report]:
    """Of all calibration prompts, uint8 (N, ...), and what the method did. What it takes is counted in
    `calibration.reran`."""
    call, batches = calibration.made_from["call"], calibration.batches()
    with cached(pipe, method) as session:
        made = [generate(pipe, *batch, method.num_inference_steps, **call).images for batch in batches]
    report = session.report()
    calibration.count(report, [len(prompts) for prompts, _ in batches])
    return np.concatenate(made), report
