"""What is kept from a computed step, and where it is put back on a skipped one: hooks on the transformer.

| site              | kept                                              | a skipped step still runs                    |
|-------------------|---------------------------------------------------|----------------------------------------------|
| `stack`           | the last block's image stream                     | time embedder and output layers (*)          |
| `residual`        | that stream minus the first block's input         | embedders and output layers                  |
| `blocks`          | what each run of `Method.blocks` adds to streams  | all other blocks                             |
| `modules`         | attention and feed-forward outputs before gating  | embedders, norms, gates, sums, output layers |
| `tokens`          | the same                                          | these and feed-forwards of selected tokens   |
| `output`          | the model's prediction                            | nothing                                      |
| `output_residual` | that prediction minus the model's input           | nothing                                      |

(*) and the other embedders, where `EMBEDDERS` does not say that they feed the blocks alone.

Each hook asks the step cache (`cache.py`) whether the current step is skipped, and otherwise leaves the module alone.
With torch.compile a hook must not be traced, but what it wraps must. `torch.compiler.disable(recursive=False)` says so,
too, but asks the compiler again at every call (PyTorch 2.15): a quarter of a millisecond for every block of every step.
"""

from collections.abc import Sequence
from operator import attrgetter

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.utils.torch_utils import unwrap_module
from torch._dynamo.decorators import skip
from torch.overrides import TorchFunctionMode

SITES = ("stack", "residual", "blocks", "modules", "tokens", "output", "output_residual")

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

# Per block class, its feed-forwards, each with the norm before it, in the order in which their tokens stand in its
# self-attention. In a single-stream block the output projection is the feed-forward's second layer as well.
_SINGLE_FEED_FORWARD = (("norm", "proj_out"),)
_IMAGE_FIRST = (("norm2", "ff"), ("norm2_context", "ff_context"))
FEED_FORWARDS = {
    "FluxTransformerBlock": _IMAGE_FIRST[::-1],
    "FluxSingleTransformerBlock": _SINGLE_FEED_FORWARD,
    "HunyuanVideoTransformerBlock": _IMAGE_FIRST,
    "HunyuanVideoSingleTransformerBlock": _SINGLE_FEED_FORWARD,
    "BasicTransformerBlock": (("norm3", "ff"),),
    "JointTransformerBlock": _IMAGE_FIRST,
    "QwenImageTransformerBlock": (("txt_norm2", "txt_mlp"), ("img_norm2", "img_mlp")),
    "WanTransformerBlock": (("norm3", "ffn"),),
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


class _BlockHook(_Hook):
    """Knows a block's streams by diffusers' registry."""

    def __init__(self, cache, block):
        super().__init__(cache)
        try:
            self.metadata = TransformerBlockRegistry.get(type(unwrap_module(block)))
        except ValueError:
            raise ValueError(f"{type(block).__name__} is not in diffusers' block registry: use site=output") from None

    def entering(self, name, args, kwargs) -> torch.Tensor:
        """A stream among the block's arguments: `hidden_states` is the image's, `encoder_hidden_states` the text's."""
        if name in kwargs:  # the common case, without the registry's signature inspection
            return kwargs[name]
        argument = getattr(self.metadata, f"{name}_argument_name")
        return self.metadata._get_parameter_from_args_kwargs(argument, args, kwargs)

    def image(self, output) -> torch.Tensor:
        """The image stream of what the block returned."""
        return output if torch.is_tensor(output) else output[self.metadata.return_hidden_states_index]

    def text(self, output) -> torch.Tensor | None:
        """The text stream of what the block returned, if it does."""
        index = self.metadata.return_encoder_hidden_states_index
        return None if index is None else output[index]

    def passing_text(self, args, kwargs) -> torch.Tensor | None:
        """The text stream that enters the block, if it also returns one."""
        if self.metadata.return_encoder_hidden_states_index is None:
            return None
        return self.entering("encoder_hidden_states", args, kwargs)

    def result(self, image, text):
        """What the block returns of these streams."""
        index = self.metadata.return_encoder_hidden_states_index
        return image if index is None else (text, image) if index == 0 else (image, text)


class BlockHook(_BlockHook):
    """Skips a block: its image and text streams pass through. Online schedules decide at the block after the ones they
    probe, and may look at what each block leaves; the feature is kept and put back at the last one.

    Only the image stream is kept, because no model reads the text stream after its last block.
    """

    def __init__(self, cache, block, index: int, last: bool, probe: int, residual: bool):
        super().__init__(cache, block)
        self.index, self.decides, self.last, self.residual = index, index == probe, last, residual
        self.first = index == 0 and (residual or probe > 0)

    @skip
    def new_forward(self, module, *args, **kwargs):
        context = self.cache.current
        if self.first:
            context.stack_input = self.entering("hidden_states", args, kwargs)
        if self.decides:
            self.cache.decide(module, args, kwargs)
        if not context.skip:
            output = self.fn_ref.original_forward(*args, **kwargs)
            stream = self.image(output)
            self.cache.learn(self.index, stream)
            if self.last:
                self.cache.keep("stack", stream - context.stack_input if self.residual else stream)
                context.stack_input = None
            return output
        if self.last:
            stream = self.cache.predict("stack")
            stream = context.stack_input + stream if self.residual else stream
            context.stack_input = None
        else:
            stream = self.entering("hidden_states", args, kwargs)
        return self.result(stream, self.passing_text(args, kwargs))


class RunHook(_BlockHook):
    """On a block of `Method.blocks`: keeps what a run of such blocks adds to the image and the text stream, and on a
    skipped step adds that in place of the run."""

    def __init__(self, cache, block, name: str, first: bool, last: bool):
        super().__init__(cache, block)
        self.name, self.first, self.last = name, first, last

    @skip
    def new_forward(self, module, *args, **kwargs):
        context = self.cache.current
        if self.first or context.skip:
            image, text = self.entering("hidden_states", args, kwargs), self.passing_text(args, kwargs)
        if context.skip:
            if self.last:
                added = self.cache.predict(self.name)
                image, text = (image + added, text) if torch.is_tensor(added) else (image + added[0], text + added[1])
            return self.result(image, text)
        if self.first:
            context.run_input = image, text
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.last:
            (image, text), context.run_input = context.run_input, None
            added, after = self.image(output) - image, self.text(output)
            self.cache.keep(self.name, added if after is None else (added, after - text))
        return output


class ProbeHook(_Hook):
    """On the first block, where the site itself has no hook: an online schedule decides before the block runs."""

    @skip
    def new_forward(self, module, *args, **kwargs):
        self.cache.decide(module, args, kwargs)
        return self.fn_ref.original_forward(*args, **kwargs)


class VerifyHook(_BlockHook):
    """On the last block: where an online schedule wants a skipped step verified, runs the block in earnest as well."""

    @skip
    def new_forward(self, module, *args, **kwargs):
        context, forward = self.cache.current, self.fn_ref.original_forward
        draft = forward(*args, **kwargs)
        if context.skip and self.cache.schedule.verifies(context):
            context.skip, context.verifying = False, True
            real = forward(*args, **kwargs)
            context.skip, context.verifying = True, False
            self.cache.schedule.verify(context, self.image(draft), self.image(real))
        return draft


class BranchHook(_Hook):
    """Keeps and predicts one attention or feed-forward output (a tensor or a tuple of tensors)."""

    def __init__(self, cache, name: str):
        super().__init__(cache)
        self.name = name

    @skip
    def new_forward(self, module, *args, **kwargs):
        context = self.cache.current
        if context.skip:
            self.cache.left_out(module)
            return self.cache.predict(self.name)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if not context.verifying:
            self.cache.keep(self.name, output)
        return output


class FeederHook(_Hook):
    """On a module that only feeds a kept one: nothing of it is needed on a skipped step, not even memory."""

    @skip
    def new_forward(self, module, *args, **kwargs):
        if self.cache.current.skip:
            self.cache.left_out(module)
            nothing = (args[0] if args else kwargs["hidden_states"])[..., :0]
            text = kwargs.get("encoder_hidden_states")
            return nothing if text is None else (nothing, text[..., :0])
        return self.fn_ref.original_forward(*args, **kwargs)


def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Scaled dot-product attention, (B, H, N, D), and the attention that every token receives, (B, N): the mean over
    heads and queries. The maps, (B, H, n, N), are made for n queries at a time, as many as fit into 256 MiB."""
    if dropout_p or is_causal or enable_gqa:
        raise ValueError("site=tokens knows neither dropout nor causal or grouped-query attention")
    samples, heads, length, width = query.shape
    output, received = torch.empty_like(query), 0.0
    at_a_time = max(2**26 // (samples * heads * key.shape[2]), 1)
    for start in range(0, length, at_a_time):
        part = slice(start, start + at_a_time)
        logits = query[:, :, part] @ key.mT * (width**-0.5 if scale is None else scale)
        if attn_mask is not None:
            mask = attn_mask[..., part, :] if attn_mask.shape[-2] > 1 else attn_mask
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        weights = logits.softmax(-1, dtype=torch.float32)
        received = received + weights.sum((1, 2))
        output[:, :, part] = weights.to(value.dtype) @ value
    return output, received / (heads * length)


class _Received(TorchFunctionMode):
    """PyTorch's attention, with `attend` in its place: at the same FLOPs it equals the fused kernels to rounding."""

    received = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        output, self.received = attend(*args, **(kwargs or {}))
        return output


class AttentionHook(BranchHook):
    """On a block's self-attention: also keeps how much of it each token receives, (B, N), at computed steps that are
    followed by a skipped one. The others run the model's own kernels, which long sequences make much the faster."""

    @skip
    def new_forward(self, module, *args, **kwargs):
        context, cache = self.cache.current, self.cache
        following, end = context.step + 1, cache.schedule.num_inference_steps
        followed = following < end and (cache.computed is None or following not in cache.computed)
        if context.skip or context.verifying or not followed:
            return super().new_forward(module, *args, **kwargs)
        with _Received() as attention:
            output = super().new_forward(module, *args, **kwargs)
        if attention.received is None:
            raise ValueError("site=tokens has to see PyTorch's own attention: set_attention_backend('native')")
        context.online[self.name] = attention.received
        return output


class SelectedAttentionHook(AttentionHook):
    """On a single-stream block's attention, of which a skipped step wants the selected tokens alone."""

    def __init__(self, cache, name: str, selection: "SelectHook"):
        super().__init__(cache, name)
        self.selection = selection

    @skip
    def new_forward(self, module, *args, **kwargs):
        output = super().new_forward(module, *args, **kwargs)
        if not self.cache.current.skip:
            return output
        if torch.is_tensor(output):
            return self.selection.of(output)
        rows = self.selection.of(torch.cat(output, 1))  # two streams, which the block joins again
        return rows, rows[:, :0]


class SelectHook(_Hook):
    """On the norm before a feed-forward: on a skipped step it lets only those tokens through, (B, N, D) -> (B, k, D),
    that the schedule selects."""

    def __init__(self, cache, name: str, attention: str, first: bool, block: str, layer: int):
        super().__init__(cache)
        self.name, self.attention, self.first, self.block, self.layer = name, attention, first, block, layer
        self.index = None  # of the selected tokens, (B, k, 1)

    @skip
    def new_forward(self, module, stream, *args, **kwargs):
        context, length = self.cache.current, stream.shape[1]
        if context.skip:
            received = context.online[self.attention]
            received = received[:, :length] if self.first else received[:, -length:]
            index = self.cache.schedule.select(context, self.name, self.block, self.layer, received)
            self.index = index[..., None]
            stream = self.of(stream)
        return self.fn_ref.original_forward(stream, *args, **kwargs)

    def of(self, stream: torch.Tensor) -> torch.Tensor:
        return stream.gather(1, self.index.expand(-1, -1, stream.shape[-1]))


class RefreshHook(BranchHook):
    """On a feed-forward: on a skipped step the selected tokens' outputs take the place of the predicted ones. A feature
    that is reused as it is keeps them."""

    def __init__(self, cache, name: str, selection: SelectHook):
        super().__init__(cache, name)
        self.selection = selection

    @skip
    def new_forward(self, module, *args, **kwargs):
        if not self.cache.current.skip:
            return super().new_forward(module, *args, **kwargs)
        fresh = self.fn_ref.original_forward(*args, **kwargs)
        return self.cache.predict(self.name).scatter_(1, self.selection.index.expand_as(fresh), fresh)


class EmbedderHook(_Hook):
    """On an embedder that feeds skipped blocks alone: a sliver of its input stands in for its output, which nobody
    reads. Six wide, because Wan cuts `time_proj`'s output in six, and joins those for text and image."""

    @skip
    def new_forward(self, module, *args, **kwargs):
        return args[0][..., :6] if self.cache.current.skip else self.fn_ref.original_forward(*args, **kwargs)


def hooks(site: str, transformer: torch.nn.Module, cache, online: bool) -> list[tuple[torch.nn.Module, ModelHook]]:
    """(module, hook) pairs that make `cache` work at `site`. Raises ValueError where the model does not allow it."""
    if site.startswith("output"):
        return []
    blocks = transformer_blocks(transformer)
    if site in ("stack", "residual"):
        last, probe = len(blocks) - 1, cache.schedule.probe if online else 0
        if probe > last:
            raise ValueError(f"a probe of {probe} blocks leaves nothing of {type(transformer).__name__}'s {last + 1}")
        pairs = [(b, BlockHook(cache, b, i, i == last, probe, site == "residual")) for i, b in enumerate(blocks)]
        if site == "stack" and not online:
            embedders = (attrgetter(name)(transformer) for name in EMBEDDERS.get(type(transformer).__name__, ()))
            pairs += [(embedder, EmbedderHook(cache)) for embedder in embedders if embedder is not None]
        return pairs
    if site == "blocks":
        if online:
            raise ValueError("site=blocks takes a schedule that is settled before the run")
        return [
            (blocks[i], RunHook(cache, blocks[i], str(run[-1]), i == run[0], i == run[-1]))
            for run in runs(range(len(blocks)) if cache.method.blocks is None else cache.method.blocks, len(blocks))
            for i in run
        ]
    pairs = [(blocks[0], ProbeHook(cache)), (blocks[-1], VerifyHook(cache, blocks[-1]))] if online else []
    kinds = [type(unwrap_module(block)).__name__ for block in blocks]
    for index, (block, kind) in enumerate(zip(blocks, kinds)):
        if kind not in BRANCHES:
            raise ValueError(f"site={site} does not know {kind}; known blocks: {', '.join(BRANCHES)}")
        kept, feeders = BRANCHES[kind]
        present = {name: getattr(block, name) for name in kept if getattr(block, name) is not None}
        if site == "tokens":
            pairs += _token_hooks(cache, block, kind, index, kinds[:index].count(kind), present)
            continue
        pairs += [(module, BranchHook(cache, f"{index}.{name}")) for name, module in present.items()]
        pairs += [(getattr(block, name), FeederHook(cache)) for name in feeders]
    return pairs


def _token_hooks(cache, block, kind: str, index: int, layer: int, present: dict[str, torch.nn.Module]):
    """The (module, hook) pairs of a block at site=tokens, the `layer`-th of its kind."""
    attention = next(name for name in ("attn", "attn1") if hasattr(block, name))
    hooked = {name: BranchHook(cache, f"{index}.{name}") for name in present}
    hooked[attention] = AttentionHook(cache, f"{index}.{attention}")
    for place, (norm, name) in enumerate(FEED_FORWARDS[kind]):
        if name in present:
            full_name = f"{index}.{name}"
            hooked[norm] = SelectHook(cache, full_name, f"{index}.{attention}", place == 0, kind, layer)
            hooked[name] = RefreshHook(cache, full_name, hooked[norm])
            if attention not in present:
                hooked[attention] = SelectedAttentionHook(cache, f"{index}.{attention}", hooked[norm])
    return [(getattr(block, name), hook) for name, hook in hooked.items()]


def runs(blocks: Sequence[int], count: int) -> list[list[int]]:
    """Indices of blocks, each below `count`, as runs of consecutive ones."""
    if illegal := [index for index in blocks if not 0 <= index < count]:
        raise ValueError(f"blocks={illegal}: this model's blocks are 0..{count - 1}")
    parts = []
    for index in sorted(set(blocks)):
        if parts and parts[-1][-1] == index - 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


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
