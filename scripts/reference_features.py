"""Computes features of real images: the reference of an embedded model's FID and KID.

    python scripts/reference_features.py tiny_flux
    python scripts/reference_features.py tiny_dit

For `tiny_flux` these are its 1,026 training images; row i belongs to line i of its prompts.txt. For `tiny_dit` these
are the first 2,000 test images of Fashion-MNIST, stored in half precision to keep the file small. The images are
downloaded as for the training.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm
from training import load_emoji, load_fashion

from dpcache.models.pretrained import EMBEDDED
from eval.metrics import fid


def emoji(data: Path) -> torch.Tensor:
    _, images, names = load_emoji(data)
    prompts = (EMBEDDED / "tiny_flux" / "prompts.txt").read_text().splitlines()
    return ((images[[names.index(prompt) for prompt in prompts]] + 1) * 127.5).round().byte()


def fashion(data: Path) -> torch.Tensor:
    return load_fashion(data, "t10k")[0][:2000]


MODELS = {  # uint8 images, where their data are, how their features are stored
    "tiny_flux": (emoji, "outputs/train_tiny_flux/data", torch.float32),
    "tiny_dit": (fashion, "/usr/share/datasets/fashion-mnist", torch.float16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--extractor", choices=fid.EXTRACTORS, default="efficientnet_lite0")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    read, data, dtype = MODELS[args.model]
    images = read(args.data or Path(data))
    features = fid.extract(fid.EXTRACTORS[args.extractor](), tqdm(images), args.device).to(dtype)
    fid.save_features(EMBEDDED / args.model / f"features_{args.extractor}.safetensors", args.extractor, features)


if __name__ == "__main__":
    main()
