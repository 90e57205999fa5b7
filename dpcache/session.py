"""A session: one method at work on one pipeline, with everything that belongs to the run and not to the method.

A hook on each denoiser opens and closes every call; the site's hooks inside (`sites.py`) ask the session what to do.
`steps.py` says which step a call belongs to. The calls of a step are its branches (conditional, unconditional, ...),
named by `cache_context` where the pipeline does so, else numbered in order; each has histories and counters of its own.
"""

import functools
import logging
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from dpcache._diffusers import (
    Hook,
    RootHook,
    add_hook,
    forget_children,
    leave_uncompiled,
    other_cache,
    remove_hook,
)
from dpcache.arguments import argument, argument_names
from dpcache.circumstances import check_use, other_times, other_use
from dpcache.denoisers import denoisers
from dpcache.errors import SettingError
from dpcache.flops import LayerFlops
from dpcache.schedules import OnlineSchedule, Staggered, with_first
from dpcache.steps import SchedulerSteps, Steps, TimestepSteps

if TYPE_CHECKING:
    from dpcache.denoisers import Pipe
    from dpcache.method import Method

log = logging.getLogger(__name__)

MOST_CALLS = 8  # of a model in one step; more show that its scheduler is not the one that is watched


@dataclass
class Report:
    """What a method did in a session, per guidance branch ("default" where the pipeline names none).

    Attributes:
        computed: computed steps of the latest generation.
        computed_counts, predicted_counts: number of computed and of predicted steps of every generation.
        seconds_computed, seconds_predicted: seconds inside the transformer, all generations together.
        history_bytes: memory that the kept features and an online schedule's state take, all branches together.
        equivalents: what every generation computed, in full steps by FLOPs; empty unless the method also skips parts of
            steps.
        switches: steps at which a pipeline's second model took over, in all generations.
        input_shape: of the model's input, without the first dimension, which counts samples and guidance branches.
        timesteps: of the latest generation; empty without a scheduler.
    """

    computed: dict[str, list[int]] = field(default_factory=dict)
    computed_counts: dict[str, list[int]] = field(default_factory=dict)
    predicted_counts: dict[str, list[int]] = field(default_factory=dict)
    seconds_computed: dict[str, float] = field(default_factory=dict)
    seconds_predicted: dict[str, float] = field(default_factory=dict)
    history_bytes: int = 0
    equivalents: dict[str, list[float]] = field(default_factory=dict)
    switches: list[int] = field(default_factory=list)
    input_shape: tuple[int, ...] = ()
    timesteps: list[float] = field(default_factory=list)

    @property
    def spent(self) -> dict[str, list[float]]:
        """What counts against the budget, of every generation."""
        return self.equivalents or self.computed_counts

    def __str__(self):
        """A line for every branch, and one for the memory."""
        lines = []
        for name, steps in self.computed.items():
            computed, predicted = sum(self.computed_counts[name]), sum(self.predicted_counts[name])
            each = [(self.seconds_computed[name], computed), (self.seconds_predicted[name], predicted)]
            took = ", a predicted one ".join(f"{1000 * sec / n:.1f} ms" if n else "none" for sec, n in each)
            total = self.computed_counts[name][-1] + self.predicted_counts[name][-1] if steps else 0
            work = f", {self.equivalents[name][-1]:.1f} full steps by FLOPs" if self.equivalents.get(name) else ""
            lines.append(
                f"{name}: {len(steps)} of {total} steps computed{work} {steps}; in the transformer a computed step "
                f"took {took}"
            )
        return "\n".join([*lines, f"kept features: {self.history_bytes / 2**20:.2f} MiB"])


class History:
    """The last `length` features as they came, in buffers that are allocated once and reused across generations."""

    def __init__(self, length: int):
        self.buffers: list[torch.Tensor | None] = [None] * length
        self.newest, self.count = 0, 0

    def clear(self) -> None:
        """A new generation begins: what is kept is not to be used any more."""
        self.count = 0

    def push(self, feature: torch.Tensor) -> None:
        """Raises SettingError if the feature has another shape or dtype than the others of this generation."""
        before = self.buffers[self.newest]
        if self.count and (before.shape, before.dtype) != (feature.shape, feature.dtype):
            raise SettingError(
                f"the kept feature changes from {_say(before)} to {_say(feature)} within a generation, which no "
                "prediction can bridge: choose another site"
            )
        self.newest, self.count = (self.newest + 1) % len(self.buffers), self.count + 1
        buffer = self.buffers[self.newest]
        if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != (
            feature.shape,
            feature.dtype,
            feature.device,
        ):
            with torch.inference_mode(False):  # a tensor that is made there could not be written to elsewhere
                buffer = torch.empty(feature.shape, dtype=feature.dtype, device=feature.device)
            self.buffers[self.newest] = buffer
        buffer.copy_(feature)

    @property
    def shape(self) -> torch.Size:
        """Of the features that are kept."""
        return self.buffers[self.newest].shape

    def combine(self, weights: tuple[float, ...] | np.ndarray, current: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted sum of the newest features (newest last) and, if given, of `current` (its weight comes last),
        accumulated in float32, in the features' dtype. An array (n, D) weighs each entry of the last dimension."""
        newest = self.buffers[self.newest]
        low = newest.dtype in (torch.float16, torch.bfloat16)
        each = isinstance(weights, np.ndarray)
        if each:
            weights = torch.as_tensor(weights, dtype=torch.float32 if low else newest.dtype)
            weights = weights.to(newest.device, non_blocking=True)  # else the host would wait for a GPU
        elif weights == (1.0,):
            return newest
        if current is not None:
            weights, own = weights[:-1], weights[-1]
        if len(weights) > self.count:  # the others are of another model, or of the generation before
            raise SettingError(
                f"a prediction weighs {len(weights)} computed steps where {self.count} are kept: its weights were made "
                "for other computed steps"
            )
        total = newest.float().mul_(weights[-1]) if low else newest * weights[-1]
        for age in range(1, len(weights)):
            older, weight = self.buffers[self.newest - age], weights[-1 - age]
            if each:
                total.addcmul_(older.to(total.dtype), weight)
            else:
                total.add_(older, alpha=weight)
        if current is not None:
            total.add_(current, alpha=own)
        if newest.dtype == torch.float16:
            total.clamp_(-65504, 65504)
        return total.to(newest.dtype)


class Branch:
    """Histories and counters of one guidance branch.

    Args:
        missed: generations before its first one.

    Attributes:
        step: of the current call.
        keys: steps that its model has computed in this generation; what is kept of them is what predictions are made
            of. A pipeline with two models for two ranges of steps begins them anew with the second.
        own_keys: with a `Staggered` schedule, the same of each name, which parts of other steps may have computed, too.
        computed: all computed steps of this generation.
        skip: whether the current call is predicted, or parts of it.
        leader: the first branch of this generation.
        state: of an online schedule, or of a site that keeps one, in this generation.
    """

    def __init__(self, name: str, missed: int):
        self.name = name
        self.step = self.calls = 0
        self.part: Part | None = None
        self.leader = self
        self.keys: list[int] = []
        self.own_keys: dict[str, list[int]] = {}
        self.computed: list[int] = []
        self.state: object = None
        self.state_bytes = 0  # its most in the finished generations
        self.work = 0.0  # full-step equivalents in this generation, where they are counted
        # Computed steps, calls and work of the finished generations, nothing in those that it had no part in.
        self.generations: list[tuple[list[int], int, float]] = [([], 0, 0.0)] * missed
        self.histories: dict[str, list[History]] = {}
        # for computed steps (False) and skipped ones (True): of each stopwatch, the moments before and after the calls
        self.spans: dict[bool, dict[Stopwatch, list]] = {False: defaultdict(list), True: defaultdict(list)}
        self.skip = self.verifying = False
        self.weights: tuple[float, ...] | np.ndarray = ()
        self.signature: tuple | None = None  # of the model's input
        self.input_shapes: tuple | None = None  # of all inputs of the model's first call
        self.kept: frozenset[str] = frozenset()  # names of what a computed call keeps
        self.seen: set[str] = set()  # names of what the current call has kept or predicted so far
        self.stack_input = self.other_input = self.run_input = self.output = None
        self.shapes: list[torch.Size] = []  # of the model's prediction
        self.placeholders: dict = {}

    def start(self) -> None:
        """A new generation begins; the last one may have broken off."""
        self.generations.append((self.computed, self.calls, self.work))
        self.computed, self.calls, self.work, self.signature = [], 0, 0.0, None
        self.enter(None)

    def enter(self, part: "Part | None") -> None:
        """Another model takes over, for which nothing that was kept can be used."""
        self.part, self.keys, self.own_keys, self.kept, self.input_shapes = part, [], {}, frozenset(), None
        self.shapes = []
        self.state_bytes = max(self.state_bytes, self.current_state_bytes)
        self.state, self.verifying = None, False
        self.placeholders.clear()
        for histories in self.histories.values():
            for history in histories:
                history.clear()

    @property
    def current_state_bytes(self) -> int:
        """Memory of the tensors in `state`."""
        values = [] if self.state is None else tree_leaves(vars(self.state))
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


class Stopwatch:
    """The host's clock: `now` is taken before and after a span, `seconds` sums pairs of such."""

    def now(self) -> Any:
        """A moment on this clock."""
        return time.perf_counter()

    def seconds(self, spans: list) -> float:
        """Sum of the spans, pairs of moments, in seconds."""
        return sum(end - start for start, end in spans)


class CudaStopwatch(Stopwatch):
    """The GPU's clock, by events: the host does not wait for them until it asks for the sum."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, spans: list) -> float:
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000


HOST, STOPWATCHES = Stopwatch(), {"cuda": CudaStopwatch()}
"""Stopwatches by type of device. Any other type takes the host's. Tests replace one for a device without a clock."""


def stopwatch(device: torch.device) -> Stopwatch:
    """For spans of work on `device`."""
    return STOPWATCHES.get(device.type, HOST)


class Part:
    """One of a pipeline's denoisers, with its hooks and what counts its FLOPs."""

    def __init__(self, name: str, module: torch.nn.Module):
        self.name, self.module = name, module
        self.input_name = argument_names(module)[0]
        self.watch: LayerFlops | None = None
        self.places: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []  # (parent, name, hooked module)
        self.hooked: list[torch.nn.Module] = []

    def __str__(self):
        return f"{self.name or 'the model'} ({type(self.module).__name__})"

    def input(self, args: tuple, kwargs: dict) -> Any:
        """The noisy latents among the arguments of a call: the first, whatever its name."""
        return argument(0, self.input_name, args, kwargs)


class CallHook(RootHook):
    """On a denoiser: opens and closes each call."""

    def __init__(self, session: "Session", part: Part):
        super().__init__()
        self.session, self.part = session, part

    def reset_state(self, module: torch.nn.Module) -> None:
        self.session.ended()

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        latents = tree_leaves(self.part.input(args, kwargs))[0]  # the call runs on their device
        session, watch = self.session, stopwatch(latents.device)
        start = watch.now()
        branch = session.open(self.part, self.branch_name, args, kwargs)
        try:
            output = session.run(branch, self.forward, args, kwargs)
        finally:
            session.current = None
        session.close(branch, watch, start)
        return output


class Session:
    """One method at work on one pipeline, or on a model alone.

    Args:
        pipe: a diffusers pipeline, or its transformer.
        method: schedule, site and predictor; nothing is written on it.
        observe: called as `observe(branch, step, name, feature)` for every feature that is kept, and at the sites
            `output` and `output_residual` for the model's input ("input") at every step.

    Raises SettingError where the model does not offer the site, or where something else is enabled on it.
    """

    def __init__(self, pipe: "Pipe", method: "Method", observe: Callable | None = None):
        self.method, self.site, self.schedule, self.observe = method, method.site, method.schedule, observe
        # The same keys and steps come back in every generation.
        self.predicted_weights = functools.lru_cache(maxsize=None)(method.predictor.weights)
        self.branches: dict[str, Branch] = {}
        self.current: Branch | None = None
        self.order: list[str] = []  # the branches of this generation's first step
        self.calls: list[str] = []  # the branches that the current step has called so far
        self.step, self.thread, self.generations = 0, None, -1  # generations: those before the current one
        self.online = isinstance(self.schedule, OnlineSchedule)
        self.fixed = None if self.online else frozenset(self.schedule.steps)
        self.computed = self.fixed  # in this generation
        self.staggered = self.schedule if isinstance(self.schedule, Staggered) else None
        self.pipe, self.partial = weakref.ref(pipe), self.site.partial or self.staggered is not None
        self.switches: set[int] = set()
        self.input_shape: tuple[int, ...] = ()
        self.final: Report | None = None
        self.scheduler = getattr(pipe, "scheduler", None)  # the one that `enable` has checked
        self.timesteps: Sequence | torch.Tensor = ()  # of this generation
        self.warned: set[str] = set()
        self.on_detach: list[Callable[[], None]] = []
        self.parts = [Part(name, module) for name, module in denoisers(pipe).items()]
        for part in self.parts:
            self.check_other_caches(part)
        try:
            for part in self.parts:
                self._hook(part)
            self.steps = self._steps(pipe)
        except BaseException:
            self._unhook()
            raise

    def _steps(self, pipe) -> Steps:
        T = self.schedule.num_inference_steps
        if getattr(pipe, "scheduler", None) is None:
            return TimestepSteps(self.parts[0].module, T, self.end_step)
        return SchedulerSteps(pipe, T, self.end_step, self.check_models)

    def check_models(self) -> None:
        """Raises SettingError if the pipeline has got another model since the method was enabled."""
        now = denoisers(self.pipe())
        for part in self.parts:
            if now.get(part.name) is not part.module:
                raise SettingError(
                    f"pipe.{part.name} has been replaced while a method is enabled on it: call dpcache.disable(pipe), "
                    "and enable the method again"
                )

    def check_other_caches(self, part: Part) -> None:
        """Raises SettingError where a cache of diffusers is enabled on the model as well."""
        if other := other_cache(part.module):
            raise SettingError(
                f"diffusers' own cache ({other}) is enabled on {part}: a model takes one cache at a time, so call its "
                "disable_cache() first"
            )

    def hooks(self, part: Part) -> list[tuple[torch.nn.Module, Hook]]:
        """(module, hook) pairs, in the order in which they are registered."""
        return [(part.module, CallHook(self, part)), *self.site.hooks(self, part.module)]

    def watching(self, part: Part) -> LayerFlops | None:
        """What counts the FLOPs of steps that are skipped in parts."""
        return LayerFlops(part.module) if self.partial else None

    def _hook(self, part: Part) -> None:
        for module, hook in self.hooks(part):
            add_hook(module, hook)
            part.hooked.append(module)
        hooked = set(part.hooked)
        part.places = [
            (parent, name, module)
            for parent in part.module.modules()
            for name, module in parent.named_children()
            if module in hooked
        ]
        forget_children(part.module)
        part.watch = self.watching(part)  # last: nothing of it stays where a hook cannot be made

    def _unhook(self) -> None:
        for part in self.parts:
            for module in reversed(part.hooked):
                remove_hook(module)
            forget_children(part.module)
            part.hooked.clear()
            if part.watch is not None:
                part.watch.remove()
                part.watch = None

    def detach(self) -> None:
        """Restores every module and the scheduler as they were, and frees the features."""
        self.final = self.report()
        self._unhook()
        self.steps.detach()
        for undo in self.on_detach:
            undo()
        self.branches.clear()
        self.current = None

    def begin(self) -> None:
        """A new generation."""
        for branch in self.branches.values():
            branch.start()
        self.generations += 1
        self.order, self.calls, self.computed = [], [], self.fixed
        self.step, self.thread = 0, threading.get_ident()
        scheduler = getattr(self.pipe(), "scheduler", None)
        if scheduler is not self.scheduler:
            check_use(self.pipe(), self.method.made_for)
            self.scheduler = scheduler
        self.timesteps = () if scheduler is None else scheduler.timesteps[-self.schedule.num_inference_steps :]
        moved = False
        for part in self.parts:
            self.check_other_caches(part)
            moved |= any(getattr(parent, name, None) is not module for parent, name, module in part.places)
        if moved:  # hooked layers were replaced, as loading a LoRA does
            self._unhook()
            for part in self.parts:
                self._hook(part)

    def warn(self, lines: list[str]) -> None:
        """Once for each line."""
        for line in lines:
            if line not in self.warned:
                self.warned.add(line)
                log.warning(line)

    def ended(self) -> None:
        """The pipeline's call is over."""
        self.steps.ended()
        if "timesteps" in self.method.made_for:  # only now, because on a GPU the host waits for the timesteps
            self.warn(other_times(self.method.made_for, self.listed_timesteps))

    @property
    def listed_timesteps(self) -> list[float]:
        """The timesteps of the latest generation; empty without a scheduler."""
        return self.timesteps.tolist() if torch.is_tensor(self.timesteps) else [float(time) for time in self.timesteps]

    def _check_thread(self) -> None:
        if self.thread != threading.get_ident():
            raise SettingError(
                "the pipeline is used from two threads at once, but its cache follows one generation after the other"
            )

    def end_step(self) -> None:
        """Raises SettingError if the step had other branches than the first one, where no names keep them apart."""
        self._check_thread()
        calls, self.calls = self.calls, []
        unnamed = [name for name in calls if name.startswith("default")]
        expected = [name for name in self.order if name.startswith("default")]
        if self.step and unnamed != expected:
            raise SettingError(
                f"step {self.step} calls {' and '.join(map(str, self.parts))} {len(unnamed)} times and the first step "
                f"{len(expected)} times, and nothing tells which call is which guidance branch: keep the guidance as "
                "it is during a run"
            )
        if self.step == 0:
            self.warn(other_use(self.pipe(), self.method.made_for, self.input_shape, self.order))

    def open(self, part: Part, name: str, args: tuple, kwargs: dict) -> Branch:
        """Begins a call of `part` in a `cache_context` of that name. A fixed schedule decides here whether the call is
        computed; an online one does so later, in `decide`."""
        began, step = self.steps.locate(part.module, args, kwargs)
        if began:
            self.begin()
        self._check_thread()
        self.step = step
        count = sum(call == name or call.startswith(f"{name} #") for call in self.calls)
        if count and name != "default":
            self.steps.repeated(name)
        name = name if count == 0 else f"{name} #{count + 1}"
        self.calls.append(name)
        if len(self.calls) > MOST_CALLS:
            raise SettingError(
                f"{part} was called {len(self.calls)} times without a step of the scheduler: enable the method on the "
                "pipeline that is run"
            )
        if step == 0:
            self.order.append(name)
            self.input_shape = next(_shapes(part.input(args, kwargs)))[0][1:]
        if name not in self.branches:
            self.branches[name] = Branch(name, self.generations)
        branch = self.current = self.branches[name]
        signature = tuple(_shapes(part.input(args, kwargs)))
        if branch.signature not in (None, signature):
            raise SettingError(
                f"the input of {part} changes from {_say_all(branch.signature)} to {_say_all(signature)} at step "
                f"{step}: batch, resolution and dtype have to stay the same within a generation (guidance that is "
                "switched off in mid-run changes the batch)"
            )
        branch.signature, branch.step, branch.leader = signature, step, self.branches[self.order[0]]
        branch.seen.clear()
        if branch.part is not part:
            if branch.part is not None:
                self.switches.add(step)
            branch.enter(part)
            branch.state = self.schedule.start() if self.online else self.site.start()
        if self.online:
            branch.skip = False  # until it is decided
            return branch
        if not branch.keys and step not in self.computed:
            self._compute_instead(branch, part, step)
        self._decided(branch, step in self.computed)
        return branch

    def _compute_instead(self, branch: Branch, part: Part, step: int) -> None:
        """The first step of a pipeline's second model cannot be predicted, see `with_first`. Raises SettingError where
        it is no second model."""
        if not branch.computed:
            raise SettingError(
                f"the guidance branch {branch.name!r} of {part} first appears at step {step}, which the schedule skips"
            )
        self.computed = frozenset(with_first(self.computed, step))

    @torch.compiler.disable
    def decide(self, block: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """An online schedule decides here whether the step is computed. Fixed ones have done so in `open`."""
        if self.online:
            branch = self.current
            self._decided(branch, self.schedule.decide(branch, block, args, kwargs) or not branch.keys)

    def _decided(self, branch: Branch, compute: bool) -> None:
        branch.skip = not compute
        if compute:
            branch.keys.append(branch.step)
            branch.computed.append(branch.step)
            return
        weights = self.predicted_weights(tuple(branch.keys[-self.method.predictor.history :]), branch.step)
        branch.weights = self.schedule.scale(branch, weights) if self.online else weights

    def skips(self, name: str) -> bool:
        """Whether the current call predicts what is kept under `name`."""
        branch = self.current
        return branch.skip and not (self.staggered and self.staggered.refreshes(name, branch.step))

    def left_out(self, module: torch.nn.Module) -> None:
        """Hooks call this when their module is called but does not run, so that its FLOPs do not count."""
        watch = self.current.part.watch
        if watch is not None:
            watch.forget(module)

    def spare(self, flops: float) -> None:
        """Hooks call this when their module computes so many FLOPs less than the layers that run in it show."""
        watch = self.current.part.watch
        if watch is not None:
            watch.spare(flops)

    @torch.compiler.disable
    def keep(self, name: str, feature: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        """Keep a computed feature (a tensor or a tuple of tensors) under `name`."""
        branch = self.current
        self._once(name)
        features = feature if isinstance(feature, tuple) else (feature,)
        histories = branch.histories.get(name)
        if histories is None:
            length = self.method.predictor.history
            histories = branch.histories[name] = [History(length) for _ in features]
        for history, tensor in zip(histories, features):
            history.push(tensor)
        if self.staggered:
            branch.own_keys.setdefault(name, []).append(branch.step)
        self.learn(name, feature)
        if self.observe is not None:
            self.observe(branch.name, branch.step, name, feature)

    @torch.compiler.disable
    def learn(self, name: str | int, feature: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        """Tells an online schedule what a computed step leaves."""
        if self.online:
            self.schedule.learn(self.current, name, feature)

    @torch.compiler.disable
    def predict(self, name: str, seen: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The feature kept under `name`, predicted for the current step, from the model's input too if it is given."""
        branch = self.current
        self._once(name)
        if name not in branch.kept:
            raise SettingError(f"site={self.site.name}: nothing was kept of {name!r} that step {branch.step} asks for")
        histories = branch.histories[name]
        if seen is not None and not all(torch.is_tensor(seen) and seen.shape == history.shape for history in histories):
            shapes = " and ".join(str(tuple(history.shape)) for history in histories)
            has, kind = tuple(seen.shape) if torch.is_tensor(seen) else "a list", type(self.method.predictor).__name__
            raise SettingError(
                f"site={self.site.name}: {kind} sees the model's input, {has}, which has another shape than the "
                f"prediction, {shapes}: choose a predictor that does not see it"
            )
        weights = branch.weights
        if self.staggered:
            own = branch.own_keys[name][-self.method.predictor.history :]
            weights = self.predicted_weights(tuple(own), branch.step)
        predicted = tuple(history.combine(weights, seen) for history in histories)
        return predicted if len(predicted) > 1 else predicted[0]

    def _once(self, name: str) -> None:
        branch = self.current
        if name in branch.seen:
            raise SettingError(
                f"site={self.site.name}: {name!r} of {branch.part} runs twice in one call of the model: choose another "
                "site"
            )
        branch.seen.add(name)

    def run(self, branch: Branch, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """The call itself, with the model's own `forward`."""
        watch = branch.part.watch
        if watch is not None and branch.input_shapes is None:
            branch.input_shapes = tuple(_shapes([args, kwargs]))
        with nullcontext() if watch is None else watch.call(branch.input_shapes):
            output = self.site.call(self, branch, forward, args, kwargs)
        self.check_call(branch)
        return output

    def check_call(self, branch: Branch) -> None:
        """Raises SettingError if the call has not kept or predicted the same names as the branch's first call."""
        if not branch.skip and len(branch.keys) == 1:
            branch.kept = frozenset(branch.seen)
            if self.staggered:
                self.staggered.check(branch.kept.union(self.site.kinds))
        if branch.seen != branch.kept or not branch.seen:
            missing = ", ".join(sorted(branch.kept - branch.seen)) or "what it keeps"
            raise SettingError(
                f"site={self.site.name}: step {branch.step} of {branch.part} does not pass {missing} (layers that a "
                "pipeline leaves out now and then cannot be kept): choose another site"
            )

    def close(self, branch: Branch, watch: Stopwatch, start: Any) -> None:
        """End the call: count and time it."""
        branch.spans[branch.skip][watch].append((start, watch.now()))
        branch.calls += 1
        if branch.part.watch is not None and self.partial:
            branch.work += branch.part.watch.share

    def report(self) -> Report:
        """What has been computed and predicted so far."""
        if self.final is not None:
            return self.final
        report = Report(switches=sorted(self.switches), input_shape=self.input_shape, timesteps=self.listed_timesteps)
        for name, branch in self.branches.items():
            generations = [*branch.generations, (branch.computed, branch.calls, branch.work)]
            report.computed[name] = list(branch.computed)
            report.computed_counts[name] = [len(computed) for computed, _, _ in generations]
            report.predicted_counts[name] = [calls - len(computed) for computed, calls, _ in generations]
            if self.partial:
                report.equivalents[name] = [work for _, _, work in generations]
            report.seconds_computed[name], report.seconds_predicted[name] = (
                sum(watch.seconds(spans) for watch, spans in branch.spans[skipped].items()) for skipped in (False, True)
            )
            kept = [b for histories in branch.histories.values() for h in histories for b in h.buffers]
            report.history_bytes += sum(tensor.nbytes for tensor in kept if tensor is not None)
            report.history_bytes += max(branch.state_bytes, branch.current_state_bytes)
        return report


def _shapes(value):
    """Shape and dtype of every tensor in `value`, a tensor or lists and mappings of tensors."""
    if isinstance(value, torch.Tensor):
        yield tuple(value.shape), value.dtype
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _shapes(part)


def _say(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _say_all(signature: tuple) -> str:
    return " and ".join(f"{shape} {str(dtype).removeprefix('torch.')}" for shape, dtype in signature)
