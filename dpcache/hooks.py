"""The hooks that skip blocks and modules, see `sites.py`.

Each asks the step cache (`cache.py`) whether the current step is skipped, and otherwise leaves its module alone.
With torch.compile a hook must not be traced, but what it wraps must. `torch.compiler.disable(recursive=False)` says so,
too, but asks the compiler again at every call (PyTorch 2.15): a quarter of a millisecond for every block of every step.
"""

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.utils.torch_utils import unwrap_module
from torch._dynamo.decorators import skip


class Hook(ModelHook):
    def __init__(self, cache):
        super().__init__()
        self.cache = cache


class StreamHook(Hook):
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


class BlockHook(StreamHook):
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


class RunHook(StreamHook):
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


class ProbeHook(Hook):
    """On the first block, where the site itself has no hook: an online schedule decides before the block runs."""

    @skip
    def new_forward(self, module, *args, **kwargs):
        self.cache.decide(module, args, kwargs)
        return self.fn_ref.original_forward(*args, **kwargs)


class VerifyHook(StreamHook):
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


class BranchHook(Hook):
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


class FeederHook(Hook):
    """On a module that only feeds a kept one: nothing of it is needed on a skipped step, not even memory."""

    @skip
    def new_forward(self, module, *args, **kwargs):
        if self.cache.current.skip:
            self.cache.left_out(module)
            nothing = (args[0] if args else kwargs["hidden_states"])[..., :0]
            text = kwargs.get("encoder_hidden_states")
            return nothing if text is None else (nothing, text[..., :0])
        return self.fn_ref.original_forward(*args, **kwargs)


class EmbedderHook(Hook):
    """On an embedder that feeds skipped blocks alone: a sliver of its input stands in for its output, which nobody
    reads. Six wide, because Wan cuts `time_proj`'s output in six, and joins those for text and image."""

    @skip
    def new_forward(self, module, *args, **kwargs):
        return args[0][..., :6] if self.cache.current.skip else self.fn_ref.original_forward(*args, **kwargs)
