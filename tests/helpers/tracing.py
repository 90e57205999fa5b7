"""What a model looks like, and what runs in it, seen from outside."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpcache.sites import transformer_blocks


def state_of(model):
    return {name: (vars(m).get("forward"), "_diffusers_hook" in vars(m)) for name, m in model.named_modules()}


def count_calls(modules, run) -> list[int]:
    calls = [0] * len(modules)

    def counting(index):
        def hook(module, args, output):
            calls[index] += 1

        return hook

    handles = [module.register_forward_hook(counting(i)) for i, module in enumerate(modules)]
    run()
    for handle in handles:
        handle.remove()
    return calls


def snapshot(model):
    return state_of(model), [(name, list(vars(module))) for name, module in model.named_modules()]


def watched(scheduler) -> bool:
    """Whether somebody listens to the scheduler's steps."""
    return "step" in vars(scheduler) or "_dpcache_watch" in vars(type(scheduler))


def marks(pipe) -> tuple:
    """What a method, a cache of another library or a careless test might leave changed on a pipeline or its class."""
    modules = pipe.transformer.named_modules()
    parts = {name: id(part) for name, part in pipe.components.items()}
    weights = sum(parameter.double().abs().sum().item() for parameter in pipe.transformer.parameters())
    return (
        {name: _runs_its_own(module) for name, module in modules},
        dict(vars(type(pipe))),
        parts,
        weights,
        dict(pipe.scheduler.config),
        watched(pipe.scheduler),
    )


def _runs_its_own(module) -> bool:
    """Whether a call of the module runs the forward of its class, and no hook of diffusers."""
    forward, registry = vars(module).get("forward"), vars(module).get("_diffusers_hook")
    plain = forward is None or getattr(forward, "__func__", None) is type(module).forward
    return plain and not (registry and registry.hooks)


def layers(transformer) -> list[torch.nn.Module]:
    """The linear layers inside the blocks' attentions and feed-forwards."""
    named = [pair for block in transformer_blocks(transformer) for pair in block.named_modules()]
    inside = re.compile(r"(attn|ff|img_mlp|txt_mlp|attention|feed_forward).*\.")
    return [module for name, module in named if isinstance(module, torch.nn.Linear) and inside.match(name)]


@contextmanager
def calls_of(transformer) -> Iterator[list[int]]:
    """Counts by PyTorch's own hooks: for every call of the transformer, how many of its `layers` ran."""
    calls = []

    def begin(module, args):
        calls.append(0)

    def ran(module, args, output):
        calls[-1] += 1

    handles = [m.register_forward_hook(ran) for m in layers(transformer)]
    handles.append(transformer.register_forward_pre_hook(begin))
    yield calls
    for handle in handles:
        handle.remove()


def computed_steps(transformer, calls: list[int], branches, partial: bool = False) -> dict[str, list[int]]:
    """Of each of the `branches`, which take turns: the steps that ran all `layers`. The others ran none of them, or
    with `partial` some."""
    whole, count = len(layers(transformer)), len(branches)
    assert all(ran == whole or (0 < ran < whole if partial else ran == 0) for ran in calls)
    return {branch: [s for s, ran in enumerate(calls[i::count]) if ran == whole] for i, branch in enumerate(branches)}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
