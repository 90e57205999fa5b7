"""FLOPs by PyTorch's counter, and how much of a full step a call of the transformer computes."""

import functools
import logging
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode

log = logging.getLogger(__name__)


def attention_flops(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *args,
    out_shape: Sequence[int] | None = None,
    **kwargs,
) -> int:
    """FLOPs of scaled dot-product attention, 4 B H N M D if values are as wide as keys: two matrix products per head; a
    multiplication and its addition count as two. A mask does not reduce the count. Heads that share keys count like
    others.

    Args:
        query, key, value: the shapes (B, H, N, D), (B, H', M, D) and (B, H', M, E).
    """
    *heads, length, width = query
    return 2 * torch.Size(heads).numel() * length * key[-2] * (width + value[-1])


# PyTorch's table leaves some of these out, which ones depends on its version, and in others cannot count shared heads.
# Attention by plain matrix products is no operation of its own and needs no formula.
KERNELS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)
ATTENTION = {getattr(torch.ops.aten, name): attention_flops for name in KERNELS if hasattr(torch.ops.aten, name)}


class FlopCounter(FlopCounterMode):
    """Counts all FLOPs within its `with` block. It does not use PyTorch's table of modules: the tracker of that table
    recurses without end in a model that contains itself, as cache-dit makes them. Every attention kernel counts the
    same; a kernel without a formula causes a warning."""

    def __init__(self):
        super().__init__(display=False, custom_mapping=ATTENTION)
        self.mod_tracker = _Everything()

    def _count_flops(self, func_packet, out, args, kwargs):
        name = str(func_packet)
        if func_packet not in self.flop_registry and ("attention" in name or "attn" in name):
            _warn_uncounted(name)
        return super()._count_flops(func_packet, out, args, kwargs)


@functools.cache  # once per kernel
def _warn_uncounted(name: str) -> None:
    log.warning("FLOPs leave out %s: there is no formula for this kernel of attention", name)


class _Everything(nullcontext):
    parents = frozenset({"Global"})

    def __exit__(self, *_):
        pass


def matrix_layers(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules with a matrix, in the order in which the model names them."""
    layers = [module for module in transformer.modules() if getattr(module, "weight", None) is not None]
    return [module for module in layers if module.weight.ndim > 1]


class LayerFlops:
    """Records which layers run in a call of the transformer, and the size of their inputs.

    The FLOPs of the first call, which every cache computes in full, are counted layer by layer. A layer is a module
    with a matrix; the operations that follow it, up to the next layer, count as part of it, so attention counts for the
    projection just before it. For later calls it is enough to know which layers run, and how much smaller their input
    is.

    The counts are kept for the transformer, so that later runs, such as timed ones, need not count again.

    Args:
        counting: False: only tell which layers run.
    """

    # transformer -> layers and shapes of the inputs -> layer -> (FLOPs, size of its inputs per sample), all its runs in
    # a full step
    _known: ClassVar[MutableMapping] = weakref.WeakKeyDictionary()

    def __init__(self, transformer: torch.nn.Module, counting: bool = True):
        self.layers = tuple(matrix_layers(transformer))
        self.handles = [layer.register_forward_pre_hook(self._begin) for layer in self.layers]
        self.known = self._known.setdefault(transformer, {}) if counting else None
        self.costs, self.counter, self.ran, self.spared = {}, None, [], 0.0

    def _begin(self, layer, args) -> None:
        size = args[0].shape[1:].numel() if args else 1
        self.ran.append((layer, size))
        if self.counter is not None:
            self._charge()
            self.layer, self.size = layer, size

    def _charge(self) -> None:
        """What has been counted since the last layer began is that layer's."""
        total = self.counter.get_total_flops()
        if self.layer is not None:
            flops, size = self.costs.get(self.layer, (0, 0))
            self.costs[self.layer] = flops + total - self.counted, size + self.size
        self.counted = total

    def forget(self, layer: torch.nn.Module) -> None:
        """The layer was just called, but did not run: its hook returned something else."""
        if self.ran and self.ran[-1][0] is layer:
            self.ran.pop()

    def spare(self, flops: float) -> None:
        """The current call computes so many FLOPs less than its layers show."""
        self.spared += flops

    @contextmanager
    def call(self, shapes: tuple) -> Iterator[None]:
        """A `with` block around one call of the transformer. `shapes`: of the inputs of the generation's first call,
        for all its calls, because later calls may leave inputs out and are not computed in full."""
        self.ran.clear()
        self.spared = 0.0
        if self.known is not None:
            self.costs = self.known.setdefault((self.layers, shapes), {})
        if self.costs or self.known is None:
            yield
            return
        self.layer = None
        with FlopCounter() as self.counter:
            try:
                yield
                self._charge()
            except BaseException:
                self.costs.clear()
                raise
            finally:
                self.counter = None

    @property
    def share(self) -> float:
        """The share of a full step's FLOPs that the last call computed."""
        ran = 0.0
        for layer, size in self.ran:
            flops, full = self.costs.get(layer, (0, 1))
            ran += flops * size / full
        return (ran - self.spared) / sum(flops for flops, _ in self.costs.values())

    def remove(self) -> None:
        """Takes the hooks off the layers."""
        for handle in self.handles:
            handle.remove()
