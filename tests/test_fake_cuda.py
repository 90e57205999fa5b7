"""Every method on every family at its published width, on a CUDA device that is not there: devices and dtypes agree,
and the host waits for the device only where a method decides. `scripts/fake_cuda.py` writes the waits down."""

import contextlib
import functools
import math
import re
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import dpcache
import eval.schema  # noqa: F401, registers the types of the settings
from baselines.harmonica import HarmoniCa, modules_of
from baselines.library import LibraryCache
from baselines.meancache import MeanErrors
from baselines.sencache import Sensitivities
from baselines.trajectory import Times
from dpcache.calibration import Calibration, record
from dpcache.gram import gram
from dpcache.linear_sampler import read_sampler
from dpcache.method import Method
from dpcache.pact import l1_cost
from dpcache.predictors import Reuse, Taylor
from dpcache.recorded import Recorded, elements_of
from dpcache.sampler import generate, sample
from dpcache.schedules import EvenlySpaced
from dpcache.simulated import SimulatedRuns
from dpcache.simulator import Simulator
from dpcache.statistics import Gain, Gram, InputChange, L1Cost, OutputChange, relative_change
from helpers.fake_cuda import DTYPE, FAMILIES, Host, make

ROOT = Path(__file__).parents[1]
T, K = 6, 4
METHODS = sorted(file.stem for file in (ROOT / "conf/method").glob("*.yaml"))
FOUND = "threshold=0.75"  # of changes that are all read as 0.5
ONE_CANDIDATE = ("planners=[even]", "warmups=[1]")
STEPS = ("steps=[0,1,3,5]",)
GIVEN = {  # what would take a search, or more steps than there are
    "budcache": STEPS,
    "bwcache": (FOUND, "reuse=1"),
    "dbcache": (FOUND,),
    "dbcache_foca": (FOUND,),
    "dbcache_taylorseer": (FOUND,),
    "dicache": (FOUND,),
    "dpcache_lsq": ("predictors=[lsq3]", *ONE_CANDIDATE),
    "dpcache_lsq_output": ("predictors=[lsq3x,lsq3]", *ONE_CANDIDATE),
    "dyweight": ("weights=[[0.9],[-0.1,1.0],[0.1,1.0],[0.0,0.9]]", "scales=[1.0,0.9,1.0,1.1]"),
    "easycache": (FOUND, "warmup=2"),
    "ertacache": ("threshold=1.0",),
    "fastercache": ("skip_range=2",),
    "first_block_cache": (FOUND,),
    "gits": STEPS,
    "lemica": STEPS,
    "magcache": ("threshold=0.5",),
    "oss": STEPS,
    "pab": ("skip_range=2", "timesteps=[-1,1000]"),
    "profilingdit": ("interval=2", "warmup=2", "share=0.5"),
    "seacache": (FOUND,),
    "sencache": (FOUND,),
    "speca": ("threshold=0.5", "shortest=1"),
    "spectrum": ("warmup=3",),
    "teacache": (FOUND, "polynomial=[1.0,0.0]"),
    "toca": ("interval=2",),
}
DIFFUSERS = (
    *("diffusers_taylorseer", "diffusers_taylorseer_lite", "fastercache", "first_block_cache", "magcache", "pab"),
    "seacache",
)
NO_CACHE = "diffusers offers none of its caches for"  # their classes lack its CacheMixin
SAME_SHAPE = "has another shape than its prediction"  # which takes out what the model adds to its input
ONE_AFTER_THE_OTHER = "has one cache for all guidance branches"
VIDEOS = "AsymRnR thins the tokens of videos"
NO_TEXT = "'transformer_blocks_Bn_residual' not found"  # cache-dit: SD3's last block returns no text stream
GUIDED = [name for name, family in FAMILIES.items() if len(family.branches) > 1]
REFUSED = {  # the words in which a method or its library says that it does not take a family, on any device
    **{(name, family): NO_CACHE for name in DIFFUSERS for family in ("DiT-XL/2", "SD3.5 medium")},
    **{(name, "DiT-XL/2"): SAME_SHAPE for name in ("easycache", "ertacache")},
    **{("asymrnr", family): VIDEOS for family in FAMILIES if "ideo" not in family and "Wan" not in family},
    **{(name, family): ONE_AFTER_THE_OTHER for name in ("fastercache", "pab") for family in GUIDED},
    **{(name, "SD3.5 medium"): NO_TEXT for name in ("dbcache_foca", "dbcache_scm", "dbcache_taylorseer")},
}
DECISIONS = {  # the steps at which an online method has to know what the device has found
    "bwcache": lambda step, computed: step > 1 and step - 1 in computed,
    "dicache": lambda step, computed: 0 < step < T - 1,
    "easycache": lambda step, computed: 2 <= step < T - 1,
    "sencache": lambda step, computed: step > 0,
    "speca": lambda step, computed: step == T - 1,
    "teacache": lambda step, computed: 0 < step < T - 1,
}
# Waits in every call after the first, at most. The first also reads timesteps and noise levels, once each, and what
# SeaCache wants to know of FLUX's tokens.
LIBRARIES = {
    "dbcache": 2,
    "dbcache_foca": 2,
    "dbcache_taylorseer": 2,
    "first_block_cache": 1,
    "seacache": 3,
}


@functools.cache
def settings(method: str, steps: int = T, budget: int = K):
    given = [f"method.{setting}" for setting in GIVEN.get(method, ())]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        common = [f"method={method}", f"budget={budget}", f"num_inference_steps={steps}"]
        return compose("config", [*common, *given]).method


@functools.cache
def case(name: str, deep: bool = False):
    """Shared by all methods."""
    host = Host()
    with host:
        made = make(host, name, deep)
        with made.calls() as calls:
            made.latents = generate(made.pipe, ["7"], [0], T, decode=False, **made.family.call).latents.shape
        made.plain = calls
    return made


@functools.cache
def simulated(shape: tuple[int, ...], input_fits: bool, finer: bool) -> np.ndarray:
    """What a simulator has learnt of a made-up trajectory."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(T)
    sampler = read_sampler(scheduler, [{"timestep": t} for t in scheduler.timesteps])
    points = np.random.default_rng(0).normal(size=(1, 2 * T + 1, len(elements_of(math.prod(shape))))).cumsum(1)
    recorded = Recorded(points[:, :T], points[:, T:], sampler, input_fits, finer)
    return Simulator(recorded, np.full(T, 0.1)).pack()


def test_a_schedulers_arithmetic_is_read_on_the_cpu():
    scheduler = FlowMatchEulerDiscreteScheduler()
    with case("FLUX.1-dev").host:
        scheduler.set_timesteps(T, device="cuda")
        assert scheduler.timesteps.is_cuda
        with contextlib.suppress(ValueError):  # made-up numbers are not linear; other devices would be another error
            read_sampler(scheduler, [{"timestep": t} for t in scheduler.timesteps])


def calibration(case) -> Calibration:
    """Of a made-up trajectory, with real numbers: what the planners look at does not depend on a device."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(T, 64, generator=generator).cumsum(0)
    changes = np.full((1, T), 0.5)
    fits = case.family.input_like_output
    output = gram([features, features.flip(0)] if fits else features)
    (router,), count = HarmoniCa(K, T).statistics, len(modules_of(case.pipe.transformer))
    known = {
        router: np.linspace(0, 1, T * count).reshape(T, count)[::-1],
        L1Cost(): l1_cost(features, Taylor(2)),
        L1Cost("output"): l1_cost(features, Taylor(2)),
        InputChange(): changes,
        OutputChange(): changes,
        Gram("stack"): gram(features),
        Gram("output"): output,
        Gain("stack"): np.ones(T),
        Gain("output"): np.ones(T),
        SimulatedRuns(): simulated(case.latents, fits, False),
        SimulatedRuns(finer=4): simulated(case.latents, fits, True),
        MeanErrors((1, 2, 3, 4, 5, 6)): np.ones((6, T, T)),
        Sensitivities(4): np.ones((3, T)),
        Times(): np.linspace(1, 0, T + 1),
    }
    return Calibration(
        {"num_inference_steps": str(T), "guidance": "{}"},
        {"prompts": ["7"], "seeds": [0], "batch_size": 1, "call": dict(case.family.call)},
        {statistic.name: array for statistic, array in known.items()},
        np.ones(case.latents, np.float32),
    )


def run(case, name: str):
    """One generation: the method, its computed steps and the calls of the transformer, branch by branch."""
    host, pipe, call, branches = case.host, case.pipe, case.family.call, case.family.branches
    recipe, made = instantiate(settings(name)), calibration(case)
    with host:
        host.listed = 15.0 if name == "seacache" else 0.5  # it reads the last row and column of FLUX's tokens
        made.measure(pipe, recipe.statistics or ())
        method = recipe.build(pipe, made)
        with case.calls() as calls:
            report = sample(pipe, method, ["7"], [0], decode=False, **call).report
    return method, report.computed, {branch: calls[i :: len(branches)] for i, branch in enumerate(branches)}


def cells():
    """Every method with every family; in the normal suite with FLUX.1-dev and DiT-XL/2 in turn."""
    for name, usual in zip(METHODS, cycle(("FLUX.1-dev", "DiT-XL/2"))):
        for family in FAMILIES:
            marks = [] if family == usual else pytest.mark.ci
            yield pytest.param(name, family, False, marks=marks, id=f"{name}-{family}")
        yield pytest.param(name, "FLUX.1-dev", True, marks=pytest.mark.slow, id=f"{name}-FLUX.1-dev with all blocks")


@pytest.mark.parametrize("name, family, deep", cells())
def test_devices_and_dtypes_agree_and_the_host_waits_at_decisions_alone(name, family, deep):
    if name.startswith("dbcache"):
        pytest.importorskip("cache_dit")
    one = case(family, deep)
    if (name, family) in REFUSED:
        with pytest.raises((ValueError, AssertionError), match=re.escape(REFUSED[name, family])):
            run(one, name)
        return
    method, computed, calls = run(one, name)
    steps = method.num_inference_steps
    assert list(calls) == list(computed) and all(len(made) == steps for made in calls.values())
    for place, (branch, made) in enumerate(calls.items()):
        # As a computed step's: shape, dtype, device. A predicted one may lie otherwise in memory.
        assert {call.output for call in made} == {one.plain[0].output}
        waits = [len(call.waits) for call in made]
        if isinstance(method, LibraryCache):
            assert waits[0] <= LIBRARIES.get(name, 0) + 3 and max(waits[1:]) <= LIBRARIES.get(name, 0)
        elif name in DECISIONS and not (name in ("easycache", "sencache") and place):  # whose first branch decides
            assert waits == [int(DECISIONS[name](step, computed[branch])) for step in range(steps)]
        else:
            assert waits == [0] * steps
    if name != "full" and steps == T:  # not on a grid of its own
        assert all(0 < len(keys) < T for keys in computed.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_models_themselves_do_not_wait(name):
    assert [call.waits for call in case(name).plain] == [[]] * len(case(name).plain)
    assert {call.output[1:] for call in case(name).plain} == {(DTYPE, torch.device("cuda", 0))}


@pytest.mark.parametrize("name", FAMILIES)
def test_calibration_stays_on_the_device(name):
    one = case(name)
    with one.host:
        made = dpcache.calibrate(one.pipe, ["7"], T, **one.family.call)
    assert made.cost.shape == (T, T + 1, T + 1) and made[Gram("stack")].shape == (T, T)
    assert made[InputChange()].shape == made[OutputChange()].shape == (1, T)
    assert made.latents.shape == one.latents


def test_calibration_at_the_output_and_its_gains():
    one = case("FLUX.1-dev")
    with one.host:
        made = dpcache.calibrate(one.pipe, ["7"], T, [Gain("output")], **one.family.call)
    assert made[Gram("output")].shape == (2 * T, 2 * T) and made[Gain("output")].shape == (T,)


def test_features_that_do_not_fit_on_the_device_are_kept_by_the_host():
    one = case("FLUX.1-dev")
    method = Method(EvenlySpaced(T, T), "stack", Reuse())
    with one.host as host:
        kept = record(one.pipe, method, ["7"], [0], **one.family.call)[1]["cond"]["stack"]
        assert kept.is_cuda and kept.dtype == DTYPE
        try:
            host.memory = 0
            kept = record(one.pipe, method, ["7"], [0], **one.family.call)[1]["cond"]["stack"]
        finally:
            host.memory = 80 * 2**30
        assert kept.device.type == "cpu" and kept.dtype == DTYPE
        assert l1_cost(kept, Taylor(2), device="cuda").shape == (T, T + 1, T + 1)
        assert gram(kept, device="cuda").shape == (T, T)


@pytest.mark.parametrize("statistic, waits", [(gram, 1), (lambda features: l1_cost(features, Taylor(2)), 5)])
def test_statistics_wait_as_often_for_large_features_as_for_small_ones(statistic, waits):
    with Host() as host:
        for size in (2**10, 2**16):
            features = torch.randn(T, size, device="cuda", dtype=DTYPE)
            host.waits.clear()
            statistic(features)
            assert len(host.waits) == waits


def test_relative_changes_do_not_wait():
    with Host() as host:
        change = relative_change(*torch.randn(2, 3, 8, device="cuda", dtype=DTYPE))
        assert change.is_cuda and not host.waits
        change.item()
        assert host.waits == ["item"]


def test_the_host_counts_every_kind_of_wait():
    with Host() as host:
        x = torch.randn(4, device="cuda")
        bool(x.sum() > 0), x.tolist(), (x > 0).nonzero(), x.cpu(), torch.ones(4).to("cuda"), x[torch.arange(2)]
        assert host.waits == [
            "item",
            "tolist",
            "nonzero",
            "copy to cpu",
            "copy to cuda",
            "indices to the device",
        ]
        host.waits.clear()
        x + 1, x.to(DTYPE), x[x.long()], torch.ones(4).to("cuda", non_blocking=True), torch.ones(4).sum().item()
        assert not host.waits
        with pytest.raises(RuntimeError, match="device"):
            x + torch.ones(4)
