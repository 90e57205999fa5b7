"""The sites: what is kept of a computed step, and where it is put back on a skipped one.

| site              | kept                                              | a skipped step still runs                    |
|-------------------|---------------------------------------------------|----------------------------------------------|
| `stack`           | the last block's output                           | time embedder and output layers (*)          |
| `residual`        | as `stack`, minus the first block's input         | embedders and output layers                  |
| `blocks`          | what each run of blocks adds to the streams       | all other blocks                             |
| `modules`         | attention and feed-forward outputs before gating  | embedders, norms, gates, sums, output layers |
| `tokens`          | as `modules`                                      | as `modules`, feed-forwards of chosen tokens |
| `output`          | the model's prediction                            | nothing                                      |
| `output_residual` | the model's prediction minus its input            | nothing                                      |

(*) and the other embedders, unless the family's record (`models/`) says that only the blocks read them.

The hooks themselves are in `hooks.py` and, for `tokens`, in `tokens.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn import ModuleDict, ModuleList
from torch.utils._pytree import tree_flatten, tree_unflatten

from dpcache._diffusers import BLOCK_LISTS, Hook, unwrap_module
from dpcache.arguments import argument_names
from dpcache.errors import SettingError
from dpcache.hooks import (
    BlockHook,
    EmbedderHook,
    FeederHook,
    ModuleHook,
    ProbeHook,
    RunHook,
    Verifier,
    VerifyHook,
    streams_of,
)
from dpcache.models.family import Block, Streams, block_of, family_of, known_blocks
from dpcache.tokens import Selector, TokenState, token_hooks

if TYPE_CHECKING:
    from dpcache.session import Branch, Session


def check_layout(site: "Site", transformer: torch.nn.Module) -> None:
    """Raises SettingError for a model in which spatial and temporal blocks alternate. Between them the model reshapes
    the stream, so the output of one block minus the input of another has no meaning."""
    if getattr(transformer, "temporal_transformer_blocks", None) is not None:
        raise SettingError(
            f"site={site.name}: {type(transformer).__name__} lays its stream out anew between its blocks: choose "
            "site=stack"
        )


def transformer_blocks(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer's blocks in the order in which they run. Raises SettingError where there are none."""
    if (blocks_of := family_of(transformer).blocks_of) is not None:
        return blocks_of(unwrap_module(transformer))
    blocks = [
        block
        for name, children in unwrap_module(transformer).named_children()
        if name in BLOCK_LISTS and isinstance(children, ModuleList)
        for block in children
    ]
    if not blocks:
        raise SettingError(f"{type(transformer).__name__} has no transformer blocks: use site=output")
    return blocks


def embedders_of(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose outputs only the blocks read, according to the family's record."""
    found = [attrgetter(name)(transformer) for name in family_of(transformer).embedders]
    lists = [[*item.children()] if isinstance(item, (ModuleList, ModuleDict)) else [item] for item in found]
    return [module for modules in lists for module in modules if module is not None]


@dataclass(frozen=True)
class Site:
    """Base of all sites.

    Attributes:
        name: its short name.
        partial: whether a skipped step computes parts of the model that count against the budget.
        sees_input: whether a predictor may use the model's input.
        apart_in_time: whether the parts that it keeps may be computed at different steps, by a `Staggered` schedule.
        kinds: the kinds of parts that it may keep, of which a model need not have all; empty: they depend on the model.
    """

    name: ClassVar[str]
    sees_input: ClassVar[bool] = False
    apart_in_time: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ()

    @property
    def partial(self) -> bool:
        return False

    def hooks(self, session: "Session", transformer: torch.nn.Module) -> list[tuple[torch.nn.Module, Hook]]:
        """(module, hook) pairs that make `session` work here. Raises SettingError where the model does not allow it."""
        return []

    def start(self) -> object:
        """The site's own state for a generation, kept as `context.state`; None: it has none."""
        return None

    def call(self, session: "Session", branch: "Branch", forward: Callable, args: tuple, kwargs: dict) -> Any:
        """One call of the whole model. `forward`: the model's own."""
        return forward(*args, **kwargs)


@dataclass(frozen=True)
class Stack(Site):
    """The last block's output.

    Args:
        probe: number of first blocks that run at every step; an online schedule decides at the block after them.
    """

    name = "stack"
    residual: ClassVar[bool] = False
    probe: int = 0

    def __post_init__(self):
        if self.probe < 0:
            raise SettingError(f"probe={self.probe} must be at least 0 blocks")

    @property
    def partial(self) -> bool:
        return self.probe > 0

    def hooks(self, session: "Session", transformer: torch.nn.Module) -> list[tuple[torch.nn.Module, Hook]]:
        blocks = transformer_blocks(transformer)
        last, probe = len(blocks) - 1, self.probe
        if probe and not session.online:
            raise SettingError(f"probe={probe}: only a schedule that decides online looks at a probe")
        if self.residual:
            check_layout(self, transformer)
        if probe > last:
            raise SettingError(f"a probe of {probe} blocks leaves nothing of {type(transformer).__name__}'s {last + 1}")
        pairs = [(b, BlockHook(session, b, i, i == last, probe, self.residual)) for i, b in enumerate(blocks)]
        if not self.residual and not session.online:
            pairs += [(embedder, EmbedderHook(session)) for embedder in embedders_of(transformer)]
        return pairs


@dataclass(frozen=True)
class Residual(Stack):
    """The last block's output minus the first block's input."""

    name = "residual"
    residual = True


@dataclass(frozen=True)
class Blocks(Site):
    """What each run of blocks adds to the streams.

    Args:
        blocks: indices of the blocks that are skipped; None: all.
        apart: whether every block is kept separately; else consecutive blocks are kept together, as one run.
    """

    name = "blocks"
    apart_in_time = True
    blocks: Sequence[int] | None = None
    apart: bool = False

    @property
    def partial(self) -> bool:
        return True

    def hooks(self, session: "Session", transformer: torch.nn.Module) -> list[tuple[torch.nn.Module, Hook]]:
        if session.online:
            raise SettingError("site=blocks takes a fixed list of steps, not a schedule that decides online")
        check_layout(self, transformer)
        blocks = transformer_blocks(transformer)
        chosen = range(len(blocks)) if self.blocks is None else self.blocks
        found = runs(chosen, [streams_of(block) for block in blocks])
        if self.apart:
            found = [[index] for run in found for index in run]
        return [
            (blocks[i], RunHook(session, blocks[i], str(run[-1]), i == run[0], i == run[-1]))
            for run in found
            for i in run
        ]


@dataclass(frozen=True)
class Modules(Site):
    """Attention and feed-forward outputs before their gates.

    Args:
        verifier: an online schedule that at some skipped steps also runs the last block with computed modules, to
            compare. None: no step is verified.
    """

    name = "modules"
    apart_in_time = True
    verifier: Verifier | None = None

    @property
    def partial(self) -> bool:
        return self.verifier is not None

    def hooks(self, session: "Session", transformer: torch.nn.Module) -> list[tuple[torch.nn.Module, Hook]]:
        blocks = transformer_blocks(transformer)
        pairs = [(blocks[0], ProbeHook(session))] if session.online else []
        if self.verifier is not None:
            pairs.append((blocks[-1], VerifyHook(session, blocks[-1], self.verifier)))
        records = [block_of(block) for block in blocks]
        for index, (block, known) in enumerate(zip(blocks, records)):
            if not known.kept:
                raise SettingError(unknown_block(self, known, "kept"))
            layer = records[:index].count(known)
            pairs += self.block_hooks(session, block, known, index, layer, kept_modules(block, known))
        return pairs

    @classmethod
    def names(cls, transformer: torch.nn.Module) -> list[str]:
        """What is kept: "3.attn1" for the fourth block's module of that name."""
        blocks = enumerate(transformer_blocks(transformer))
        return [f"{index}.{name}" for index, block in blocks for name in kept_modules(block, block_of(block))]

    def block_hooks(
        self,
        session: "Session",
        block: torch.nn.Module,
        known: Block,
        index: int,
        layer: int,
        present: dict[str, torch.nn.Module],
    ) -> list[tuple[torch.nn.Module, Hook]]:
        """The (module, hook) pairs of one block. `layer`: its number among the blocks of its class; `present`: its kept
        modules by name."""
        pairs = [(module, ModuleHook(session, f"{index}.{name}")) for name, module in present.items()]
        names = [hook.name for _, hook in pairs]
        return pairs + [(getattr(block, name), FeederHook(session, names)) for name in known.feeders]


@dataclass(frozen=True)
class Tokens(Modules):
    """As `Modules`, but a skipped feed-forward is computed for the tokens that a selector chooses.

    Args:
        selector: chooses the tokens; None: no tokens are computed.
    """

    name = "tokens"
    apart_in_time = False
    selector: Selector | None = None

    @property
    def partial(self) -> bool:
        return super().partial or self.selector is not None

    def start(self) -> TokenState:
        return TokenState()

    def call(self, session: "Session", branch: "Branch", forward: Callable, args: tuple, kwargs: dict) -> Any:
        times = (dict(zip(argument_names(branch.part.module), args)) | kwargs).get("timestep")
        if torch.is_tensor(times) and times.ndim > 1:  # selected tokens would meet the modulation of all
            raise SettingError(f"site={self.name}: this pipeline tells the model the time of every token")
        return forward(*args, **kwargs)

    def block_hooks(
        self,
        session: "Session",
        block: torch.nn.Module,
        known: Block,
        index: int,
        layer: int,
        present: dict[str, torch.nn.Module],
    ) -> list[tuple[torch.nn.Module, Hook]]:
        if not known.feed_forwards:
            raise SettingError(unknown_block(self, known, "feed_forwards"))
        return token_hooks(session, block, known, index, layer, present)


def kept_modules(block: torch.nn.Module, known: Block) -> dict[str, torch.nn.Module]:
    """The modules that the record names, as far as this block has them, by name."""
    return {name: getattr(block, name) for name in known.kept if getattr(block, name) is not None}


def unknown_block(site: Site, block: Block, fact: str) -> str:
    """The message that a block's record lacks the field `fact`, which the site needs."""
    known = [other.kind for other in known_blocks().values() if getattr(other, fact)]
    return f"site={site.name} does not know {block.kind}; known blocks: {', '.join(known)}"


@dataclass(frozen=True)
class Output(Site):
    """The model's prediction: every tensor that it returns."""

    name = "output"
    sees_input = True

    def call(self, session: "Session", branch: "Branch", forward: Callable, args: tuple, kwargs: dict) -> Any:
        latents = branch.part.input(args, kwargs)
        session.decide(branch.part.module, args, kwargs)
        if session.observe is not None and torch.is_tensor(latents):
            session.observe(branch.name, branch.step, "input", latents)
        if not branch.skip:
            output = forward(*args, **kwargs)
            values, branch.output = tree_flatten(output)
            session.keep("output", self.feature(branch, values, latents))
            return output
        seen = None
        if session.method.predictor.sees_input:
            seen = self.like_prediction(branch, latents)
        predicted = session.predict("output", seen)
        predicted = predicted if isinstance(predicted, tuple) else (predicted,)
        if isinstance(branch.weights, tuple) and branch.weights == (1.0,):
            predicted = tuple(value.clone() for value in predicted)  # a scheduler may keep it, and the buffer changes
        return tree_unflatten(self.prediction(branch, predicted, latents), branch.output)

    def feature(self, branch: "Branch", values: list, latents: torch.Tensor) -> tuple[torch.Tensor, ...] | torch.Tensor:
        """What is kept of the values that the model returned."""
        if not values or not all(torch.is_tensor(value) for value in values):
            kinds = ", ".join(sorted({type(value).__name__ for value in values}))
            raise SettingError(f"site={self.name}: {branch.part} returns {kinds}, of which only tensors can be kept")
        return values[0] if len(values) == 1 else tuple(values)

    def prediction(
        self, branch: "Branch", predicted: tuple[torch.Tensor, ...], latents: torch.Tensor
    ) -> list[torch.Tensor]:
        """The values that the model would return, from what was predicted."""
        return list(predicted)

    def like_prediction(self, branch: "Branch", latents: torch.Tensor) -> torch.Tensor:
        """The latents in the shape of the prediction: without what an image-to-video model has appended to their
        channels."""
        return latents


@dataclass(frozen=True)
class OutputResidual(Output):
    """The model's prediction minus its input, which must have the same shape. The condition that image-to-video models
    append to the input's channels is left out."""

    name = "output_residual"

    def feature(self, branch: "Branch", values: list, latents: torch.Tensor) -> tuple[torch.Tensor, ...] | torch.Tensor:
        super().feature(branch, values, latents)
        branch.shapes = [value.shape for value in values]
        own = tree_flatten(latents)[0]
        cut = [self.like(x, value.shape) for x, value in zip(own, values)]
        if len(own) != len(values) or [x.shape for x in cut] != branch.shapes:
            shapes = [[tuple(x.shape) for x in part] for part in (own, values)]
            raise SettingError(
                f"site={self.name}: the model's input {shapes[0]} has another shape than its prediction {shapes[1]}"
            )
        feature = tuple(value - x for value, x in zip(values, cut))
        return feature if len(feature) > 1 else feature[0]

    def prediction(
        self, branch: "Branch", predicted: tuple[torch.Tensor, ...], latents: torch.Tensor
    ) -> list[torch.Tensor]:
        own = tree_flatten(latents)[0]
        return [self.like(x, shape) + added for x, shape, added in zip(own, branch.shapes, predicted)]

    def like_prediction(self, branch: "Branch", latents: torch.Tensor) -> torch.Tensor:
        return self.like(latents, branch.shapes[0])

    @staticmethod
    def like(latents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The latents without what is appended to the channels of a prediction of this shape."""
        return latents if latents.shape == shape else latents[:, : shape[1]]


SITES: dict[str, type[Site]] = {
    site.name: site for site in (Stack, Residual, Blocks, Modules, Tokens, Output, OutputResidual)
}


def as_site(site: Site | str) -> Site:
    """A site, or the one of that short name. Raises SettingError for any other name."""
    if isinstance(site, Site):
        return site
    if site not in SITES:
        raise SettingError(f"site={site} is not one of {', '.join(SITES)}")
    return SITES[site]()


def runs(blocks: Sequence[int], streams: Sequence[Streams]) -> list[list[int]]:
    """The indices of blocks, grouped into runs of consecutive blocks with the same streams. `streams`: of all blocks of
    the model. Raises SettingError for an index that the model does not have."""
    if illegal := [index for index in blocks if not 0 <= index < len(streams)]:
        raise SettingError(f"blocks={illegal}: this model's blocks are 0..{len(streams) - 1}")
    parts = []
    for index in sorted(set(blocks)):
        if parts and parts[-1][-1] == index - 1 and streams[index - 1] == streams[index]:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts
