# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#     "image-reward==1.5",
#     "transformers==4.36.2",
#     "diffusers==0.26.3",
#     "huggingface-hub<0.25",
#     "accelerate<0.30",
#     "clip-anytorch==2.6.0",
#     "setuptools<80",
#     "datasets<3",
#     "pyarrow<20",
#     "numpy<2",
#     "torch<2.9",
# ]
# ///
"""ImageReward (Xu et al., arXiv 2304.05977) of images for their prompts, in the environment that is described above.

    uv run --script image_reward_scorer.py REQUEST RESULT [--weights PATH] [--device NAME] [--batch-size N]

REQUEST is `{"images": [{"path": "a.png", "prompt": "a cat"}, ...]}`, paths relative to the request's folder. No images
is a valid request: it only finds out whether the weights can be had.

RESULT is written atomically, and the exit status is 0 whenever it was. It is one of

    {"images": [{"path": "a.png", "score": 0.1}, {"path": "b.png", "error": "UnidentifiedImageError: ..."}, ...]}
    {"unavailable": {"reason": "...", "command": "what would fetch the weights"}}

with the images in the request's order; one that cannot be read or scored costs its own score only. Any other failure
ends in a traceback, another exit status and no RESULT. Progress goes to stderr, one line per batch.

Scores have no unit: the authors normalise them to zero mean and unit variance over their own data; higher is better.
As in the package, an image's centre square is scaled to 224 x 224 and a prompt is cut after 35 tokens.

The weights are ImageReward.pt, med_config.json and BERT's vocab.txt, fetched from the hub into its usual cache. With
`--weights`, ImageReward.pt comes from that folder (or is that file), and the others too where they lie beside it.
"""

import argparse
import json
import os
import shlex
import sys
import warnings
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Python puts this file's folder first, where neighbours may be named like the modules that the package imports.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

CHECKPOINT = "ImageReward.pt"
REPOSITORIES = {
    CHECKPOINT: "THUDM/ImageReward",
    "med_config.json": "THUDM/ImageReward",
    "vocab.txt": "google-bert/bert-base-uncased",
}
MAX_TOKENS = 35  # what the package's own `score` cuts prompts to


class Unavailable(Exception):
    """The weights cannot be had, for this reason; `command` would fetch them."""

    def __init__(self, reason: str, folder: Path | None = None):
        super().__init__(reason.rstrip("."))
        into = f" --local-dir {shlex.quote(str(folder))}" if folder else ""
        files: dict[str, list[str]] = {}
        for name, repository in REPOSITORIES.items():
            files.setdefault(repository, []).append(name)
        self.command = " && ".join(f"hf download {where} {' '.join(names)}{into}" for where, names in files.items())


def one_line(error: Exception) -> str:
    """`Type: message`, the first line of it."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def locate(name: str, weights: Path | None) -> Path:
    """The local file `name`, or the hub's. Raises Unavailable."""
    folder = None
    if weights:
        folder = weights.parent if weights.is_file() else weights
        file = weights if weights.is_file() and name == CHECKPOINT else folder / name
        if file.is_file():
            return file
        if name == CHECKPOINT:  # never score with other weights than those that were asked for
            raise Unavailable(f"{file} does not exist", folder)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORIES[name], name))
    except Exception as error:  # offline, gated, gone, disk full: each has a type of its own
        raise Unavailable(f"{name} cannot be fetched from the hub: {one_line(error)}", folder) from error


def build(med_config: Path, vocabulary: Path, device: str) -> "torch.nn.Module":
    """The package's `ImageReward` with its own initialisation, in evaluation mode."""
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip
    from transformers import BertTokenizer

    class Tokenizer(BertTokenizer):
        """The package asks the hub for a tokenizer by name; the vocabulary is here already."""

        @classmethod
        def from_pretrained(cls, *_, **__):
            return BertTokenizer(str(vocabulary))

    blip.BertTokenizer = Tokenizer
    model = ImageReward(str(med_config), device)
    have, want = len(model.blip.tokenizer), model.blip.text_encoder.config.vocab_size
    if have != want:
        raise Unavailable(f"{vocabulary} gives {have} tokens, and {med_config} asks for {want}", vocabulary.parent)
    return model.to(device).eval()


def trained_model(weights: Path | None, device: str) -> "torch.nn.Module":
    """ImageReward with the published weights, or those at `weights`. Raises Unavailable."""
    import torch

    checkpoint, med_config, vocabulary = (locate(name, weights) for name in REPOSITORIES)
    try:  # the package's own `load` would run whatever code a pickle holds
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # named only: torch's message advises to load it unsafely
        reason = f"{checkpoint} is damaged or holds more than tensors ({type(error).__name__}), so it is not loaded"
        raise Unavailable(reason, checkpoint.parent) from error
    model = build(med_config, vocabulary, device)
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except (RuntimeError, TypeError, AttributeError) as error:
        raise Unavailable(f"{checkpoint} does not fit the model: {one_line(error)}", checkpoint.parent) from error
    idle = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")  # not in the score
    if missing := [key for key in missing if not key.startswith(idle)]:
        raise Unavailable(f"{checkpoint} lacks {len(missing)} tensors such as {missing[0]}", checkpoint.parent)
    return model


def random_model(seed: int, folder: Path, device: str) -> "torch.nn.Module":
    """ImageReward of full size with random weights, for tests without the hub. Its vocabulary is single characters."""
    import torch

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = [*special, *characters, *(f"##{character}" for character in characters)]
    vocabulary, med_config = folder / "vocab.txt", folder / "med_config.json"
    vocabulary.write_text("\n".join([*words, *(f"[unused{index}]" for index in range(30522 - len(words)))]))
    med_config.write_text(json.dumps({"vocab_size": 30524, "add_cross_attention": True}))  # the rest is BERT's default
    torch.manual_seed(seed)
    model = build(med_config, vocabulary, device)
    for layer in model.mlp.layers:  # as the package starts it, the head shrinks differences below float32's resolution
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()
    return model


def score(model: "torch.nn.Module", images: list[dict], folder: Path, batch_size: int) -> list[dict]:
    """`{"path", "score"}` or `{"path", "error"}` for each of `images`."""
    import torch
    from PIL import Image

    results = [{"path": image["path"]} for image in images]
    for start in range(0, len(images), batch_size):
        pixels = {}
        for index in range(start, min(start + batch_size, len(images))):
            try:
                pixels[index] = model.preprocess(Image.open(folder / images[index]["path"]))
            except Exception as error:  # whatever a damaged file makes a decoder raise
                results[index]["error"] = one_line(error)
        if pixels:
            prompts = [images[index]["prompt"] for index in pixels]
            options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
            text = model.blip.tokenizer(prompts, **options).to(model.device)
            with torch.inference_mode():
                stacked = torch.stack(list(pixels.values())).to(model.device)
                scores = model.score_gard(text.input_ids, text.attention_mask, stacked)[:, 0]
            for index, value, finite in zip(pixels, scores.tolist(), scores.isfinite().tolist()):
                results[index] |= {"score": value} if finite else {"error": f"the score is {value}"}
        print(f"ImageReward: {min(start + batch_size, len(images))} of {len(images)} images", file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("request", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--weights", type=Path, help="folder that holds ImageReward.pt, or the file (default: the hub)")
    parser.add_argument("--random-weights", type=int, metavar="SEED", help="random weights instead, for tests")
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args()

    warnings.filterwarnings("ignore", category=FutureWarning)  # the pinned versions' deprecations tell nobody anything
    images = json.loads(given.request.read_text(encoding="utf-8"))["images"]
    for text in chain.from_iterable((image["path"], image["prompt"]) for image in images):
        if not isinstance(text, str):
            raise TypeError(f"paths and prompts must be strings, got {text!r}")
    try:
        import torch

        device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if given.random_weights is None:
            model = trained_model(given.weights, device)
        else:
            model = random_model(given.random_weights, given.result.resolve().parent, device)
        answer = {"images": score(model, images, given.request.resolve().parent, given.batch_size)}
    except Unavailable as error:
        answer = {"unavailable": {"reason": str(error), "command": error.command}}
    part = given.result.with_name(f".{given.result.name}.{os.getpid()}.part")
    part.write_text(json.dumps(answer, indent=1), encoding="utf-8")
    os.replace(part, given.result)


if __name__ == "__main__":
    main()
