"""ClusCa: Compute Only 16 Tokens in One Timestep: Accelerating Diffusion Transformers with Cluster-Driven Feature
Caching (Zheng et al., arXiv 2509.10312), as in the authors' code."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch

from baselines.search import FullSteps
from dpcache._diffusers import Hook, leave_uncompiled
from dpcache.errors import SettingError
from dpcache.hooks import ModuleHook, SessionHook, StreamHook
from dpcache.method import Method
from dpcache.models.family import Block, block_of, feed_forwards_of
from dpcache.predictors import Taylor
from dpcache.schedules import Schedule, check_budget
from dpcache.sites import Modules, transformer_blocks, unknown_block

if TYPE_CHECKING:
    from dpcache.session import Session


def clusca(
    budget: int,
    num_inference_steps: int,
    interval: int | None = None,
    clusters: int = 16,
    propagation: float = 0.005,
    order: int = 1,
    warmup: int = 3,
) -> "ClusCa | Method":
    """Attention and feed-forward outputs are extrapolated as by TaylorSeer. Every feed-forward is also computed for one
    random token of each cluster, and the other tokens are moved towards it, see `Clusters`.

    Args:
        interval: the authors' N, a full step after every N - 1 others; None: as many full steps as spend the budget.
        clusters: the authors' 16.
        propagation: the paper's gamma, 0.005 in the authors' code for FLUX.
        order: of the Taylor expansion, 0 or 1; the authors' code has 1 for FLUX and 4 for DiT.
        warmup: full steps to begin with.
    """
    check_budget(budget, num_inference_steps, warmup)
    if clusters < 1 or not 0 <= propagation <= 1 or order not in (0, 1):
        raise SettingError(
            f"clusters={clusters}, propagation={propagation}, order={order}: must be at least 1, from 0 to 1, 0 or 1"
        )
    recipe = ClusCa(budget, num_inference_steps, warmup, clusters, propagation, order)
    return recipe if interval is None else recipe.with_steps(recipe.every(interval))


@dataclass(frozen=True)
class ClusCa(FullSteps):
    """The recipe, see `FullSteps`."""

    clusters: int
    propagation: float
    order: int

    def make(self, full: int) -> Method:
        return self.with_steps(self.spaced(full))

    def with_steps(self, steps: list[int]) -> Method:
        site = Clusters(clusters=self.clusters, propagation=self.propagation)
        predictor = Taylor(self.order, max(self.warmup - 2, 0))
        return Method(Schedule(steps, self.num_inference_steps), site, predictor)


@dataclass
class ClusterState:
    """The state of one guidance branch in one generation.

    Attributes:
        labels: for each stream ("image", "text") the cluster of every token, (B, N).
        centres: for each stream the means of the clusters, (B, K, D).
        anew: for each feed-forward, by name, its output at the last full step, updated by the outputs computed since,
            (B, N, D).
    """

    labels: dict[str, torch.Tensor] = field(default_factory=dict)
    centres: dict[str, torch.Tensor] = field(default_factory=dict)
    anew: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Clusters(Modules):
    """As `Modules`, but skipped steps compute the feed-forwards for one token of each cluster.

    At every full step the tokens of a stream are clustered, by the output of the last block that has a feed-forward for
    this stream alone. On a skipped step one random token of each cluster passes the feed-forward. Its output replaces
    the kept one, and the outputs of the other image tokens of its cluster are moved towards it by the factor
    `propagation`. As in the authors' code, this changes the constant term of the Taylor expansion, text tokens are not
    moved, and single-stream blocks compute nothing.

    Which tokens are drawn depends on the step and the block alone, so that a generation is repeatable and does not
    depend on its batch; the authors draw from PyTorch's global generator.

    Args:
        clusters: of each stream, or as many as it has tokens.
        propagation: see `clusca`.
    """

    name = "clusters"
    apart_in_time = False
    clusters: int = 16
    propagation: float = 0.005

    @property
    def partial(self) -> bool:
        return True

    def start(self) -> ClusterState:
        return ClusterState()

    def hooks(self, session: "Session", transformer: torch.nn.Module) -> list[tuple[torch.nn.Module, Hook]]:
        pairs, last = super().hooks(session, transformer), {}
        for block in transformer_blocks(transformer):
            for _, name in own_feed_forwards(block):
                last[stream_of(name)] = block
        if not last:
            known = block_of(transformer_blocks(transformer)[0])
            raise SettingError(unknown_block(self, known, "feed_forwards"))
        for block in dict.fromkeys(last.values()):
            streams = [stream for stream, at in last.items() if at is block]
            pairs.append((block, ClusterHook(session, block, streams, self.clusters)))
        return pairs

    def block_hooks(
        self,
        session: "Session",
        block: torch.nn.Module,
        known: Block,
        index: int,
        layer: int,
        present: dict[str, torch.nn.Module],
    ) -> list[tuple[torch.nn.Module, Hook]]:
        pairs = super().block_hooks(session, block, known, index, layer, present)
        hooked = {module: hook for module, hook in pairs}
        for norm, name in own_feed_forwards(block):
            drawn = DrawHook(session, f"{index}.{name}", stream_of(name), self.clusters)
            hooked[getattr(block, norm)] = drawn
            hooked[getattr(block, name)] = SpreadHook(session, drawn, self.propagation)
        return list(hooked.items())


def own_feed_forwards(block: torch.nn.Module) -> list[tuple[str, str]]:
    """A block's feed-forwards for one stream alone, each with the norm before it: names (norm, feed-forward)."""
    return [] if block_of(block).part == "single" else feed_forwards_of(block)


def stream_of(feed_forward: str) -> str:
    """ "text" or "image", which diffusers tells by the feed-forward's name (HiDream's are `ff_t` and `ff_i`)."""
    text = "context" in feed_forward or "txt" in feed_forward or feed_forward.endswith("_t")
    return "text" if text else "image"


class ClusterHook(StreamHook):
    """On the last block that has a feed-forward for some stream: at a full step it clusters the block's output tokens
    of these streams."""

    def __init__(self, session: "Session", block: torch.nn.Module, streams: list[str], clusters: int):
        super().__init__(session, block)
        self.own, self.clusters = streams, clusters

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        output, branch = self.forward(*args, **kwargs), self.session.current
        if not branch.skip:
            state = branch.state
            for stream in self.own:
                tokens = self.image(output) if stream == "image" else self.other(output)
                state.labels[stream], state.centres[stream] = k_means(
                    tokens.float(), state.centres.get(stream), self.clusters
                )
        return output


def k_means(
    tokens: torch.Tensor, centres: torch.Tensor | None, clusters: int, iterations: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters by L1 distance: for tokens (B, N, D), the cluster of each token, (B, N), and the clusters' means, (B, K,
    D).

    Args:
        centres: the means to begin with, (B, K, D); None: `clusters` random tokens, or all tokens if there are fewer.
    """
    if centres is None:
        first = numbers(tokens.shape[1], "centres").argsort()[:clusters]
        centres = tokens[:, first.to(tokens.device, non_blocking=True)]
    for _ in range(iterations):
        labels = torch.cdist(tokens, centres, p=1).argmin(-1)
        belongs = (labels[..., None] == torch.arange(centres.shape[1], device=labels.device)).to(tokens.dtype)
        centres = belongs.mT @ tokens / (belongs.sum(1)[..., None] + 1e-8)
    return labels, centres


def numbers(count: int, seed: str) -> torch.Tensor:
    """Random numbers, (count,), the same for the same seed."""
    return torch.rand(count, generator=torch.Generator().manual_seed(crc32(seed.encode())))


class DrawHook(SessionHook):
    """On the norm before a feed-forward: on a skipped step it passes on one token of each cluster, (B, N, D) -> (B, K,
    D)."""

    def __init__(self, session: "Session", name: str, stream: str, clusters: int):
        super().__init__(session)
        self.name, self.stream, self.clusters = name, stream, clusters
        self.index = None  # of the tokens, (B, K)

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, stream: torch.Tensor, *args, **kwargs) -> Any:
        branch, (_, count, width) = self.session.current, stream.shape
        if branch.skip:
            order = numbers(count, f"{branch.step} {self.name}").to(stream.device, non_blocking=True)
            self.index = draw(branch.state.labels[self.stream], min(self.clusters, count), order)
            stream = stream.gather(1, self.index[..., None].expand(-1, -1, width))
        return self.forward(stream, *args, **kwargs)


def draw(labels: torch.Tensor, clusters: int, order: torch.Tensor) -> torch.Tensor:
    """Indices (B, K) of one token for each cluster, that with the largest random number: from labels (B, N) and numbers
    `order` (N,). For an empty cluster the first token is drawn."""
    belongs = labels[:, None] == torch.arange(clusters, device=labels.device)[:, None]
    return torch.where(belongs, order, -torch.inf).argmax(-1)


class SpreadHook(ModuleHook):
    """On a feed-forward: a skipped step puts the drawn tokens' outputs into the kept output, moves the other tokens
    towards those of their cluster, and adds the terms of higher order."""

    def __init__(self, session: "Session", drawn: DrawHook, propagation: float):
        super().__init__(session, drawn.name)
        self.drawn, self.propagation = drawn, propagation if drawn.stream == "image" else 0.0

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        branch = self.session.current
        anew, history = branch.state.anew, branch.histories.get(self.name, [None])[0]
        if not branch.skip:
            if self.name in anew:  # the next slope begins at what the skipped steps have made of the feature
                history.buffers[history.newest].copy_(anew[self.name])
            output = super().new_forward(module, *args, **kwargs)
            anew[self.name] = output.clone()
            return output
        fresh, kept = self.forward(*args, **kwargs), anew[self.name]
        spread(kept, fresh, branch.state.labels[self.drawn.stream], self.drawn.index, self.propagation)
        return self.session.predict(self.name) + (kept - history.buffers[history.newest])


def spread(
    kept: torch.Tensor, fresh: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, propagation: float
) -> None:
    """Put the outputs of the drawn tokens into `kept`, and move all tokens towards the mean drawn output of their
    cluster, in place.

    Args:
        kept: (B, N, D).
        fresh: outputs of the drawn tokens, (B, K, D).
        labels, index: the cluster of every token, (B, N), and the drawn tokens, (B, K).
        propagation: how far, 0 to 1.
    """
    wide = fresh.shape[-1]
    kept.scatter_(1, index[..., None].expand_as(fresh), fresh)
    if propagation:
        cluster = labels.gather(1, index)
        total = torch.zeros_like(fresh).scatter_add_(1, cluster[..., None].expand_as(fresh), fresh)
        count = torch.zeros_like(fresh[..., 0]).scatter_add_(1, cluster, torch.ones_like(fresh[..., 0]))
        mean = total / count[..., None].clamp(min=1)
        kept.lerp_(mean.gather(1, labels[..., None].expand(-1, -1, wide)), propagation)
