"""The library's knowledge of a model family: one record, in one file of this folder.

A new family is a file with a `FAMILY = Family("ItsTransformerClass", ...)`, which is found by itself, and a file in
`conf/model`. Every field may be left out. Code that needs a missing field raises an error that names it. Sites that
need no record (`stack`, `output`) work on every model whose blocks diffusers itself describes.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Literal

import diffusers
import torch

from dpcache import models
from dpcache._diffusers import unwrap_module
from dpcache.arguments import argument
from dpcache.errors import SettingError


@dataclass(frozen=True)
class Streams:
    """The streams of a block: the image's, and beside it the text's, or another that is also denoised (audio).

    Attributes:
        image, other: names of the arguments; None: there is no other stream.
        image_index, other_index: places in what the block returns; None: it returns no such stream.
        both: whether the model reads the other stream after its last block.
    """

    image: str = "hidden_states"
    other: str | None = "encoder_hidden_states"
    image_index: int = 0
    other_index: int | None = None
    both: bool = False


@dataclass(frozen=True)
class Block:
    """A class of transformer blocks. Modules are named by the block's attributes.

    Attributes:
        kind: name of the class.
        streams: None: those that diffusers' own registry has.
        text_first: whether the text's tokens come before the image's where the block has both in one sequence: in the
            image's stream, or in its attention alone.
        part: "double" (image and text in two streams) or "single" (both in one), in models that have double-stream
            blocks first and then single-stream ones; None: in other models.
        square_grid: whether its tokens are those of a square image, row by row, and no others.
        kept: attention and feed-forward modules, whose outputs are kept before their gates. Not every block of
            the class needs to have all of them.
        feeders: modules whose outputs only feed a kept one.
        attention: its self-attention.
        feed_forwards: pairs of a feed-forward and the norm before it, (norm, feed-forward), in the order in which their
            tokens stand in the self-attention. Not every block of the class needs to have all pairs.
        modulated_input: from the block and a call's (args, kwargs), what TeaCache compares from step to step.
    """

    kind: str
    streams: Streams | None = None
    text_first: bool = False
    part: Literal["double", "single"] | None = None
    square_grid: bool = False
    kept: tuple[str, ...] = ()
    feeders: tuple[str, ...] = ()
    attention: str = "attn"
    feed_forwards: tuple[tuple[str, str], ...] = ()
    modulated_input: Callable[[torch.nn.Module, tuple, Mapping], torch.Tensor] | None = None


EXAMPLE_TIME = 500
"""The scheduler's timestep, of 1000, that example inputs are for."""


@dataclass(frozen=True)
class Request:
    """What an example input is made for: one step of a pipeline call.

    Attributes:
        config: the transformer's configuration.
        call: the pipeline's arguments.
        batch: samples.
        spatial, temporal: pixels (each way) and frames that a latent stands for.
        device, dtype: of the tensors.
        branch: the guidance branch.
    """

    config: Mapping
    call: Mapping
    batch: int = 1
    spatial: int = 8
    temporal: int = 4
    device: str = "meta"
    dtype: torch.dtype = torch.bfloat16
    branch: str = "cond"

    def size(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        return self.call["height"] // self.spatial, self.call["width"] // self.spatial

    def frames(self) -> int:
        """Frames of the latents."""
        return (self.call.get("num_frames", 1) - 1) // self.temporal + 1

    def edits(self) -> bool:
        """Whether the pipeline edits an image, which it gives the transformer beside the latents: one that only starts
        from an image is told its `strength`."""
        return "image" in self.call and "strength" not in self.call

    def random(self, *shape: int) -> torch.Tensor:
        """A random tensor of this shape."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def full(self, value: float, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The value for each sample, (batch,)."""
        return torch.full((self.batch,), value, device=self.device, dtype=dtype or self.dtype)

    def time(self) -> torch.Tensor:
        """`EXAMPLE_TIME` for each sample, as the scheduler has it."""
        return self.full(EXAMPLE_TIME, torch.long)


@dataclass(frozen=True)
class Family:
    """A class of transformers.

    Attributes:
        transformer: name of the class in diffusers.
        blocks: the classes of its blocks.
        blocks_of: the model's blocks in the order in which they run; None: those that diffusers finds.
        embedders: modules or lists of modules, with dots in their names, whose outputs nothing but the blocks reads;
            never the time embedder.
        shapes_alone: changes a model on the device "meta" so that it runs without reading values of its tensors.
        published: configurations on the hub, as diffusers takes them, by path.
        experts: for some of these paths, the number of equal transformers in the pipeline, each for a range of steps.
        spatial, temporal: pixels (each way) and frames that a latent of the published models stands for.
        coarser: for some of the paths, other pixels.
        guidance: the pipeline's argument that, above 1, leads to a second, unconditional call of the transformer, and
            its default; or a function from the pipeline's arguments to the branches; None: the pipeline always calls it
            once per step.
        inputs: makes arguments of the transformer as its pipeline would give them, with random values, for one step of
            one guidance branch.
        token_grid: rows and columns of the image's tokens, each of which holds 2 x 2 latents, told from the keyword
            arguments of a transformer's call; None: the latents are not packed.
    """

    transformer: str
    blocks: tuple[Block, ...] = ()
    blocks_of: Callable[[torch.nn.Module], list[torch.nn.Module]] | None = None
    embedders: tuple[str, ...] = ()
    shapes_alone: Callable[[torch.nn.Module], None] | None = None
    published: Mapping[str, Mapping] = field(default_factory=dict)
    experts: Mapping[str, int] = field(default_factory=dict)
    spatial: int = 8
    temporal: int = 4
    coarser: Mapping[str, int] = field(default_factory=dict)
    guidance: tuple[str, float] | Callable[[Mapping], list[str]] | None = ("true_cfg_scale", 1.0)
    inputs: Callable[[Request], dict] | None = None
    token_grid: Callable[[Mapping], tuple[int, int]] | None = None

    @property
    def transformer_class(self) -> type[torch.nn.Module]:
        """The transformer's class. Raises SettingError where diffusers does not have it."""
        if not hasattr(diffusers, self.transformer):
            raise SettingError(f"diffusers has no transformer {self.transformer}")
        return getattr(diffusers, self.transformer)

    def branches(self, call: Mapping, config: Mapping) -> list[str]:
        """Guidance branches of a pipeline call, each with calls of the transformer and a history of its own; "default"
        where no pipeline of the family names any. A transformer that is told the `guidance_scale` itself is called
        once.

        Args:
            config: the transformer's configuration.
        """
        if self.guidance is None:
            return ["default"]
        if callable(self.guidance):
            return self.guidance(call)
        argument, default = self.guidance
        if argument == "guidance_scale" and config.get("guidance_embeds"):
            return ["cond"]
        return ["cond", "uncond"] if call.get(argument, default) > 1 else ["cond"]


@functools.cache
def families() -> dict[str, Family]:
    """The records of this folder by their transformer's class name. All its files are imported, so none may load what
    takes long before it is asked to. Raises SettingError for a class that two files have."""
    modules = [import_module(found.name) for found in iter_modules(models.__path__, f"{models.__name__}.")]
    records = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return _by_name([(family.transformer, family) for family in records])


@functools.cache
def known_blocks() -> dict[str, Block]:
    """The blocks of all families by their class name. Several families may have the same record. Raises SettingError
    for a class that has two."""
    blocks = dict.fromkeys(block for family in families().values() for block in family.blocks)
    return _by_name([(block.kind, block) for block in blocks])


def _by_name(named: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in named]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SettingError(f"more than one record in dpcache/models has {', '.join(sorted(twice))}")
    return dict(named)


def family_named(transformer: str) -> Family:
    """The record for the name of a transformer's class; for an unknown class, a record with nothing but the name."""
    return families().get(transformer) or Family(transformer)


def family_of(transformer: torch.nn.Module) -> Family:
    """The record of a transformer, see `family_named`."""
    return family_named(type(unwrap_module(transformer)).__name__)


def block_named(kind: str) -> Block:
    """The record for the name of a block's class; for an unknown class, a record with nothing but the name."""
    return known_blocks().get(kind) or Block(kind)


def block_of(block: torch.nn.Module) -> Block:
    """The record of a block, see `block_named`."""
    return block_named(type(unwrap_module(block)).__name__)


def feed_forwards_of(block: torch.nn.Module) -> list[tuple[str, str]]:
    """The pairs of the record's `feed_forwards` that this block has: names (norm, feed-forward)."""
    pairs = block_of(block).feed_forwards
    return [pair for pair in pairs if all(getattr(block, name, None) is not None for name in pair)]


def modulated_input(block: torch.nn.Module, args: tuple, kwargs: dict) -> torch.Tensor:
    """What TeaCache looks at in a call of the first block (arXiv 2411.19108, 3.3): its input after its adaptive norm,
    (B, N, D), or what the family's record has instead. Raises SettingError where that is not known."""
    known = block_of(block)
    if known.modulated_input is None:
        raise SettingError(f"TeaCache's modulated input is not known for {known.kind}")
    return known.modulated_input(block, args, kwargs)


def adaptive_norm(block: torch.nn.Module, args: tuple, kwargs: Mapping) -> torch.Tensor:
    """The modulated input of blocks that give the time embedding, their third argument, to their first norm."""
    return block.norm1(argument(0, "hidden_states", args, kwargs), emb=argument(2, "temb", args, kwargs))[0]
