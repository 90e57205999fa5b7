"""Tiny pipelines of diffusers with random weights, and what a cache must do on each (`oracle.py`).

The modules of models add their pipelines to `records.PIPELINES`; a new one is found by itself.
"""

import importlib
import pkgutil

from pipelines.records import PIPELINES, UNBUILT, classes

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")

__all__ = ["PIPELINES", "UNBUILT", "classes"]
