"""Pipelines at published widths on a CUDA device that is not there, and a count of the host's waits for it.

PyTorch's fake tensors have a shape, a dtype and a device but no values, so a machine without a GPU can run FLUX.1-dev
on "cuda": operations on mixed devices or dtypes raise as they would there. What the host reads is made up here, see
`Host`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from dpcache.models.architectures import Architecture, architecture
from dpcache.session import STOPWATCHES, Stopwatch
from helpers.families import IMAGE, image_vae, wan_vae

DTYPE = torch.bfloat16
WIDE = {"height": 256, "width": 256}
VIDEO = {"height": 128, "width": 128, "num_frames": 5}


def _like(*shape: int, dtype=DTYPE) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _flux(transformer):
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, None, None, transformer
    )
    pipe.encode_prompt = lambda *_, **__: (_like(1, 512, 4096), _like(1, 768), _like(512, 3))
    return pipe


def _dit(transformer):
    with torch.device("cuda"):
        vae = image_vae()
    vae.decode = lambda latents: SimpleNamespace(sample=_like(len(latents), 3, 256, 256))
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False))


def _hunyuan_video(transformer):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.HunyuanVideoPipeline(None, None, transformer, None, scheduler, None, None)
    mask = torch.ones(1, 256, device="cuda")
    pipe.encode_prompt = lambda *_, **__: (_like(1, 256, 4096), _like(1, 768), mask)
    return pipe


def _wan(transformer):
    pipe = diffusers.WanPipeline(None, None, None, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), transformer)
    pipe.encode_prompt = lambda *_, **__: (_like(1, 512, 4096), _like(1, 512, 4096))
    return pipe


def _wan_i2v(transformer):
    with torch.device("cuda"):
        vae = wan_vae()
    pipe = diffusers.WanImageToVideoPipeline(
        None, None, vae, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=transformer
    )
    pipe.encode_prompt = lambda *_, **__: (_like(1, 512, 4096), _like(1, 512, 4096))
    pipe.encode_image = lambda *_: _like(1, 257, 1280)
    size = 1, 2, 16, 16
    pipe.prepare_latents = lambda *_, **__: (
        _like(1, 16, *size[1:], dtype=torch.float32),
        _like(1, 20, *size[1:], dtype=torch.float32),
    )
    return pipe


def _qwen_image(transformer):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.QwenImagePipeline(scheduler, None, None, None, transformer)
    pipe.encode_prompt = lambda *_, **__: (_like(1, 40, 3584), None)
    return pipe


def _sd3(transformer):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, *[None] * 7)
    pipe.encode_prompt = lambda *_, **__: (_like(1, 333, 4096), _like(1, 333, 4096), _like(1, 2048), _like(1, 2048))
    return pipe


@dataclass(frozen=True)
class Family:
    """A published transformer in its pipeline, without encoders.

    Attributes:
        path: of the transformer on the hub.
        few: what makes it shallow, at full width.
        pipe: puts the transformer into its pipeline.
        input_like_output: whether the transformer's input and output have one shape.
    """

    path: str
    few: Mapping
    pipe: Callable
    call: Mapping
    input_like_output: bool = True

    @property
    def branches(self) -> list[str]:
        """Guidance branches in the order in which the pipeline calls the transformer."""
        return architecture(self.path).branches(self.call)


_BOTH_KINDS = {"num_layers": 1, "num_single_layers": 2}
_TWO = {"num_layers": 2}
# Image-to-video stands for pipelines that run two guidance branches one after the other; the others that can do without
# guidance do, because some caches take one branch alone.
FAMILIES = {
    "FLUX.1-dev": Family("black-forest-labs/FLUX.1-dev", _BOTH_KINDS, _flux, WIDE | {"guidance_scale": 3.5}),
    "DiT-XL/2": Family("facebook/DiT-XL-2-256", _TWO, _dit, {"guidance_scale": 4.0}, False),
    "HunyuanVideo": Family(
        "hunyuanvideo-community/HunyuanVideo",
        _BOTH_KINDS | {"num_refiner_layers": 1},
        _hunyuan_video,
        VIDEO | {"guidance_scale": 6.0},
    ),
    "Wan2.1 T2V 14B": Family("Wan-AI/Wan2.1-T2V-14B-Diffusers", _TWO, _wan, VIDEO | {"guidance_scale": 1.0}),
    "Wan2.1 I2V 14B": Family(
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        _TWO,
        _wan_i2v,
        VIDEO | {"guidance_scale": 5.0, "image": IMAGE},
        input_like_output=False,
    ),
    "Qwen-Image": Family("Qwen/Qwen-Image", _TWO, _qwen_image, WIDE),
    "SD3.5 medium": Family("stabilityai/stable-diffusion-3.5-medium", _TWO, _sd3, WIDE | {"guidance_scale": 5.0}),
}


class Host:
    """Within it there is a fake CUDA device, every wait of the host for it is written down, and what the host reads is
    made up, so that the run goes on: numbers are `answer` (in lists `listed`), integers 0, arrays random between 0.5
    and 1.5. A list of a tensor that has `known` values, as a scheduler's timesteps, is of these.

    A wait is a read of a value (`item`, `tolist`, `bool`), a size that depends on values (`nonzero`), or a copy between
    the host's memory and the device's, indices on the host included; not one to the device that is `non_blocking`.
    `waits` has the name of each, in order. `memory` is what the device has free, in bytes.
    """

    def __init__(self):
        self.answer, self.listed, self.memory, self.waits = 0.5, 0.5, 80 * 2**30, []
        self.random = np.random.default_rng(0)
        self.modes = FakeTensorMode(allow_non_fake_inputs=True), _Operations(self), _Reads(self)

    def number(self, dtype: torch.dtype):
        return True if dtype == torch.bool else self.answer if dtype.is_floating_point else 0

    def array(self, shape, dtype: torch.dtype) -> np.ndarray:
        """In place of a CPU tensor's values."""
        if not dtype.is_floating_point:
            return np.zeros(tuple(shape), int)
        return self.random.uniform(0.5, 1.5, tuple(shape)).astype(str(dtype).removeprefix("torch."))

    def __enter__(self) -> "Host":
        torch._C._ensureCUDADeviceGuardSet()
        self.stack = ExitStack()
        self.stack.enter_context(patch.object(FakeTensor, "tolist", torch.Tensor.tolist))
        self.stack.enter_context(patch.dict(STOPWATCHES, cuda=Stopwatch()))
        self.stack.enter_context(patch.object(torch.cuda, "mem_get_info", lambda device: (self.memory, self.memory)))
        for mode in (*self.modes, torch.no_grad()):
            self.stack.enter_context(mode)
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)


def _on(tensor, kind: str) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == kind


_ATEN = torch.ops.aten
_INDEXED = (_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default)


class _Operations(TorchDispatchMode):
    def __init__(self, host: Host):
        super().__init__()
        self.host = host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        host, kwargs = self.host, kwargs or {}
        if func is _ATEN._local_scalar_dense.default:
            if _on(args[0], "cuda"):
                host.waits.append("item")
                return host.number(args[0].dtype)
            try:
                return func(*args)
            except DataDependentOutputException:
                return host.number(args[0].dtype)
        if func is _ATEN.equal.default and _on(args[0], "cuda"):
            host.waits.append("equal")
            return True
        if func is _ATEN.nonzero.default and isinstance(args[0], FakeTensor):
            if _on(args[0], "cuda"):
                host.waits.append("nonzero")
            return args[0].new_zeros((1, args[0].ndim), dtype=torch.long)
        if func in _INDEXED and _on(args[0], "cuda"):
            host.waits += ["indices to the device" for index in args[1] if _on(index, "cpu")]
        output = func(*args, **kwargs)
        if func is _ATEN._to_copy.default:
            self.copied(args[0], output, kwargs.get("non_blocking"))
        elif func is _ATEN.copy_.default:
            self.copied(args[1], args[0], args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return output

    def copied(self, source, target, non_blocking) -> None:
        if source.device.type != target.device.type and (target.device.type == "cpu" or not non_blocking):
            self.host.waits.append(f"copy to {target.device.type}")


class _Reads(TorchFunctionMode):
    """Of whole tensors, which PyTorch does not dispatch."""

    def __init__(self, host: Host):
        super().__init__()
        self.host = host

    def __torch_function__(self, func, types, args=(), kwargs=None):
        array = func in (torch.Tensor.numpy, torch.Tensor.__array__)
        if not isinstance(args[0] if args else None, FakeTensor) or not (array or func is torch.Tensor.tolist):
            return func(*args, **(kwargs or {}))
        tensor = args[0]
        if tensor.is_cuda:
            if array:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            self.host.waits.append("tolist")
        if array:
            return self.host.array(tensor.shape, tensor.dtype)
        return getattr(tensor, "known", np.full(tuple(tensor.shape), self.host.listed)).tolist()


def _metadata(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((name, _metadata(item)) for name, item in value.items())
    return tuple(map(_metadata, value)) if isinstance(value, (list, tuple)) else value


class Memo:
    """Makes runs short. Fake outputs depend on nothing but the inputs' shapes, dtypes and devices, so a module that has
    run once on such inputs without a wait returns the same outputs again. This is done for the blocks, their parts and
    the embedders. A module runs all the same where something has hooked a module inside it or looks at its operations.
    The hooks of `LayerFlops` on the layers inside are called in any case.
    """

    def __init__(self, host: Host, transformer: torch.nn.Module):
        self.host, self.known = host, {}
        lists = [child for child in transformer.children() if isinstance(child, torch.nn.ModuleList)]
        blocks = [block for blocks in lists for block in blocks]
        parts = [part for block in blocks for part in block.children() if not isinstance(part, torch.nn.ModuleList)]
        for module in [*transformer.children(), *blocks, *parts]:
            if module not in lists:
                run = functools.partial(self.run, module, module.forward, list(module.modules())[1:])
                module.forward = functools.update_wrapper(run, module.forward)  # cache-dit looks at its arguments

    def run(self, module, forward, inside, *args, **kwargs):
        watched = len(_get_current_dispatch_mode_stack()) > 2 or len(_get_current_function_mode_stack()) > 1
        if watched or any(hasattr(layer, "_diffusers_hook") for layer in inside):
            return forward(*args, **kwargs)
        key = module, _metadata(args), _metadata(kwargs)
        if key in self.known:
            output, ran = self.known[key]
            for layer, given in ran:
                for hook in layer._forward_pre_hooks.values():
                    hook(layer, given)
            return output
        ran, before = [], len(self.host.waits)
        handles = [layer.register_forward_pre_hook(lambda layer, given: ran.append((layer, given))) for layer in inside]
        try:
            output = forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if len(self.host.waits) == before:
            self.known[key] = output, ran
        return output


@dataclass
class Call:
    """One call of the transformer: the host's waits in it, and shape, dtype and device of what it returned."""

    waits: list[str]
    output: tuple = ()


@dataclass
class Case:
    """A family's pipeline on the fake device.

    Attributes:
        plain, latents: calls of the transformer and shape of the final latents without a cache.
    """

    host: Host
    family: Family
    pipe: diffusers.DiffusionPipeline
    plain: list[Call] = field(default_factory=list)
    latents: tuple[int, ...] = ()

    @contextmanager
    def calls(self) -> Iterator[list[Call]]:
        """The transformer's calls within."""
        calls, host = [], self.host

        def begin(module, args):
            calls.append(len(host.waits))

        def end(module, args, output):
            calls[-1] = Call(host.waits[calls[-1] :], (tuple(output[0].shape), output[0].dtype, output[0].device))

        transformer = self.pipe.transformer
        handles = [transformer.register_forward_pre_hook(begin), transformer.register_forward_hook(end)]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def _tell_times(scheduler) -> None:
    """Its timesteps and noise levels have values, which fall evenly: libraries' caches compare them."""
    original = scheduler.set_timesteps

    @functools.wraps(original)  # pipelines look at its arguments
    def set_timesteps(*args, **kwargs):
        original(*args, **kwargs)
        steps = len(scheduler.timesteps)
        scheduler.timesteps.known = np.linspace(1000, 1000 / steps, steps)
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas.known = np.linspace(1, 0, steps + 1)

    scheduler.set_timesteps = set_timesteps


def make(host: Host, name: str, deep: bool = False, memo: bool = True) -> Case:
    """Within `host`. `deep`: with all blocks. `memo`: see `Memo`."""
    family = FAMILIES[name]
    transformer = Architecture({**architecture(family.path).config, **({} if deep else family.few)}).build(
        "cuda", DTYPE
    )
    pipe = family.pipe(transformer)
    pipe.set_progress_bar_config(disable=True)
    _tell_times(pipe.scheduler)
    if memo:
        Memo(host, transformer)
    return Case(host, family, pipe)
