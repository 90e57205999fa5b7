"""CLIP score: Hessel et al. 2021, "CLIPScore: a reference-free evaluation metric for image captioning"."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpcache.errors import SettingError
from eval.metrics.base import Metric, Samples, Scorer, Settings, Unavailable, placed, weights

BATCH = 32


def load(settings: Settings) -> Scorer:
    """How well each image fits its prompt, shape (N,): 100 times the cosine of their embeddings, 0 where that is
    negative, as papers and torchmetrics give it (Hessel et al. scale by 2.5 instead). Needs no reference. Scores of
    different CLIP models cannot be compared. Of a video, the mean over its frames. Prompts are cut at the model's
    context length.

    `settings.clip_model` is an architecture of open_clip, of which `settings.clip_pretrained` is a tag or a file of
    weights; or, with weights of its own, `hf-hub:OWNER/NAME`, a folder in open_clip's format, or `tiny_clip`.

    Raises SettingError for settings that open_clip does not know and where `tiny_clip` does not make what it should
    (see `dpcache.models.expectation`), Unavailable where the weights are missing.
    """
    import open_clip  # imported here: it takes seconds, which runs without CLIP need not wait for

    from dpcache.models import expectation
    from dpcache.models.pretrained import EMBEDDED

    name, pretrained = settings.clip_model, settings.clip_pretrained
    if name is None:
        raise Unavailable("no CLIP knows this model's prompts: set model.metrics.clip_model to one that does")
    tags = open_clip.list_pretrained_tags_by_model(name)
    folders = [EMBEDDED / name, Path(name).expanduser()]
    if found := [folder for folder in folders if (folder / "open_clip_config.json").is_file()]:
        name, pretrained = f"local-dir:{found[0]}", None
    elif name.startswith("hf-hub:"):
        pretrained = None
    elif name not in open_clip.list_models():
        raise SettingError(
            f"model.metrics.clip_model={name} is not tiny_clip, a folder with an open_clip_config.json, "
            f"hf-hub:OWNER/NAME, or one of {', '.join(open_clip.list_models())}"
        )
    elif pretrained not in tags and not Path(str(pretrained)).is_file():
        raise SettingError(
            f"model.metrics.clip_pretrained={pretrained} is not a file or one of the tags of {name}: {', '.join(tags)}"
        )
    fetch = f'python -c "import open_clip; open_clip.create_model({name!r}, pretrained={pretrained!r})"'
    with weights(f"CLIP weights {name} {pretrained or ''}".strip(), fetch):
        parts = model, preprocess, tokenize = open_model(name, pretrained)
    if found:
        expectation.check(found[0], functools.partial(embed, *parts))

    @torch.no_grad()
    def score(sample: Samples, reference: Samples) -> Tensor:
        frames, count = sample.videos.flatten(0, 1), sample.videos.shape[1]
        prompts = [prompt for prompt in sample.prompts for _ in range(count)]
        cosines = []
        with placed(model, settings.device):
            for start in range(0, len(prompts), BATCH):
                chunk = slice(start, start + BATCH)
                images = [preprocess(Image.fromarray(image.numpy())) for image in frames[chunk]]
                seen = model.encode_image(torch.stack(images).to(settings.device), normalize=True)
                read = model.encode_text(tokenize(prompts[chunk]).to(settings.device), normalize=True)
                cosines.append((seen * read).sum(1).cpu())
        return (100 * torch.cat(cosines)).clamp(min=0).unflatten(0, (-1, count)).mean(1)

    return score


def open_model(name: str, pretrained: str | None = None) -> tuple:
    """The model, its preprocessing of an image, and its tokenizer."""
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(name, pretrained)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@torch.no_grad()
def embed(model: torch.nn.Module, preprocess: Callable, tokenize: Callable, settings: dict) -> dict[str, np.ndarray]:
    """The embeddings of the prompt in `settings` and of a ramp of colours, for `dpcache.models.expectation`."""
    rows, columns = np.mgrid[:64, :64] * 4
    image = Image.fromarray(np.stack([rows, columns, 255 - rows], axis=-1).astype(np.uint8))
    return {
        "text": model.encode_text(tokenize([settings["prompt"]]), normalize=True).numpy(),
        "image": model.encode_image(preprocess(image)[None], normalize=True).numpy(),
    }


METRICS = (Metric(name="clip", load=load, label="CLIP score", higher_is_better=True),)
