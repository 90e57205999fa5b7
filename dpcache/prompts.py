"""Prompts that come with images, for pipelines that edit an image or start a video from one."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from PIL import Image

from dpcache.errors import SettingError


class Prompt(str):
    """A prompt and the files of its images: `Prompt("make it snow", image="fox.png")`. As a string it is the prompt.

    Attributes:
        images: files by the pipeline's argument: `image`, `mask_image`, `last_image`, ...
        source: where the prompt stands, for messages.
    """

    images: dict[str, Path]
    source: str

    def __new__(cls, text: str, *, source: str | None = None, **images: str | Path):
        prompt = super().__new__(cls, text)
        prompt.images = {name: Path(file).expanduser().absolute() for name, file in sorted(images.items())}
        prompt.source = source or f"the prompt {text!r}"
        return prompt

    @cached_property
    def digests(self) -> dict[str, str]:
        """16 hex digits of each file's content when it was first read. Raises SettingError for a file that is no
        image."""
        found = {}
        for name, file in self.images.items():
            content = self._read(name)
            try:
                with Image.open(io.BytesIO(content)) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                raise SettingError(f"{self.source}: {name}={file} is not an image, or cut off") from None
            found[name] = _digest(content)
        return found

    def load(self) -> dict[str, Image.Image]:
        """The images, in RGB. Raises SettingError for a file that is no image, or that has changed."""
        from diffusers.utils import load_image  # here: prompts are read before the libraries

        loaded = {}
        for name, digest in self.digests.items():
            content = self._read(name)
            if _digest(content) != digest:
                raise SettingError(f"{self.source}: {name}={self.images[name]} is not the image that it was")
            loaded[name] = load_image(Image.open(io.BytesIO(content)))
        return loaded

    def _read(self, name: str) -> bytes:
        try:
            return self.images[name].read_bytes()
        except OSError as error:
            raise SettingError(
                f"{self.source}: {name}={self.images[name]} cannot be read: {error.strerror or error}"
            ) from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def identity(prompts: Sequence[str]) -> list:
    """What identifies these prompts, as JSON can hold it: for a prompt with images also digests of their contents, but
    not their paths. Raises SettingError for a file that is no image."""
    return [[str(prompt), prompt.digests] if isinstance(prompt, Prompt) else prompt for prompt in prompts]


def to_json(prompt: str) -> str | dict:
    """The prompt as a file keeps it."""
    if not isinstance(prompt, Prompt):
        return prompt
    images = {name: [str(file), prompt.digests[name]] for name, file in prompt.images.items()}
    return {"prompt": str(prompt), "images": images}


def from_json(kept: str | Mapping) -> str:
    """The prompt from what `to_json` returned. Its images are read when they are used."""
    if isinstance(kept, str):
        return kept
    prompt = Prompt(kept["prompt"], **{name: file for name, (file, _) in kept["images"].items()})
    prompt.digests = {name: digest for name, (_, digest) in kept["images"].items()}
    return prompt
