"""Measures how well `tiny_flux` draws the images of its training, and how well `tiny_clip` names them.

    python scripts/evaluate_tiny_flux.py

It samples the first prompts of the model's list in 50 steps. For each sample it finds the nearest training image, by
cosine similarity of EfficientNet-Lite0's pooled ImageNet features, and the name that tiny_clip scores highest. It
prints the share of prompts whose own image (or name) is the nearest, and the share for which it is among the five
nearest.
"""

import argparse
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from dpcache.models.pretrained import EMBEDDED, load
from dpcache.sampler import generate
from eval.metrics import fid

EXTRACTOR = "efficientnet_lite0"


def report(what: str, similarity: torch.Tensor, names: list[str]) -> None:
    """Prints how often the largest entry of row i, which belongs to names[i], is in column i."""
    rank = (similarity > similarity.diagonal()[:, None]).sum(1)
    print(f"{len(rank)} images, {len(names)} {what}: top 1 {(rank == 0).float().mean():.1%}", end=", ")
    print(f"top 5 {(rank < 5).float().mean():.1%}")
    for name, row, r in zip(names, similarity, rank):
        if r:
            print(f"  {name}: nearest is {names[row.argmax()]}, own rank {r + 1}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED / "tiny_flux")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--batch", type=int, default=25)
    args = parser.parse_args()

    names = (args.model / "prompts.txt").read_text().splitlines()
    prompts = names[: args.prompts]
    pipe = load(str(args.model), "float32")
    pipe.set_progress_bar_config(leave=False)
    generated = []
    for start in tqdm(range(0, len(prompts), args.batch), desc="sampling"):
        chunk = prompts[start : start + args.batch]
        seeds = list(range(start, start + len(chunk)))
        batch = generate(pipe, chunk, seeds, 50, height=64, width=64, max_sequence_length=12)
        generated.append(torch.from_numpy(batch.images).permute(0, 3, 1, 2))
    generated = torch.cat(generated)
    found = fid.extract(fid.EXTRACTORS[EXTRACTOR](), tqdm(generated, desc="features"))
    images = fid.read_features(args.model / f"features_{EXTRACTOR}.safetensors", EXTRACTOR)
    report("training images", F.normalize(found) @ F.normalize(images).T, names)

    source = f"local-dir:{EMBEDDED / 'tiny_clip'}"
    clip, preprocess = open_clip.create_model_from_pretrained(source)
    pixels = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in generated])
    with torch.no_grad():
        seen = clip.eval().encode_image(pixels, normalize=True)
        read = clip.encode_text(open_clip.get_tokenizer(source)(names), normalize=True)
    report("names", seen @ read.T, names)


if __name__ == "__main__":
    main()
