"""Features of the embedded model's 1,026 training images, the reference of its FID and KID.

    python scripts/tiny_flux_reference.py

Row i belongs to line i of the model's prompts.txt. The images come from npm, as for `train_tiny_flux.py`.
"""

import argparse
from pathlib import Path

from tqdm import tqdm
from training import load_emoji

from dpcache.models.pretrained import EMBEDDED
from eval.metrics import fid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/train_tiny_flux/data"))
    parser.add_argument("--extractor", choices=fid.EXTRACTORS, default="efficientnet_lite0")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    _, images, names = load_emoji(args.data)
    prompts = (EMBEDDED / "tiny_flux" / "prompts.txt").read_text().splitlines()
    pixels = ((images[[names.index(prompt) for prompt in prompts]] + 1) * 127.5).round().byte()
    features = fid.extract(fid.EXTRACTORS[args.extractor](), tqdm(pixels), args.device)
    fid.save_features(EMBEDDED / "tiny_flux" / f"features_{args.extractor}.safetensors", args.extractor, features)


if __name__ == "__main__":
    main()
