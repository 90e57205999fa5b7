"""CLIP score: Hessel et al. 2021, "CLIPScore: a reference-free evaluation metric for image captioning"."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dpcache.models.pretrained import EMBEDDED
from eval.metrics.base import Samples, Scorer, Settings, Unavailable, weights

BATCH = 32


def load(settings: Settings) -> Scorer:
    """How well each image fits its prompt, shape (N,): 100 times the cosine of their embeddings, 0 where that is
    negative, as papers and torchmetrics give it (Hessel et al. scale by 2.5 instead). Needs no reference. Scores of
    different CLIP models cannot be compared. Of a video, the mean over its frames. Prompts are cut at the model's
    context length.

    `settings.clip_model` is an architecture of open_clip, of which `settings.clip_pretrained` is a tag or a file of
    weights; or, with weights of its own, `hf-hub:OWNER/NAME`, a folder in open_clip's format, or `tiny_clip`.

    Raises ValueError for settings that open_clip does not know, Unavailable where the weights cannot be had.
    """
    import open_clip  # here: it takes seconds, which runs without CLIP need not wait for

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
        raise ValueError(
            f"model.metrics.clip_model={name} is not tiny_clip, a folder with an open_clip_config.json, "
            f"hf-hub:OWNER/NAME, or one of {', '.join(open_clip.list_models())}"
        )
    elif pretrained not in tags and not Path(str(pretrained)).is_file():
        raise ValueError(
            f"model.metrics.clip_pretrained={pretrained} is not a file or one of the tags of {name}: {', '.join(tags)}"
        )
    fetch = f'python -c "import open_clip; open_clip.create_model({name!r}, pretrained={pretrained!r})"'
    with weights(f"CLIP weights {name} {pretrained or ''}".strip(), fetch):
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained)
        tokenize = open_clip.get_tokenizer(name)
    model.eval()

    @torch.no_grad()
    def score(sample: Samples, reference: Samples) -> Tensor:
        model.to(settings.device)
        frames, count = sample.videos.flatten(0, 1), sample.videos.shape[1]
        prompts = [prompt for prompt in sample.prompts for _ in range(count)]
        cosines = []
        for start in range(0, len(prompts), BATCH):
            chunk = slice(start, start + BATCH)
            images = [preprocess(Image.fromarray(image.numpy())) for image in frames[chunk]]
            seen = model.encode_image(torch.stack(images).to(settings.device), normalize=True)
            read = model.encode_text(tokenize(prompts[chunk]).to(settings.device), normalize=True)
            cosines.append((seen * read).sum(1).cpu())
        return (100 * torch.cat(cosines)).clamp(min=0).unflatten(0, (-1, count)).mean(1)

    return score
