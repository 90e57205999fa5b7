"""Metrics of accelerated samples: against the full-step reference, the prompts, or a set of real images.

To add one, put a file here whose `METRICS` holds its record, see `eval.metrics.base.Metric`: nothing else lists it.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pkgutil import iter_modules

from dpcache.errors import SettingError
from eval.kept import Kept
from eval.metrics.base import Column, Metric, Samples, Scorer, Settings, Unavailable
from eval.metrics.fidelity import latent_error, psnr, ssim

__all__ = [
    "FINE",
    "MAIN",
    "METRICS",
    "Column",
    "Metric",
    "Samples",
    "Scorer",
    "Settings",
    "Unavailable",
    "check",
    "evaluate",
    "fine_name",
    "latent_error",
    "load",
    "psnr",
    "ssim",
]

log = logging.getLogger(__name__)


def _records() -> Iterator[Metric]:
    for module in iter_modules(__path__):
        if not module.name.endswith("_scorer"):  # a script for an environment of its own
            yield from getattr(import_module(f"{__name__}.{module.name}"), "METRICS", ())


METRICS: dict[str, Metric] = {
    metric.name: metric for metric in sorted(_records(), key=lambda metric: not metric.against_full)
}
"""All metrics by name, those that compare with the full-step run first: the order of the board's columns."""

MAIN = next(metric.name for metric in METRICS.values() if metric.main)
"""The metric that is shown where there is room for one, and that tuning maximises."""


def fine_name(name: str) -> str:
    """What a metric that compares with the full-step run is called where it compares with the fine reference."""
    return f"{name}_fine"


FINE = {
    fine_name(name): Column(
        name=fine_name(name),
        label=f"{metric.label} to the fine reference",
        unit=metric.unit,
        digits=metric.digits,
        higher_is_better=metric.higher_is_better,
    )
    for name, metric in METRICS.items()
    if metric.against_full
}
"""The columns of such metrics."""


def check(names: Iterable[str]) -> None:
    """Raises SettingError for a name that is not in `METRICS`."""
    if unknown := sorted(set(names) - METRICS.keys()):
        raise SettingError(f"unknown metrics {unknown}; choose from {sorted(METRICS)}")


def _line(error: Exception) -> str:
    kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())


def load(
    names: Iterable[str], settings: Settings, require_all: bool = False, kept: Kept | None = None
) -> dict[str, Scorer | Exception]:
    """The scorers of these metrics, for `evaluate`, or the error with which a metric could not be loaded.

    Args:
        kept: scorers that were loaded earlier; they are not loaded again with the same settings.

    Raises SettingError for a name that is not in `METRICS`, for wrong settings and, with `require_all`, if any metric
    could not be loaded, with every reason.
    """
    names, kept = list(names), Kept() if kept is None else kept
    check(names)
    scorers = {}
    for name in names:
        try:
            scorers[name] = kept.get(f"metric {name}", vars(settings), partial(METRICS[name].load, settings))
        except ValueError:
            raise
        except Exception as error:  # if one metric fails, the others still count
            scorers[name] = error
    lost = [f"{name}: {_line(scorer)}" for name, scorer in scorers.items() if isinstance(scorer, Exception)]
    if require_all and lost:
        reasons = " | ".join(lost)
        raise SettingError(f"eval.require_all=true, but {len(lost)} of {len(names)} metrics cannot be had: {reasons}")
    for reason in lost:
        log.warning("unavailable: %s", reason)
    return scorers


def evaluate(
    scorers: Mapping[str, Scorer | Exception], sample: Samples, reference: Samples
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, dict]]:
    """Scores of `sample` against `reference`: `(values, unavailable, details)`.

    `values[name]` holds one float per sample, or a single one for a metric of the whole set, of which `details[name]`
    holds what it says about itself. A metric that could not be loaded, that raises, or yields a value that is not
    finite, is left out of `values` and its reason is one line in `unavailable[name]`; the others still run.

    Raises SettingError when the two were not made from the same prompts.
    """
    if list(sample.prompts) != list(reference.prompts):
        raise SettingError("sample and reference were made from different prompts, so they cannot be compared in pairs")
    values, unavailable, details = {}, {}, {}
    for name, scorer in scorers.items():
        try:
            if isinstance(scorer, Exception):
                raise scorer
            scored = scorer(sample, reference)
            scores, more = scored if isinstance(scored, tuple) else (scored, {})
            scores = scores.double()
            if bad := int((~scores.isfinite()).sum()):
                raise FloatingPointError(f"{bad} of {scores.numel()} values are not finite")
            values[name] = scores.tolist()
            if more:
                details[name] = more
        except Exception as error:  # if one metric fails, the others still count
            unavailable[name] = _line(error)
    return values, unavailable, details
