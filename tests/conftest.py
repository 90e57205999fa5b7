"""Settings of the tests' processes. The fixtures that tests share are in helpers/fixtures.py."""

import os
from collections import Counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on a busy machine
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config):
    """A process that only hands out tests does not load the libraries, so that those which run them start sooner."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("helpers.fixtures")


def pytest_collection_modifyitems(items):
    """Modules that start programs come first, then those with most tests: a process takes one module at a time, and a
    long one at the end would leave the other processes idle."""
    places = {
        module: (all(getattr(value, "__module__", "") != "helpers.commands" for value in vars(module).values()), -count)
        for module, count in Counter(item.module for item in items).items()
    }
    items.sort(key=lambda item: places[item.module])
