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

The hooks themselves are in `hooks.py` and, for `tokens`, in `tokens.py`.
"""

from collections.abc import Sequence
from operator import attrgetter

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.utils.torch_utils import unwrap_module

from dpcache.hooks import BlockHook, BranchHook, EmbedderHook, FeederHook, ProbeHook, RunHook, VerifyHook
from dpcache.tokens import token_hooks

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
            pairs += token_hooks(cache, block, kind, index, kinds[:index].count(kind), present)
            continue
        pairs += [(module, BranchHook(cache, f"{index}.{name}")) for name, module in present.items()]
        pairs += [(getattr(block, name), FeederHook(cache)) for name in feeders]
    return pairs


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
