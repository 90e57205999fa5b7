"""Measures how well `tiny_dit` draws what it is asked for, and how close its images are to real ones.

    python scripts/evaluate_tiny_dit.py
    python scripts/evaluate_tiny_dit.py --guidance 1 2 3 --scheduler ddpm --steps 250 --grid grid.png

It trains a small classifier on Fashion-MNIST's training images (kept in --work) and prints its accuracy on the test
set. For each guidance it prints the share of samples that the classifier assigns to the right class, and FID and KID of
these samples against the model's reference (EfficientNet-Lite0's features of 2,000 test images). For comparison it
prints FID and KID of as many training images.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline
from PIL import Image
from torch import nn
from tqdm import tqdm
from training import DTYPE, load_fashion, save

from dpcache.models.pretrained import EMBEDDED
from eval.metrics import fid

EXTRACTOR = "efficientnet_lite0"
SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


def build_classifier() -> nn.Sequential:
    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    head = [nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 4 * 4, 10)]
    return nn.Sequential(*stage(1, 32), *stage(32, 64), *stage(64, 128), *head)


def inputs_of(images: torch.Tensor) -> torch.Tensor:
    """The classifier's inputs: one channel of the uint8 images, scaled to 0..1."""
    return images[:, :1] / 255


def train_classifier(images: torch.Tensor, labels: torch.Tensor, epochs: int = 4, batch: int = 128) -> nn.Module:
    classifier = build_classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    generator = torch.Generator().manual_seed(0)
    bar = tqdm(total=steps, desc="classifier")
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(batch)[: len(images) // batch]:
            flipped = torch.rand(len(index), 1, 1, 1, generator=generator) < 0.5
            pixels = inputs_of(images[index])
            loss = F.cross_entropy(classifier(torch.where(flipped, pixels.flip(-1), pixels)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    return classifier


@torch.no_grad()
def classify(classifier: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([classifier(inputs_of(chunk)).argmax(1) for chunk in images.split(500)])


def sample(pipe: DiTPipeline, labels: list[str], guidance: float, steps: int, batch: int) -> torch.Tensor:
    """uint8 images (N, 3, 32, 32); image i starts from the noise of seed i."""
    torch.manual_seed(0)  # of DDPM's own noise
    images = []
    for start in tqdm(range(0, len(labels), batch), desc=f"guidance {guidance:g}"):
        chunk = labels[start : start + batch]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(chunk))]
        call = {"num_inference_steps": steps, "generator": generators, "output_type": "pt"}
        images.append(pipe(pipe.get_label_ids(chunk), guidance, **call).images)
    return (torch.cat(images) * 255).round().byte()


def save_grid(images: torch.Tensor, classes: torch.Tensor, path: Path, rows: int = 6) -> None:
    """Writes a picture with a column of images for each class."""
    columns = [torch.cat(list(images[classes == k][:rows]), dim=1) for k in range(10)]
    Image.fromarray(torch.cat(columns, dim=2).permute(1, 2, 0).numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMBEDDED / "tiny_dit")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--work", type=Path, default=Path("outputs/evaluate_tiny_dit"), help="keeps the classifier")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0], help="scales; 1 is none")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--grid", type=Path, help="where to draw the first samples of the last guidance")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    images, labels = load_fashion(args.data, "train")
    kept = args.work / "classifier.pt"
    if kept.exists():
        classifier = build_classifier()
        classifier.load_state_dict(torch.load(kept, weights_only=True))
    else:
        classifier = train_classifier(images, labels)
        save(classifier.state_dict(), kept)
    classifier.eval()
    test, test_labels = load_fashion(args.data, "t10k")
    right = (classify(classifier, test) == test_labels).float().mean()
    print(f"classifier: {right:.2%} of {len(test):,} test images")

    network = fid.EXTRACTORS[EXTRACTOR]()
    real = fid.read_features(args.model / f"features_{EXTRACTOR}.safetensors", EXTRACTOR)

    def distances(images: torch.Tensor) -> str:
        fake = fid.extract(network, tqdm(images, desc="features"))
        return f"FID {fid.fid(real, fake).item():.2f}, KID {fid.kid(real, fake).item():.5f}"

    print(f"{args.samples:,} training images: {distances(images[: args.samples])}")
    pipe = DiTPipeline.from_pretrained(args.model)
    pipe.scheduler = SCHEDULERS[args.scheduler].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.forward = torch.autocast("cpu", DTYPE)(pipe.transformer.forward)  # twice as fast
    prompts = (args.model / "prompts.txt").read_text().splitlines()
    asked = [prompts[i % len(prompts)] for i in range(args.samples)]
    classes = torch.tensor(pipe.get_label_ids(asked))
    for guidance in args.guidance:
        drawn = sample(pipe, asked, guidance, args.steps, args.batch)
        right = (classify(classifier, drawn) == classes).float()
        settings = f"{args.scheduler}, {args.steps} steps, guidance {guidance:g}, {args.samples:,} images"
        print(f"{settings}: {right.mean():.1%} as asked, {distances(drawn)}")
        shares = {label: f"{right[classes == index].mean():.0%}" for label, index in pipe.labels.items()}
        print("  " + ", ".join(f"{label} {share}" for label, share in shares.items()))
    if args.grid:
        save_grid(drawn, classes, args.grid)


if __name__ == "__main__":
    main()
