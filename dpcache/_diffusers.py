"""All code that depends on private parts of diffusers, accelerate and torch's compiler.

- Hooks on modules (`HookRegistry`, `ModelHook`): diffusers' own mechanism, so that its offloading, its casting and its
  caches still find theirs while ours are on.
- The name of the guidance branch (`RootHook`), which `cache_context` sets.
- Where a pipeline runs (`execution_device`), and whether its user has stopped it (`interrupted`).
- What a pipeline does to a model's caches at its end (`reset_caches`).
- Which argument and which output of a block is the image's and which the text's (`TransformerBlockRegistry`).
- The names under which models keep their lists of blocks.
- The calls of a scheduler's `step` (`watch_steps`).
- A pipeline's call without the decorator that switches gradients off (`with_gradients`).
"""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as BLOCK_LISTS
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.hooks import StateManager
from diffusers.utils.torch_utils import unwrap_module
from torch._dynamo.decorators import skip

from dpcache.errors import SettingError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    from dpcache.denoisers import Pipe

__all__ = [
    "BLOCK_LISTS",
    "Hook",
    "RootHook",
    "StepListener",
    "add_hook",
    "block_metadata",
    "copy_of_scheduler",
    "execution_device",
    "foreign_forward",
    "forget_children",
    "hook_on",
    "interrupted",
    "leave_uncompiled",
    "other_cache",
    "remove_hook",
    "reset_caches",
    "unwrap_module",
    "watch_steps",
    "watching",
    "with_gradients",
    "without_offload",
]

_NAME = "dpcache"  # of our hooks
_WATCH = "_dpcache_watch"  # the attribute of the class of a scheduler whose steps are watched


def leave_uncompiled(function: Callable) -> Callable:
    """A decorator: the compiler does not compile `function`, but compiles what it calls.
    `torch.compiler.disable(recursive=False)` does the same, but asks the compiler again at every call (PyTorch 2.15):
    this takes a quarter of a millisecond for every block of every step. With `fullgraph=True` the compiler fails with
    the message given here."""
    function = skip(function)
    function._torchdynamo_disable_msg = (
        "a caching method is enabled on this model, and a cache decides at every step: compile without fullgraph=True"
    )
    return function


class Hook(ModelHook):
    """A hook of ours. Its `new_forward` is never compiled: the weights of a prediction change from step to step, and
    every change would compile anew. What it wraps is compiled as before.

    A copy or pickle of a hooked module would still call the original's, so both are refused.
    """

    @property
    def forward(self) -> Callable:
        """What the module does without this hook."""
        return self.fn_ref.original_forward

    def __deepcopy__(self, memo):
        raise SettingError(
            "a model cannot be copied while a caching method is enabled on it: call dpcache.disable first"
        )

    def __reduce_ex__(self, protocol):
        raise SettingError(
            "a model cannot be pickled while a caching method is enabled on it: call dpcache.disable first"
        )


class RootHook(Hook):
    """A hook of ours on a whole model."""

    _is_stateful = True  # so that diffusers looks for a `StateManager` on it, and calls `reset_state`

    def __init__(self):
        super().__init__()
        self.names = StateManager(dict)

    @property
    def branch_name(self) -> str:
        """The name of the guidance branch that the pipeline is about to compute; "default" if it gives none."""
        context = self.names._context
        return "default" if context is None else context.name

    def reset_state(self, module: torch.nn.Module) -> None:
        """A pipeline calls it at its end."""


def execution_device(pipe: "Pipe") -> torch.device | None:
    """The device on which a pipeline runs its models, even if offloading keeps their weights on the CPU. None: `pipe`
    does not tell."""
    return getattr(pipe, "_execution_device", None)


def interrupted(pipe: "DiffusionPipeline") -> bool:
    """Whether a callback has stopped this run of a pipeline before its last step."""
    return getattr(pipe, "_interrupt", False)


def reset_caches(module: torch.nn.Module) -> None:
    """Resets, as a pipeline does at its end, the hooks that keep something from call to call."""
    if hasattr(module, "_reset_stateful_cache"):
        module._reset_stateful_cache()


@contextmanager
def without_offload(module: torch.nn.Module) -> Iterator[None]:
    """Takes accelerate's offload hook off `module` within a `with` block. That hook wraps `forward` anew after every
    pipeline call. So a hook of ours that is put outside of it would be lost; one that is put inside stays."""
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


def hook_on(module: torch.nn.Module, name: str = _NAME) -> ModelHook | None:
    """The hook of this name on `module`, by default ours; None: there is none."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def foreign_forward(kind: type) -> Callable | None:
    """The `forward` of a class of modules, if it was defined in another file than the class: somebody has put it in the
    place of the class's own, as scripts of other caches do. Decorators that use `functools.wraps` are not seen."""
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    forward = vars(owner)["forward"]
    known = getattr(forward, "__module__", None)  # of code that no file holds, None
    return None if known in (None, owner.__module__) else forward


def add_hook(module: torch.nn.Module, hook: Hook) -> None:
    """Put `hook` on `module`, outside of the hooks that are there. Raises SettingError if one of ours is there, and if
    another library has given the module another forward, as cache-dit does, which its `disable_cache` leaves, or has
    given one to the module's class."""
    kind = type(module)
    if hook_on(module) is not None:
        raise SettingError(f"a caching method is already enabled on this {kind.__name__}")
    if foreign := foreign_forward(kind):
        raise SettingError(
            f"the class {kind.__name__} has {foreign.__module__}.{foreign.__qualname__} in place of its own forward: "
            "undo this, or start Python again"
        )
    with without_offload(module):
        forward = vars(module).get("forward")
        if isinstance(forward, types.MethodType) and forward.__func__ is not kind.forward:
            other = f"{forward.__func__.__module__}.{forward.__name__}"
            raise SettingError(
                f"this {kind.__name__} runs {other} instead of its own forward, which another library has left on it: "
                "load the pipeline again"
            )
        hook.had_registry, hook.instance_forward = hasattr(module, "_diffusers_hook"), forward
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _NAME)


def remove_hook(module: torch.nn.Module) -> None:
    """Take our hook off `module`. Hooks that others have put on before or after stay at work and can still be found;
    without any, the module is as it was before `add_hook`."""
    with without_offload(module):
        registry, hook = module._diffusers_hook, hook_on(module)
        index = registry._hook_order.index(_NAME)
        if index + 1 < len(registry._hook_order):
            # The next hook calls ours: as what it wraps, if it has a forward of its own, else as its forward.
            following = registry._fn_refs[index + 1]
            name = "forward" if following.original_forward is None else "original_forward"
            setattr(following, name, hook.forward)
        else:
            module.forward = hook.forward
        del registry.hooks[_NAME], registry._hook_order[index], registry._fn_refs[index]
        if not registry.hooks:
            del module.forward
            if hook.instance_forward is not None:
                module.forward = hook.instance_forward
            if not hook.had_registry:
                del module._diffusers_hook


def forget_children(module: torch.nn.Module) -> None:
    """A registry remembers the registries of its submodules: to be called after hooks came or went below `module`."""
    if hasattr(module, "_diffusers_hook"):
        module._diffusers_hook.invalidate_child_registries_cache()


def other_cache(module: torch.nn.Module) -> str | None:
    """The configuration's name of a cache of diffusers that is enabled on `module`."""
    config = getattr(module, "_cache_config", None)
    return None if config is None else type(config).__name__


def block_metadata(block: torch.nn.Module) -> TransformerBlockMetadata | None:
    """Which argument and which output of a block is which stream; None: diffusers does not know the block."""
    try:
        return TransformerBlockRegistry.get(type(unwrap_module(block)))
    except ValueError:
        return None


class StepListener:
    """Base of listeners to a scheduler's steps, see `watch_steps`."""

    def before_step(self, scheduler: "SchedulerMixin", sample: torch.Tensor, kwargs: dict) -> None:
        """`sample`: the latents that the step starts from; `kwargs` may be changed."""

    def given(self, scheduler: "SchedulerMixin", arguments: dict) -> None:
        """`arguments`: what this step is given, by name; may be changed."""

    def after_step(self, scheduler: "SchedulerMixin", output: "SchedulerOutput | tuple") -> None:
        """`output`: what the scheduler's `step` returned."""


class _Watch:
    """The listeners of a scheduler's steps. The scheduler gets a subclass of its class, whose `step` calls the
    listeners. A copy of the scheduler has the same class, so its steps are watched too: some pipelines step a copy."""

    def __init__(self, scheduler: "SchedulerMixin"):
        self.scheduler, self.own = scheduler, type(scheduler)
        self.signature = inspect.signature(scheduler.step)
        self.listeners: list[tuple[StepListener, bool]] = []  # and whether it is told of copies, too
        self.replaced = vars(scheduler).pop("step", None)  # somebody else's, in the place of the class's
        scheduler.__class__ = self._class()

    def _class(self) -> type:
        @functools.wraps(self.own.step)  # pipelines look for arguments such as `eta`
        def step(scheduler, *args, **kwargs):
            return self.step(scheduler, args, kwargs)

        watched = type(self.own.__name__, (self.own,), {"step": step, "__module__": self.own.__module__, _WATCH: self})
        # A pickle is refused with this name, because no file has such a class.
        watched.__qualname__ = f"{self.own.__name__}, which is watched until dpcache.disable,"
        return watched

    def step(self, scheduler: "SchedulerMixin", args: tuple, kwargs: dict) -> "SchedulerOutput | tuple":
        """A step of the scheduler or of a copy."""
        itself = scheduler is self.scheduler
        original = self.replaced if itself and self.replaced else self.own.step.__get__(scheduler)
        sample = kwargs["sample"] if "sample" in kwargs else args[2] if len(args) > 2 else None
        listeners = [listener for listener, copies in self.listeners if copies or itself]
        for listener in listeners:
            listener.before_step(scheduler, sample, kwargs)
        for listener in listeners:
            if type(listener).given is not StepListener.given:  # binding the arguments takes time
                bound = self.signature.bind(*args, **kwargs)
                listener.given(scheduler, bound.arguments)
                args, kwargs = bound.args, bound.kwargs
        output = original(*args, **kwargs)
        for listener in listeners:
            listener.after_step(scheduler, output)
        return output

    def end(self) -> None:
        """Leave the scheduler as it was."""
        self.scheduler.__class__ = self.own
        if self.replaced:
            vars(self.scheduler).setdefault("step", self.replaced)


def _watch(scheduler: "SchedulerMixin") -> _Watch | None:
    """The watch whose class the scheduler has: its own, or that of what it was copied from."""
    return vars(type(scheduler)).get(_WATCH)


def copy_of_scheduler(scheduler: "SchedulerMixin") -> "SchedulerMixin":
    """A copy in the same state, without listeners."""
    twin = copy.deepcopy(scheduler)
    while watch := _watch(twin):
        twin.__class__ = watch.own
    return twin


def watch_steps(scheduler: "SchedulerMixin", listener: StepListener, copies: bool = False) -> Callable[[], None]:
    """From now on `listener` is called at every `scheduler.step`. Returns a function that ends this; after its last
    listener has ended, the scheduler is as it was before.

    Args:
        copies: whether the listener also hears the steps of the scheduler's copies, with which some pipelines denoise
            something beside the image, such as sound.
    """
    watch = _watch(scheduler)
    if watch is None or watch.scheduler is not scheduler:
        watch = _Watch(scheduler)
    entry = listener, copies
    watch.listeners.append(entry)

    def unwatch() -> None:
        watch.listeners.remove(entry)
        if not watch.listeners and _watch(scheduler) is watch:
            watch.end()

    return unwatch


@contextmanager
def watching(scheduler: "SchedulerMixin", listener: StepListener, copies: bool = False) -> Iterator[None]:
    """`watch_steps` within a `with` block."""
    unwatch = watch_steps(scheduler, listener, copies)
    try:
        yield
    finally:
        unwatch()


@contextmanager
def with_gradients(pipe: "DiffusionPipeline") -> Iterator[None]:
    """Within the `with` block, calls of `pipe` build the graph for gradients, which pipelines of diffusers otherwise
    switch off, but the models' parameters get no gradient. For training quantities outside of the models, such as a
    solver's weights."""
    kind = type(pipe)
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    asked = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
    call = getattr(kind.__call__, "__wrapped__", kind.__call__)
    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        pipe.__class__ = kind
        for parameter in asked:
            parameter.requires_grad_(True)
