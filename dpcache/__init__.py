"""DPCache: caching-based acceleration of diffusion transformers, planned as a shortest path (arXiv 2602.22654).

The public names are loaded when they are first asked for, so that a wrong setting is answered before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpcache.errors import SettingError

if TYPE_CHECKING:
    from dpcache.by_name import accelerate, recipe
    from dpcache.calibration import Calibration, calibrate
    from dpcache.method import Method, cached, disable, enable, report
    from dpcache.planner import path_cost, plan, plan_all
    from dpcache.prompts import Prompt
    from dpcache.session import Report
    from dpcache.simulated import predict_error

__all__ = [
    "Calibration",
    "Method",
    "Prompt",
    "Report",
    "SettingError",
    "accelerate",
    "cached",
    "calibrate",
    "disable",
    "enable",
    "path_cost",
    "plan",
    "plan_all",
    "predict_error",
    "recipe",
    "report",
]

_MODULES = ("method", "calibration", "planner", "prompts", "session", "by_name", "simulated")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(import_module, (f"{__name__}.{module}" for module in _MODULES)):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
