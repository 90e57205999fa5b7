"""DPCache: caching-based acceleration of diffusion transformers, planned as a shortest path (arXiv 2602.22654)."""

from dpcache.calibration import Calibration, calibrate
from dpcache.method import Method, cached, disable, enable, report
from dpcache.planner import path_cost, plan, plan_all
from dpcache.session import Report

__all__ = [
    "Calibration",
    "Method",
    "Report",
    "cached",
    "calibrate",
    "disable",
    "enable",
    "path_cost",
    "plan",
    "plan_all",
    "report",
]
