"""What is kept from a computed step, and where it is put back on a skipped one: hooks on the transformer.

| site       | kept                                                   | a skipped step still runs                    |
|------------|--------------------------------------------------------|----------------------------------------------|
| `stack`    | the last block's image stream                          | time embedder and output layers (*)          |
| `residual` | that stream minus the first block's input              | embedders and output layers                  |
| `modules`  | each attention and feed-forward output before its gate | embedders, norms, gates, sums, output layers |
| `output`   | the model's prediction                                 | nothing                                      |

(*) and the other embedders, where `EMBEDDERS` does not say that they feed the blocks alone.

Each hook asks the step cache (`cache.py`) whether the current step is skipped, and otherwise leaves the module alone.
With torch.compile a hook must not be traced, but what it wraps must. `torch.compiler.disable(recursive=False)` says so,
too, but asks the compiler again at every call (PyTorch 2.15): a quarter of a millisecond for every block of every step.
"""

from operator import attrgetter

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.utils.torch_utils import unwrap_module
from torch._dynamo.decorators import skip

SITES = ("stack", "residual", "modules", "output")

# Per block class, the modules whose outputs are the block's attention and feed-forward branches before their gates,
# and those that only feed them. FLUX's and HunyuanVideo's single-stream blocks have one fused output projection. Not
# every block of Stable Diffusion 3 has all of its kind's.
_DOUBLE_STREAM = (("attn", "ff", "ff_context"), ())
_SINGLE_STREAM = (("proj_out",), ("attn", "proj_mlp"))
BRANCHES = {
    "FluxTransformerBlock": _DOUBLE_STREAM,
    "FluxSingleTransformerBlock": _SINGLE_STREAM,
    "HunyuanVideoTransformerBlock": _DOUBLE_STREAM,
    "HunyuanVideoSingleTransformerBlock": _SINGLE_STREAM,
    "BasicTransformerBlock": (("attn1", "ff"), ()),
    "JointTransformerBlock": (("attn", "attn2", "ff", "ff_context"), ()),
    "QwenImageTransformerBlock": (("attn", "img_mlp", "txt_mlp"), ()),
    "WanTransformerBlock": (("attn1", "attn2", "ffn"), ()),
}

# Per transformer class, the embedders whose outputs nothing but the blocks reads; the time embedder is never one.
EMBEDDERS = {
    "FluxTransformer2DModel": ("x_embedder", "context_embedder", "pos_embed"),
    "DiTTransformer2DModel": ("pos_embed",),
    "HunyuanVideoTransformer3DModel": ("x_embedder", "context_embedder", "rope"),
    "WanTransformer3DModel": (
        "patch_embedding",
        "condition_embedder.time_proj",
        "condition_embedder.text_embedder",
        "condition_embedder.image_embedder",  # of image-to-video models alone
        "rope",
    ),
}


def transformer_blocks(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer's blocks in the order in which they run. Raises ValueError where there are none."""
    blocks = [
        block
        for name, children in unwrap_module(transformer).named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(children, torch.nn.ModuleList)
        for block in children
    ]
    if not blocks:
        raise ValueError(f"{type(transformer).__name__} has no transformer blocks: use site=output")
    return blocks


class _Hook(ModelHook):
    def __init__(self, cache):
        super().__init__()
        self.cache = cache


class BlockHook(_Hook):
    """Skips a block: its image and text streams pass through. The first block is where online schedules decide, the
    last one where the feature is kept and put back.

    Only the image stream is kept, because no model reads the text stream after its last block.
    """

    def __init__(self, cache, block, first: bool, last: bool, residual: bool):
        super().__init__(cache)
        self.first, self.last, self.residual = first, last, residual
        try:
            self.metadata = TransformerBlockRegistry.get(type(unwrap_module(block)))
        except ValueError:
            raise ValueError(f"{type(block).__name__} is not in diffusers' block registry: use site=output") from None

    @skip
    def new_forward(self, module, *args, **kwargs):
        if self.first:
            self.cache.decide(module, args, kwargs)
        context = self.cache.current
        if not context.skip:
            if self.first and self.residual:
                context.stack_input = self._stream("hidden_states", args, kwargs)
            output = self.fn_ref.original_forward(*args, **kwargs)
            if self.last:
                stream = output if torch.is_tensor(output) else output[self.metadata.return_hidden_states_index]
                self.cache.keep("stack", stream - context.stack_input if self.residual else stream)
                context.stack_input = None
            return output
        stream = self._stream("hidden_states", args, kwargs)
        if self.last:
            predicted = self.cache.predict("stack")
            stream = stream + predicted if self.residual else predicted
        text_index = self.metadata.return_encoder_hidden_states_index
        if text_index is None:
            return stream
        text = self._stream("encoder_hidden_states", args, kwargs)
        return (text, stream) if text_index == 0 else (stream, text)

    def _stream(self, name, args, kwargs):
        if name in kwargs:  # the common case, without the registry's signature inspection
            return kwargs[name]
        argument = getattr(self.metadata, f"{name}_argument_name")
        return self.metadata._get_parameter_from_args_kwargs(argument, args, kwargs)


class ProbeHook(_Hook):
    """On the first block, where the site itself has no hook: an online schedule decides before the block runs."""

    @skip
    def new_forward(self, module, *args, **kwargs):
        self.cache.decide(module, args, kwargs)
        return self.fn_ref.original_forward(*args, **kwargs)


class BranchHook(_Hook):
    """Keeps and predicts one attention or feed-forward output (a tensor or a tuple of tensors)."""

    def __init__(self, cache, name: str):
        super().__init__(cache)
        self.name = name

    @skip
    def new_forward(self, module, *args, **kwargs):
        if self.cache.current.skip:
            return self.cache.predict(self.name)
        output = self.fn_ref.original_forward(*args, **kwargs)
        self.cache.keep(self.name, output)
        return output


class FeederHook(_Hook):
    """On a module that only feeds a kept one: nothing of it is needed on a skipped step, not even memory."""

    @skip
    def new_forward(self, module, *args, **kwargs):
        if self.cache.current.skip:
            nothing = (args[0] if args else kwargs["hidden_states"])[..., :0]
            text = kwargs.get("encoder_hidden_states")
            return nothing if text is None else (nothing, text[..., :0])
        return self.fn_ref.original_forward(*args, **kwargs)


class EmbedderHook(_Hook):
    """On an embedder that feeds skipped blocks alone: a sliver of its input stands in for its output, which nobody
    reads. Six wide, because Wan cuts `time_proj`'s output in six, and joins those for text and image."""

    @skip
    def new_forward(self, module, *args, **kwargs):
        return args[0][..., :6] if self.cache.current.skip else self.fn_ref.original_forward(*args, **kwargs)


def hooks(site: str, transformer: torch.nn.Module, cache, online: bool) -> list[tuple[torch.nn.Module, ModelHook]]:
    """(module, hook) pairs that make `cache` work at `site`. Raises ValueError where the model does not allow it."""
    if site == "output":
        if online:
            raise ValueError("site=output never enters the model, where an online schedule decides")
        return []
    blocks = transformer_blocks(transformer)
    if site in ("stack", "residual"):
        ends = (blocks[0], blocks[-1])
        pairs = [(b, BlockHook(cache, b, b is ends[0], b is ends[1], site == "residual")) for b in blocks]
        if site == "stack" and not online:
            embedders = (attrgetter(name)(transformer) for name in EMBEDDERS.get(type(transformer).__name__, ()))
            pairs += [(embedder, EmbedderHook(cache)) for embedder in embedders if embedder is not None]
        return pairs
    pairs = [(blocks[0], ProbeHook(cache))] if online else []
    for index, block in enumerate(blocks):
        kind = type(unwrap_module(block)).__name__
        if kind not in BRANCHES:
            raise ValueError(f"site=modules does not know {kind}; known blocks: {', '.join(BRANCHES)}")
        kept, feeders = BRANCHES[kind]
        present = [name for name in kept if getattr(block, name) is not None]
        pairs += [(getattr(block, name), BranchHook(cache, f"{index}.{name}")) for name in present]
        pairs += [(getattr(block, name), FeederHook(cache)) for name in feeders]
    return pairs


def model_input(args: tuple, kwargs: dict) -> torch.Tensor:
    """The noisy latents in the arguments of a transformer's or U-Net's call."""
    return args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["sample"]


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: dict) -> torch.Tensor:
    """What TeaCache looks at (arXiv 2411.19108, 3.3): the first block's input after its adaptive norm, (B, N, D).

    For Wan the time embedding that modulates it, (B, 6, D), as in the authors' code for Wan2.1: every sample has the
    same, and so the same schedule.
    """
    kind = type(unwrap_module(block)).__name__
    stream = args[0] if args else kwargs["hidden_states"]
    if kind in ("FluxTransformerBlock", "HunyuanVideoTransformerBlock", "JointTransformerBlock"):
        return block.norm1(stream, emb=kwargs["temb"] if "temb" in kwargs else args[2])[0]
    if kind == "BasicTransformerBlock":
        norm = {name: kwargs[name] for name in ("timestep", "class_labels")}
        return block.norm1(stream, **norm, hidden_dtype=stream.dtype)[0]
    if kind == "QwenImageTransformerBlock":
        modulation = block.img_mod(kwargs["temb"]).chunk(2, dim=-1)[0]
        return block._modulate(block.img_norm1(stream), modulation)[0]
    if kind == "WanTransformerBlock":
        return kwargs["temb"] if "temb" in kwargs else args[2]
    raise ValueError(f"TeaCache's modulated input is not known for {kind}")
