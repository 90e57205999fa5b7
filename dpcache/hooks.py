"""The hooks that skip blocks and modules, see `sites.py`.

Each asks the session (`session.py`) whether the current call is skipped, and otherwise leaves its module alone.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils._pytree import tree_map

from dpcache._diffusers import Hook, block_metadata, leave_uncompiled
from dpcache.arguments import argument, argument_names
from dpcache.errors import SettingError
from dpcache.models.family import Streams, block_of

if TYPE_CHECKING:
    from dpcache.session import Branch, Session


class SessionHook(Hook):
    """Base of the site's hooks."""

    def __init__(self, session: "Session"):
        super().__init__()
        self.session = session


def streams_of(block: torch.nn.Module) -> Streams:
    """A block's streams from its record, or else from diffusers' registry. Raises SettingError if neither has them."""
    known = block_of(block)
    if known.streams is not None:
        return known.streams
    metadata, names = block_metadata(block), argument_names(block)
    returns_other = metadata is not None and metadata.return_encoder_hidden_states_index is not None
    if metadata is None or (returns_other and metadata.encoder_hidden_states_argument_name not in names):
        raise SettingError(f"the streams of a {known.kind} are not known: use site=output")
    image, other = metadata.hidden_states_argument_name, metadata.encoder_hidden_states_argument_name
    return Streams(
        image if image in names else names[0],
        other if other in names else None,
        metadata.return_hidden_states_index,
        metadata.return_encoder_hidden_states_index,
    )


class StreamHook(SessionHook):
    """Knows a block's streams."""

    def __init__(self, session: "Session", block: torch.nn.Module):
        super().__init__(session)
        self.block, self.streams, names = block_of(block), streams_of(block), argument_names(block)
        self.image_place = names.index(self.streams.image)
        self.other_place = None if self.streams.other_index is None else names.index(self.streams.other)

    def image_in(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """The image stream that enters the block."""
        return argument(self.image_place, self.streams.image, args, kwargs)

    def other_in(self, args: tuple, kwargs: dict) -> torch.Tensor | None:
        """The other stream that enters the block; None if the block does not return one."""
        if self.other_place is None:
            return None
        return argument(self.other_place, self.streams.other, args, kwargs)

    def image(self, output: torch.Tensor | tuple) -> torch.Tensor:
        """The image stream of what the block returned."""
        return output if torch.is_tensor(output) else output[self.streams.image_index]

    def other(self, output: torch.Tensor | tuple) -> torch.Tensor | None:
        """The other stream of what the block returned; None if it returns none."""
        return None if self.streams.other_index is None else output[self.streams.other_index]

    def result(
        self, image: torch.Tensor, other: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """These streams as the block would return them."""
        index = self.streams.other_index
        return image if index is None else (other, image) if index == 0 else (image, other)


class BlockHook(StreamHook):
    """Skips a block: on a skipped step it returns the block's input. The last block's hook keeps the feature on a
    computed step and returns the prediction on a skipped one. An online schedule decides at the block after the probed
    ones, and learns every block's output.

    The other stream, the text's, is kept only where the model reads it after its last block (`Streams.both`).
    """

    def __init__(self, session: "Session", block: torch.nn.Module, index: int, last: bool, probe: int, residual: bool):
        super().__init__(session, block)
        self.index, self.decides, self.last, self.residual = index, index == probe, last, residual
        self.first = index == 0 and (residual or probe > 0)

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        session = self.session
        branch = session.current
        if self.first:
            branch.stack_input = self.image_in(args, kwargs)
            branch.other_input = self.other_in(args, kwargs)
        if self.decides:
            session.decide(module, args, kwargs)
        if not branch.skip:
            output = self.forward(*args, **kwargs)
            session.learn(self.index, self.image(output))
            if self.last:
                session.keep("stack", self.feature(branch, output))
                branch.stack_input = branch.other_input = None
            return output
        image, other = self.image_in(args, kwargs), self.other_in(args, kwargs)
        if self.last:
            predicted = session.predict("stack")
            added, other = predicted if self.streams.both else (predicted, other)
            if self.residual:
                image = self.entered(branch, image) + added
                other = branch.other_input + other if self.streams.both else other
            else:
                image = added
            branch.stack_input = branch.other_input = None
        return self.result(image, other)

    def feature(
        self, branch: "Branch", output: torch.Tensor | tuple
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What is kept: the last block's output; at site=residual, that minus the first block's input."""
        image, other = self.image(output), self.other(output) if self.streams.both else None
        if self.residual:
            image = image - self.entered(branch, image)
            other = None if other is None else other - branch.other_input
        return image if other is None else (image, other)

    def entered(self, branch: "Branch", image: torch.Tensor) -> torch.Tensor:
        """The first block's input in the shape of the last block's output: with the text before it, if the last block
        has text and image in one stream."""
        before, text = branch.stack_input, branch.other_input
        if before is None:
            raise SettingError(
                f"site=residual: step {branch.step} of {branch.part} does not pass the first block (pipelines may "
                "leave layers out now and then): choose another site"
            )
        if before.shape == image.shape:
            return before
        if self.block.text_first and text is not None:
            return torch.cat([text, before], 1)
        raise SettingError(
            f"site=residual: the first block's input {tuple(before.shape)} is another stream than what the last, a "
            f"{self.block.kind}, returns {tuple(image.shape)}: use site=stack"
        )


class RunHook(StreamHook):
    """On a block of the site `blocks`. A computed step keeps what a run of consecutive such blocks adds to the streams;
    a skipped step adds the prediction of that instead of running them."""

    def __init__(self, session: "Session", block: torch.nn.Module, name: str, first: bool, last: bool):
        super().__init__(session, block)
        self.name, self.first, self.last = name, first, last

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        branch, skip = self.session.current, self.session.skips(self.name)
        if self.first or skip:
            image, other = self.image_in(args, kwargs), self.other_in(args, kwargs)
        if self.first:
            branch.run_input = image, other
        output = None if skip else self.forward(*args, **kwargs)
        if self.last:
            # Not the last block's input: what the model adds between two blocks, as for ControlNets, is in `added`.
            (before, other_before), branch.run_input = branch.run_input, None
            if skip:
                added = self.session.predict(self.name)
                added, other_added = (added, None) if torch.is_tensor(added) else added
                image, other = before + added, other_before if other_added is None else other_before + other_added
            else:
                added, after = self.image(output) - before, self.other(output)
                self.session.keep(self.name, added if after is None else (added, after - other_before))
        return self.result(image, other) if skip else output


class ProbeHook(SessionHook):
    """On the first block, where the site itself has no hook: an online schedule decides before the block runs."""

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        self.session.decide(module, args, kwargs)
        return self.forward(*args, **kwargs)


class Verifier(Protocol):
    """Compares the last block's predicted output with its computed one."""

    def verifies(self, context: "Branch") -> bool:
        """Whether this skipped step also runs the last block with computed modules."""
        ...

    def verify(self, context: "Branch", draft: torch.Tensor, real: torch.Tensor) -> None:
        """Gets the last block's image stream with predicted modules (`draft`) and with computed ones (`real`), (B, N,
        D)."""
        ...


class VerifyHook(StreamHook):
    """On the last block. On a skipped step that the verifier wants to look at, the block runs twice: once with its
    modules predicted, and once with its modules computed."""

    def __init__(self, session: "Session", block: torch.nn.Module, verifier: Verifier):
        super().__init__(session, block)
        self.verifier = verifier

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        branch, verifier = self.session.current, self.verifier
        draft = self.forward(*args, **kwargs)
        if branch.skip and verifier.verifies(branch):
            branch.skip, branch.verifying = False, True
            real = self.forward(*args, **kwargs)
            branch.skip, branch.verifying = True, False
            verifier.verify(branch, self.image(draft), self.image(real))
        return draft


class ModuleHook(SessionHook):
    """Keeps and predicts one attention or feed-forward output (a tensor or a tuple of tensors)."""

    def __init__(self, session: "Session", name: str):
        super().__init__(session)
        self.name = name

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        if self.session.skips(self.name):
            self.session.left_out(module)
            return self.session.predict(self.name)
        output = self.forward(*args, **kwargs)
        if not self.session.current.verifying:
            self.session.keep(self.name, output)
        return output


class FeederHook(SessionHook):
    """On a module whose output only kept modules read. If all of these are predicted, the module does not run: the hook
    returns an empty tensor, which takes neither time nor memory.

    Args:
        readers: names of the block's kept modules.
    """

    def __init__(self, session: "Session", readers: list[str]):
        super().__init__(session)
        self.readers = readers

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        if all(self.session.skips(name) for name in self.readers):
            self.session.left_out(module)
            nothing = (args[0] if args else kwargs["hidden_states"])[..., :0]
            text = kwargs.get("encoder_hidden_states")
            return nothing if text is None else (nothing, text[..., :0])
        return self.forward(*args, **kwargs)


class EmbedderHook(SessionHook):
    """On an embedder whose output only the blocks read. On a skipped step the output is not used, but code between the
    blocks may still compute with it, as ControlNets do. So the hook returns zeros of the same shape, which take no
    memory. Outside of the model's calls it does nothing: a ControlNet may share the embedder (Z-Image)."""

    @leave_uncompiled
    def new_forward(self, module: torch.nn.Module, *args, **kwargs) -> Any:
        branch = self.session.current
        if branch is None:
            return self.forward(*args, **kwargs)
        if branch.skip:
            return branch.placeholders[self]
        output = self.forward(*args, **kwargs)
        if self not in branch.placeholders:
            branch.placeholders[self] = tree_map(_zeros_like, output)
        return output


def _zeros_like(value):
    return value.new_zeros(()).expand(value.shape) if torch.is_tensor(value) else value
