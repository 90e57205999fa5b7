"""The step cache: runs a `Method` on a diffusers transformer, counts its steps and times them.

A hook on the transformer opens and closes every step; the site's hooks inside (`sites.py`) ask it what to do. Each
guidance branch that the pipeline names with `cache_context` has its own history and counters.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch._dynamo.decorators import skip

from dpcache.flops import LayerFlops
from dpcache.sites import hooks, model_input

_HOOK = "dpcache"


@dataclass
class Report:
    """What a method did since it was attached, per guidance branch ("default" where the pipeline names none).

    Attributes:
        computed: computed steps of the latest generation.
        computed_counts, predicted_counts: number of computed and of predicted steps of every generation.
        seconds_computed, seconds_predicted: seconds inside the transformer, all generations together.
        history_bytes: memory that the kept features and an online schedule's state take, all branches together.
        equivalents: of a method that also skips parts of steps, what every generation computed, in full steps by FLOPs.
    """

    computed: dict[str, list[int]] = field(default_factory=dict)
    computed_counts: dict[str, list[int]] = field(default_factory=dict)
    predicted_counts: dict[str, list[int]] = field(default_factory=dict)
    seconds_computed: dict[str, float] = field(default_factory=dict)
    seconds_predicted: dict[str, float] = field(default_factory=dict)
    history_bytes: int = 0
    equivalents: dict[str, list[float]] = field(default_factory=dict)

    @property
    def spent(self) -> dict[str, list[float]]:
        """What counts against the budget, of every generation."""
        return self.equivalents or self.computed_counts


class History:
    """The last `length` features as they came, in buffers that are allocated once and reused across generations."""

    def __init__(self, length: int):
        self.buffers: list[torch.Tensor | None] = [None] * length
        self.newest = 0

    def push(self, feature: torch.Tensor) -> None:
        self.newest = (self.newest + 1) % len(self.buffers)
        buffer = self.buffers[self.newest]
        if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != (
            feature.shape,
            feature.dtype,
            feature.device,
        ):
            buffer = self.buffers[self.newest] = torch.empty(feature.shape, dtype=feature.dtype, device=feature.device)
        buffer.copy_(feature)

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


class Context:
    """History and counters of one guidance branch."""

    def __init__(self, name: str):
        self.name = name
        self.step = 0  # of the next call
        self.keys: list[int] = []  # computed so far in this generation
        self.online: dict = {}  # an online schedule's state
        self.state_bytes = 0  # its most in the finished generations
        self.work = 0.0  # full-step equivalents in this generation, where they are counted
        self.generations: list[tuple[list[int], int, float]] = []  # keys, number of steps and work of the finished ones
        self.histories: dict[str, list[History]] = {}
        self.spans: dict[bool, list] = {False: [], True: []}  # skipped? -> what the stopwatch returned
        self.skip = self.verifying = False
        self.weights: tuple[float, ...] | np.ndarray = ()
        self.stack_input = self.run_input = self.output_type = self.channels = None

    def start(self, online: dict) -> None:
        if self.step:
            self.generations.append((self.keys, self.step, self.work))
        self.state_bytes = max(self.state_bytes, self.online_bytes)
        self.step, self.keys, self.online, self.work = 0, [], online, 0.0
        self.verifying = False  # a generation may have broken off right there

    @property
    def online_bytes(self) -> int:
        """Of the online schedule's state."""
        return sum(value.nbytes for value in self.online.values() if isinstance(value, torch.Tensor))


class Contexts(StateManager):
    """diffusers sets the branch's name on it at every `cache_context`, and resets it after every pipeline call."""

    def __init__(self):
        super().__init__(Context)

    def get_state(self) -> Context:
        name = self._context.name if self._context is not None else "default"
        if name not in self._state_cache:
            self._state_cache[name] = Context(name)
        return self._state_cache[name]

    def items(self):
        return self._state_cache.items()


class Stopwatch:
    """The host's clock: `now` is taken before and after a span, `seconds` sums pairs of such."""

    def now(self):
        return time.perf_counter()

    def seconds(self, spans: list) -> float:
        return sum(end - start for start, end in spans)


class CudaStopwatch(Stopwatch):
    """The GPU's clock, by events: the host does not wait for them until it asks for the sum."""

    def now(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, spans):
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / 1000


STOPWATCHES = {"cuda": CudaStopwatch}
"""By type of device; any other takes the host's. To be replaced where there is a device without a clock."""


def stopwatch(device: torch.device) -> Stopwatch:
    """For spans of work on `device`."""
    return STOPWATCHES.get(device.type, Stopwatch)()


class RootHook(ModelHook):
    """On the transformer: opens and closes each step, and with site=output answers for the whole model."""

    _is_stateful = True

    def __init__(self, cache: "StepCache"):
        super().__init__()
        self.cache, self.contexts = cache, cache.contexts

    def reset_state(self, module):
        self.cache.reset()

    @skip
    def new_forward(self, module, *args, **kwargs):
        cache, start = self.cache, self.cache.stopwatch.now()
        context = cache.open()
        with cache.watched():
            output = self._call(module, context, args, kwargs)
        cache.close(start)
        return output

    def _call(self, module, context, args, kwargs):
        cache, method = self.cache, self.cache.method
        if not method.site.startswith("output"):
            return self.fn_ref.original_forward(*args, **kwargs)
        latents, residual = model_input(args, kwargs), method.site == "output_residual"
        cache.decide(module, args, kwargs)
        if method.observe is not None:
            method.observe(context.name, context.step, "input", latents)
        if residual:  # image-to-video models append their condition to the latents' channels
            latents = latents[:, : context.channels]
        if context.skip:
            predicted = cache.predict("output", latents if method.predictor.sees_input else None)
            if context.weights == (1.0,):  # a scheduler may keep it, and the history's buffer is written again
                predicted = predicted.clone()
            predicted = latents + predicted if residual else predicted
            return (predicted,) if context.output_type is tuple else context.output_type(sample=predicted)
        output = self.fn_ref.original_forward(*args, **kwargs)
        context.output_type, feature = type(output), output[0]
        if residual:
            context.channels = feature.shape[1]
            latents = latents[:, : context.channels]
            if feature.shape != latents.shape:
                raise ValueError(
                    f"site=output_residual: the model's input {tuple(latents.shape)} has another shape than its "
                    f"prediction {tuple(feature.shape)}"
                )
            feature = feature - latents
        cache.keep("output", feature)
        return output


@contextmanager
def without_offload(module):
    """Takes accelerate's offload hook off `module` for a moment. It wraps `forward` anew after every pipeline call, so
    a hook of ours outside it would be lost; inside it, ours stays."""
    offload = getattr(module, "_hf_hook", None)
    if offload is None:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    try:
        yield
    finally:
        add_hook_to_module(module, offload)


class StepCache:
    """One method attached to one transformer. `pipe` is its pipeline, or the transformer itself.

    The hooks leave what they wrap to torch.compile, but not these methods: they would be compiled anew for each step.
    """

    def __init__(self, transformer, method, pipe):
        self.transformer, self.method = transformer, method
        self.schedule, self.contexts = method.schedule, Contexts()
        self.current: Context | None = None
        # With offloading the weights wait on the CPU, but the pipeline knows where they will run.
        self.stopwatch = stopwatch(getattr(pipe, "_execution_device", None) or next(transformer.parameters()).device)
        self.scheduler, self.timesteps = getattr(pipe, "scheduler", None), None
        self.final: Report | None = None
        self.partial = method.partial
        self.hooked = []
        self.computed = None if self.schedule.steps is None else frozenset(self.schedule.steps)
        for module, hook in self.hooks():
            with without_offload(module):
                self.hooked.append((module, "_diffusers_hook" in vars(module), vars(module).get("forward")))
                HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _HOOK)
        transformer._diffusers_hook.invalidate_child_registries_cache()
        self.watch = self.watching()  # last: nothing of it stays where a hook cannot be made

    def watching(self) -> LayerFlops | None:
        """What counts the FLOPs of steps that are skipped in parts."""
        return LayerFlops(self.transformer, self.method.costs) if self.partial else None

    def hooks(self) -> list[tuple[torch.nn.Module, ModelHook]]:
        """(module, hook) pairs, in the order in which they are registered."""
        inside = hooks(self.method.site, self.transformer, self, online=self.computed is None)
        return [(self.transformer, RootHook(self)), *inside]

    def detach(self) -> None:
        """Leave every module as it was, its `forward` included, and free the features."""
        self.final = self.report()
        for module, had_registry, forward in reversed(self.hooked):
            with without_offload(module):
                module._diffusers_hook.remove_hook(_HOOK, recurse=False)
                if len(module._diffusers_hook.hooks) == 0:
                    del module.forward
                    if forward is not None:
                        module.forward = forward
                if not had_registry:
                    del module._diffusers_hook
        if hasattr(self.transformer, "_diffusers_hook"):
            self.transformer._diffusers_hook.invalidate_child_registries_cache()
        self.reset()
        for _, context in self.contexts.items():
            context.histories.clear()
        if self.watch is not None:
            self.watch.remove()

    def reset(self) -> None:
        """The next call starts a new generation."""
        for _, context in self.contexts.items():
            context.start({})

    def open(self) -> Context:
        """Begin the next step of the current guidance branch."""
        if self.scheduler is not None and self.scheduler.timesteps is not self.timesteps:
            # Every pipeline call makes a new grid: a sure sign of a new generation, even after one that broke off.
            self.timesteps = self.scheduler.timesteps
            steps = getattr(self.scheduler, "num_inference_steps", None)
            if steps not in (None, self.schedule.num_inference_steps):
                raise ValueError(
                    f"num_inference_steps={steps} in the pipeline call, but the method was made for "
                    f"num_inference_steps={self.schedule.num_inference_steps}"
                )
            if steps is not None and len(self.timesteps) != steps:
                raise ValueError(
                    f"{type(self.scheduler).__name__} calls the model {len(self.timesteps)} times in {steps} steps, "
                    "but a schedule has one call a step: choose another scheduler"
                )
            self.reset()
        context = self.current = self.contexts.get_state()
        if context.step == self.schedule.num_inference_steps:
            context.start({})
        if self.computed is None:
            context.skip = False  # until it is decided
            if context.step == 0:
                context.online = self.schedule.start()
        else:
            self._settle(context, context.step in self.computed)
        return context

    @contextmanager
    def watched(self):
        """Around one call: counts what it computes, where steps are skipped in parts."""
        if self.watch is None:
            yield
            return
        with self.watch.call():
            yield
        if self.partial:
            self.current.work += self.watch.share

    @torch.compiler.disable
    def decide(self, block, args, kwargs) -> None:
        """Where an online schedule looks, it settles the step. Fixed ones have done so in `open`."""
        if self.computed is None:
            self._settle(self.current, self.schedule.decide(self.current, block, args, kwargs))

    def _settle(self, context: Context, compute: bool) -> None:
        context.skip = not compute
        if compute:
            context.keys.append(context.step)
            return
        weights = self.method.weights(tuple(context.keys[-self.method.predictor.history :]), context.step)
        context.weights = weights if self.computed is not None else self.schedule.scale(context, weights)

    def left_out(self, module) -> None:
        """A module that has been called does not run."""
        if self.watch is not None:
            self.watch.forget(module)

    @torch.compiler.disable
    def keep(self, name: str, feature) -> None:
        """Keep a computed feature (a tensor or a tuple of tensors) under `name`."""
        features = feature if isinstance(feature, tuple) else (feature,)
        histories = self.current.histories.get(name)
        if histories is None:
            length = self.method.predictor.history
            histories = self.current.histories[name] = [History(length) for _ in features]
        for history, tensor in zip(histories, features):
            history.push(tensor)
        self.learn(name, feature)
        if self.method.observe is not None:
            self.method.observe(self.current.name, self.current.step, name, feature)

    @torch.compiler.disable
    def learn(self, name: str | int, feature) -> None:
        """An online schedule is told of what a computed step leaves."""
        if self.computed is None:
            self.schedule.learn(self.current, name, feature)

    @torch.compiler.disable
    def predict(self, name: str, seen: torch.Tensor | None = None):
        """The feature kept under `name`, predicted for the current step, from the model's input too if it is given."""
        weights = self.current.weights
        predicted = tuple(history.combine(weights, seen) for history in self.current.histories[name])
        return predicted if len(predicted) > 1 else predicted[0]

    def close(self, start) -> None:
        """End the step: count and time it."""
        context = self.current
        context.spans[context.skip].append((start, self.stopwatch.now()))
        context.step += 1

    def report(self) -> Report:
        if self.final is not None:
            return self.final
        report = Report()
        for name, context in self.contexts.items():
            generations = context.generations + ([(context.keys, context.step, context.work)] if context.step else [])
            report.computed[name] = list(generations[-1][0]) if generations else []
            report.computed_counts[name] = [len(keys) for keys, _, _ in generations]
            report.predicted_counts[name] = [steps - len(keys) for keys, steps, _ in generations]
            if self.partial:
                report.equivalents[name] = [work for _, _, work in generations]
            report.seconds_computed[name] = self.stopwatch.seconds(context.spans[False])
            report.seconds_predicted[name] = self.stopwatch.seconds(context.spans[True])
            kept = [b for histories in context.histories.values() for h in histories for b in h.buffers]
            report.history_bytes += sum(tensor.nbytes for tensor in kept if tensor is not None)
            report.history_bytes += max(context.state_bytes, context.online_bytes)
        return report
