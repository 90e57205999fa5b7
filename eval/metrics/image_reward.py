"""ImageReward, a learned human preference score (Xu et al., arXiv 2304.05977), computed by a process of its own.

The `image-reward` package needs versions of other packages that conflict with ours, so `image_reward_scorer.py` runs in
an environment of about 6.5 GB, see `eval.metrics.isolated`.
"""

import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from dpcache.errors import SettingError
from eval.metrics.base import Metric, Samples, Scorer, Settings
from eval.metrics.isolated import TIMEOUT, Script, complete, needed

SCRIPT = Script("ImageReward", Path(__file__).with_name("image_reward_scorer.py"), "images")


def load(settings: Settings) -> Scorer:
    """`image_reward` with the weights of the settings, after a check that it can run.

    Raises Unavailable where the environment cannot be created or the weights are missing.
    """
    options = {"weights": settings.image_reward_weights, "device": str(settings.device)}
    with needed():
        check(**options)
    return partial(image_reward, **options)


def image_reward(sample: Samples, reference: Samples | None = None, **options) -> Tensor:
    """ImageReward of each image for its prompt, float64 (N,), without unit. No reference is used.

    Args:
        options: as for `score`.

    Raises:
        SettingError: videos; images that could not be scored, by name and reason.
        RuntimeError, TimeoutError: as `score`.
    """
    if sample.images.ndim == 5:
        raise SettingError("ImageReward scores images, not videos")
    with tempfile.TemporaryDirectory(prefix="image_reward_") as folder:
        paths = [Path(folder) / f"{index:04d}.png" for index in range(len(sample.images))]
        for path, image in zip(paths, sample.images, strict=True):
            Image.fromarray(image.numpy()).save(path)
        return complete(*score(paths, sample.prompts, **options), "images")


def score(
    images: Iterable[str | Path],
    prompts: Iterable[str],
    *,
    weights: str | Path | None = None,
    device: str | None = None,
    batch_size: int = 16,
    timeout: float = TIMEOUT,
    random_weights: int | None = None,
) -> tuple[Tensor, dict[Path, str]]:
    """Scores of N image files for their N prompts, all by one process.

    Args:
        weights: a folder that holds ImageReward.pt, or that file (default: from the hub, into its cache).
        device: torch device (default: cuda where there is one, else cpu).
        timeout: as for `Script.score`, like what is returned and raised.
        random_weights: a seed for random weights, which make scores without meaning, for tests.
    """
    pairs = [{"path": image, "prompt": prompt} for image, prompt in zip(images, prompts, strict=True)]
    flags = {"weights": weights, "device": device, "batch_size": batch_size, "random_weights": random_weights}
    return SCRIPT.score(pairs, timeout, **flags)


def check(**options) -> None:
    """Create the environment and load the weights, so that what is missing shows before any sampling.

    Args and errors as for `score`.
    """
    score([], [], **options)


METRICS = (Metric(name="image_reward", load=load, label="ImageReward", higher_is_better=True),)
