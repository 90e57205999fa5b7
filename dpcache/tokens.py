"""The hooks of site=tokens: a skipped feed-forward is computed for the tokens that a selector chooses."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from dpcache._diffusers import Hook, leave_uncompiled
from dpcache.errors import SettingError
from dpcache.hooks import ModuleHook, SessionHook
from dpcache.models.family import Block, feed_forwards_of

if TYPE_CHECKING:
    from dpcache.session import Branch, Session


@dataclass
class TokenState:
    """The state of one guidance branch in one generation.

    Attributes:
        received: for every self-attention, by name, the attention that each token received at the last computed step,
            (B, N).
        refreshed: for every feed-forward, by name, the step at which each of its tokens was last computed, (B, N).
    """

    received: dict[str, torch.Tensor] = field(default_factory=dict)
    refreshed: dict[str, torch.Tensor] = field(default_factory=dict)


class Selector(Protocol):
    """Chooses the tokens that a skipped step computes anew."""

    def select(self, context: "Branch", name: str, block: str, layer: int, received: torch.Tensor) -> torch.Tensor:
        """The indices of k of N tokens for the feed-forward `name`, (B, k); k may depend on the step.

        Args:
            context: the guidance branch; its `state` is a `TokenState`.
            block, layer: the class of the block, and its number among the blocks of this class.
            received: the attention that each token received at the last computed step, (B, N), float32; its mean over
                all tokens of the self-attention is 1 / N.
        """
        ...


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention, (B, H, N, D), and the attention that every token receives, (B, N): the mean over
    heads and queries. The maps, (B, H, n, N), are made for n queries at a time, as many as fit into 256 MiB."""
    if dropout_p or is_causal or enable_gqa:
        raise SettingError("site=tokens knows neither dropout nor causal or grouped-query attention")
    samples, heads, length, width = query.shape
    output, received = torch.empty_like(query), 0.0
    at_a_time = max(2**26 // (samples * heads * key.shape[2]), 1)
    for start in range(0, length, at_a_time):
        part = slice(start, start + at_a_time)
        logits = query[:, :, part] @ key.mT * (width**-0.5 if scale is None else scale)
        if attn_mask is not None:
            mask = attn_mask[..., part, :] if attn_mask.shape[-2] > 1 else attn_mask
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        weights = logits.softmax(-1, dtype=torch.float32).nan_to_num()  # a token that may look at nothing gets nothing
        received = received + weights.sum((1, 2))
        output[:, :, part] = weights.to(value.dtype) @ value
    return output, received / (heads * length)


class _Received(TorchFunctionMode):
    """Replaces PyTorch's attention by `attend`, which takes the same FLOPs and equals the fused kernels up to
    rounding."""

    received = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        output, self.received = attend(*args, **(kwargs or {}))
        return output


class AttentionHook(ModuleHook):
    """On a block's self-attention: at computed steps that are followed by a skipped one, it also keeps how much
    attention each token receives, (B, N). All other computed steps run the model's own kernels, which are much faster
    for long sequences."""

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        branch, session = self.session.current, self.session
        following, end = branch.step + 1, session.schedule.num_inference_steps
        followed = following < end and (session.online or following not in session.computed)
        if branch.skip or branch.verifying or not followed:
            return super().new_forward(module, *args, **kwargs)
        with _Received() as attention:
            output = super().new_forward(module, *args, **kwargs)
        if attention.received is None:
            raise SettingError("site=tokens has to see PyTorch's own attention: set_attention_backend('native')")
        branch.state.received[self.name] = attention.received
        return output


class SelectedAttentionHook(AttentionHook):
    """On a single-stream block's attention: a skipped step returns it for the selected tokens only."""

    def __init__(self, session: "Session", name: str, selection: "SelectHook"):
        super().__init__(session, name)
        self.selection = selection

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        output = super().new_forward(module, *args, **kwargs)
        if not self.session.current.skip:
            return output
        if torch.is_tensor(output):
            return self.selection.of(output)
        rows = self.selection.of(torch.cat(output, 1))  # two streams, which the block joins again
        return rows, rows[:, :0]


class SelectHook(SessionHook):
    """On the norm before a feed-forward: on a skipped step it passes on only the tokens that the selector chooses, (B,
    N, D) -> (B, k, D)."""

    def __init__(self, session: "Session", name: str, attention: str, first: bool, block: str, layer: int):
        super().__init__(session)
        self.name, self.attention, self.first, self.block, self.layer = name, attention, first, block, layer
        self.index = None  # of the selected tokens, (B, k, 1)

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, stream: torch.Tensor, *args, **kwargs) -> Any:
        branch, length = self.session.current, stream.shape[1]
        if branch.skip:
            received = branch.state.received[self.attention]
            received = received[:, :length] if self.first else received[:, -length:]
            selector = self.session.site.selector
            if selector is None:
                index = received[:, :0].long()
            else:
                index = selector.select(branch, self.name, self.block, self.layer, received)
            self.index = index[..., None]
            stream = self.of(stream)
        return self.forward(stream, *args, **kwargs)

    def of(self, stream: torch.Tensor) -> torch.Tensor:
        return stream.gather(1, self.index.expand(-1, -1, stream.shape[-1]))


class RefreshHook(ModuleHook):
    """On a feed-forward: on a skipped step the computed outputs of the selected tokens replace the predicted ones. With
    `Reuse` they also replace them in the cache."""

    def __init__(self, session: "Session", name: str, selection: SelectHook):
        super().__init__(session, name)
        self.selection = selection

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        if not self.session.current.skip:
            return super().new_forward(module, *args, **kwargs)
        fresh = self.forward(*args, **kwargs)
        return self.session.predict(self.name).scatter_(1, self.selection.index.expand_as(fresh), fresh)


def token_hooks(
    session: "Session",
    block: torch.nn.Module,
    known: Block,
    index: int,
    layer: int,
    present: dict[str, torch.nn.Module],
) -> list[tuple[torch.nn.Module, Hook]]:
    """The (module, hook) pairs of a block at site=tokens, the `layer`-th of its class. In a single-stream block the
    output projection is the feed-forward's second layer as well."""
    attention = known.attention
    hooked = {name: ModuleHook(session, f"{index}.{name}") for name in present}
    hooked[attention] = AttentionHook(session, f"{index}.{attention}")
    for place, (norm, name) in enumerate(feed_forwards_of(block)):
        if name in present:
            full_name = f"{index}.{name}"
            hooked[norm] = SelectHook(session, full_name, f"{index}.{attention}", place == 0, known.kind, layer)
            hooked[name] = RefreshHook(session, full_name, hooked[norm])
            if attention not in present:
                hooked[attention] = SelectedAttentionHook(session, f"{index}.{attention}", hooked[norm])
    return [(getattr(block, name), hook) for name, hook in hooked.items()]
