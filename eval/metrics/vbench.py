"""VBench's dimensions of video quality (Huang et al., arXiv 2311.17982), each computed by a process of its own.

The `vbench` package needs versions of other packages that conflict with ours, so `vbench_scorer.py` runs in an
environment of about 7.4 GB, see `eval.metrics.isolated`. VBench has 16 dimensions. These seven can score videos of any
prompts; the others need prompts of VBench's own list.
"""

import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import imageio.v3 as iio
from torch import Tensor

from dpcache.errors import SettingError
from eval.metrics.base import Metric, Samples, Scorer, Settings
from eval.metrics.isolated import TIMEOUT, Script, complete, needed

SCRIPT = Script("VBench", Path(__file__).with_name("vbench_scorer.py"), "videos")
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
# H.264 without loss: the package only reads MP4, and flickering is a difference of neighbouring frames.
LOSSLESS = {"codec": "libx264rgb", "pixelformat": "rgb24", "quality": None, "output_params": ["-crf", "0"]}


def load(dimension: str, settings: Settings) -> Scorer:
    """`vbench` of a dimension, after a check that it can run.

    Raises Unavailable where the environment cannot be created or the weights are missing.
    """
    options = {"dimension": dimension, "device": str(settings.device)}
    with needed():
        score([], **options)
    return partial(vbench, fps=settings.fps, **options)


def vbench(sample: Samples, reference: Samples | None = None, *, fps: float, **options) -> Tensor:
    """A dimension of each video, float64 (N,), 0 to 1. Neither prompts nor reference are used.

    Args:
        fps: frames per second, by which dynamic_degree chooses frames.
        options: as for `score`.

    Raises:
        SettingError: images; videos that could not be scored, by name and reason.
        RuntimeError, TimeoutError: as `score`.
    """
    if sample.images.ndim == 4:
        raise SettingError("VBench scores videos, not images")
    with tempfile.TemporaryDirectory(prefix="vbench_") as folder:
        paths = [Path(folder) / f"{index:04d}.mp4" for index in range(len(sample.images))]
        for path, video in zip(paths, sample.images, strict=True):
            iio.imwrite(path, video.numpy(), fps=fps, macro_block_size=1, **LOSSLESS)
        return complete(*score(paths, **options), "videos")


def score(
    videos: Iterable[str | Path], *, dimension: str, device: str | None = None, timeout: float = TIMEOUT
) -> tuple[Tensor, dict[Path, str]]:
    """Scores of N MP4 files, all by one process.

    Args:
        dimension: one of `DIMENSIONS`.
        device: torch device (default: cuda where there is one, else cpu).
        timeout: as for `Script.score`, like what is returned and raised.
    """
    return SCRIPT.score([{"path": video} for video in videos], timeout, dimension=dimension, device=device)


METRICS = tuple(
    Metric(
        name=f"vbench_{name}",
        load=partial(load, name),
        label=f"VBench {name.replace('_', ' ')}",
        higher_is_better=True,
    )
    for name in DIMENSIONS
)
