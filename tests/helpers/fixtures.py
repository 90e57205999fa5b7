"""What the tests share, small models above all: a plugin of pytest that conftest.py loads."""

import os

import pytest
import torch
from hypothesis import settings

from dpcache.models.pretrained import load
from helpers.by_hand import lively_dit, lively_flux
from helpers.rollout import MODELS, Rollout
from helpers.tracing import marks

if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

# No limit on an example's seconds: the first one of a test may wait for a library to load on a busy machine.
settings.register_profile("dpcache", deadline=None)
settings.load_profile("dpcache")


@pytest.fixture(scope="session")
def pipe():
    """The embedded model, float32 on the CPU."""
    pipe = load("tiny_flux", "float32", "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def as_loaded(pipe):
    return marks(pipe)


@pytest.fixture(autouse=True)
def the_shared_pipe_stays_as_it_was(request):
    """A test that leaves it changed fails, and not a later one."""
    if "pipe" not in request.fixturenames:
        yield
        return
    pipe, expected = request.getfixturevalue("pipe"), request.getfixturevalue("as_loaded")
    assert marks(pipe) == expected, "an earlier test has changed the shared pipeline"
    yield
    assert marks(pipe) == expected, "this test has changed the shared pipeline"


@pytest.fixture(params=list(MODELS))
def any_rollout(request):
    return Rollout(request.param)


@pytest.fixture
def rollout():
    return Rollout("flux")


@pytest.fixture(scope="module")
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def flux():
    """For the references of `helpers.by_hand`."""
    return lively_flux()


@pytest.fixture(scope="module")
def dit():
    return lively_dit()


@pytest.fixture
def fake_uv(tmp_path, monkeypatch):
    """Makes a `uv` whose environment exists and whose `run` is the given shell command; $5 and $6 are the files."""

    def make(run: str, sync: str = "exit 0"):
        (tmp_path / "uv").write_text(f"#!/bin/sh\nif [ $1 = sync ]; then {sync}; fi\n{run}\n")
        (tmp_path / "uv").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return make
