# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#     "vbench==0.1.5",
#     "pyiqa==0.1.10",
#     "timm==1.0.12",
#     "eva-decord==0.6.1",
#     "opencv-python-headless<4.12",
#     "setuptools<70",
#     "numpy<2",
#     "torch<2.9",
#     "torchvision<0.24",
# ]
#
# [tool.uv]
# # The same modules come with the two above: uv would install decord again at every start, because its wheel calls
# # itself another version's, and the other OpenCV needs a display's libraries.
# override-dependencies = ["decord ; python_version < '3'", "opencv-python ; python_version < '3'"]
# ///
"""VBench (Huang et al., arXiv 2311.17982) of videos, in the environment that is described above.

    uv run --script vbench_scorer.py REQUEST RESULT --dimension NAME [--device NAME]

REQUEST is `{"videos": [{"path": "a.mp4"}, ...]}`, paths relative to the request's folder. No videos is a valid request:
it only finds out whether the weights can be had.

RESULT is written atomically, and the exit status is 0 whenever it was. It is one of

    {"videos": [{"path": "a.mp4", "score": 0.9}, {"path": "b.mp4", "error": "ValueError: ..."}, ...]}
    {"unavailable": {"reason": "...", "command": "what would fetch the weights"}}

with the videos in the request's order; one that cannot be read or scored costs its own score only. Any other failure
ends in a traceback, another exit status and no RESULT. Progress goes to stderr, one line per video.

Scores are what the package's own functions say of a set of one video: 0 to 1, higher is better, and 0 or 1 for
dynamic_degree. Of the package's 16 dimensions these seven ask nothing but the video.

The weights lie where the package keeps them, in the folder VBENCH_CACHE_DIR (default: ~/.cache/vbench), and those that
are missing are fetched from the addresses that it names. Pickled code in them is refused, and no other code is fetched.
"""

import argparse
import io
import json
import math
import os
import pickle
import shlex
import socket
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

# Python puts this file's folder first, where neighbours may be named like the modules that the package imports.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

CACHE = Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache/vbench").absolute()
CLIP = "https://openaipublic.azureedge.net/clip/models"
CLIP_B = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
CLIP_L = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
# Where each file comes from, and how its SHA-256 begins, where that is known.
WEIGHTS = {
    "dino_model/dino_vitbase16_pretrain.pth": (
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        None,
    ),
    "clip_model/ViT-B-32.pt": (f"{CLIP}/{CLIP_B}/ViT-B-32.pt", CLIP_B),
    "clip_model/ViT-L-14.pt": (f"{CLIP}/{CLIP_L}/ViT-L-14.pt", CLIP_L),
    "amt_model/amt-s.pth": ("https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth", None),
    "raft_model/models/raft-things.pth": ("https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip", None),
    "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth": (
        "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
        None,
    ),
    "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth": (
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        "358bb6af",
    ),
}


class Unavailable(Exception):
    """Weights cannot be had, for this reason; `command` would fetch `names`."""

    def __init__(self, reason: str, names: list[str]):
        super().__init__(reason.rstrip("."))
        self.command = " && ".join(map(fetching, names))


def fetching(name: str) -> str:
    """The command that fetches the file `name` of `WEIGHTS`."""
    file, url = CACHE / name, WEIGHTS[name][0]
    if not url.endswith(".zip"):
        return shlex.join(["curl", "-fL", "--create-dirs", "-o", str(file), url])
    archive, folder = file.parents[1] / Path(url).name, file.parents[1]
    download = shlex.join(["curl", "-fL", "--create-dirs", "-o", str(archive), url])
    return f"{download} && {shlex.join(['unzip', '-o', str(archive), '-d', str(folder)])}"


def one_line(error: Exception) -> str:
    """`Type: message`, the first line of it."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def fetch(name: str) -> None:
    """Download the file `name` of `WEIGHTS` to its place, which holds all of it or nothing."""
    from torch.hub import download_url_to_file

    file, (url, digest) = CACHE / name, WEIGHTS[name]
    print(f"VBench: fetching {url}", file=sys.stderr, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        part = Path(folder) / Path(url).name
        download_url_to_file(url, str(part), hash_prefix=digest, progress=False)
        if part.suffix == ".zip":
            with zipfile.ZipFile(part) as archive:
                part = Path(archive.extract(f"{file.parent.name}/{file.name}", folder))
        os.replace(part, file)


def locate(names: list[str]) -> list[Path]:
    """The files `names` of `WEIGHTS`, fetched where they are missing. Raises Unavailable."""
    missing = [name for name in names if not (CACHE / name).is_file()]
    for name in missing:
        try:
            fetch(name)
        except Exception as error:  # offline, gone, another file than before, disk full: each has a type of its own
            raise Unavailable(f"{CACHE / name} is missing and cannot be fetched: {one_line(error)}", missing) from error
    return [CACHE / name for name in names]


# Each takes the torch device and its files, and makes what scores a list of videos as the package does: the mean first.


def subject_consistency(device: str, checkpoint: Path) -> Callable:
    import torch
    from timm import create_model
    from torch.nn.functional import interpolate
    from vbench.subject_consistency import subject_consistency

    class Dino(torch.nn.Module):
        """DINO's ViT-B/16: features (N, 768) of images (N, 3, H, W) of any size.

        The package runs whatever code is on the main branch of DINO's repository. timm's transformer takes the same
        weights; its positions are stretched here, as in that code.
        """

        def __init__(self):
            super().__init__()
            self.vit = create_model("vit_base_patch16_224", num_classes=0)
            self.vit.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))

        def forward(self, images):
            patches = self.vit.patch_embed.proj(images)
            first, others = self.vit.pos_embed[:, :1], self.vit.pos_embed[:, 1:]
            if patches.shape[-2:] != (14, 14) or images.shape[-2] != images.shape[-1]:
                grid = others.reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
                scale = tuple((size + 0.1) / 14 for size in patches.shape[-2:])
                others = interpolate(grid, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
            tokens = patches.flatten(2).transpose(1, 2) + others
            tokens = torch.cat([(self.vit.cls_token + first).expand(len(images), -1, -1), tokens], dim=1)
            return self.vit.norm(self.vit.blocks(tokens))[:, 0]

    model = Dino().to(device).eval()
    return lambda videos: subject_consistency(model, videos, device, read_frame=False)


def background_consistency(device: str, vit: Path) -> Callable:
    import clip
    from vbench.background_consistency import background_consistency

    model, preprocess = clip.load(str(vit), device=device)
    return lambda videos: background_consistency(model, preprocess, videos, device, read_frame=False)


def temporal_flickering(device: str) -> Callable:
    from vbench.temporal_flickering import temporal_flickering

    return temporal_flickering


def motion_smoothness(device: str, checkpoint: Path) -> Callable:
    import vbench
    from vbench.motion_smoothness import MotionSmoothness, motion_smoothness

    config = Path(vbench.__file__).with_name("third_party") / "amt/cfgs/AMT-S.yaml"
    model = MotionSmoothness(str(config), str(checkpoint), device)
    return lambda videos: motion_smoothness(model, videos)


def dynamic_degree(device: str, checkpoint: Path) -> Callable:
    from easydict import EasyDict
    from vbench.dynamic_degree import DynamicDegree, dynamic_degree

    options = EasyDict(model=str(checkpoint), small=False, mixed_precision=False, alternate_corr=False)
    model = DynamicDegree(options, device)
    return lambda videos: dynamic_degree(model, videos)


def aesthetic_quality(device: str, vit: Path, head: Path) -> Callable:
    import clip
    from vbench.aesthetic_quality import get_aesthetic_model, laion_aesthetic

    model = get_aesthetic_model(str(head.parent)).to(device)
    features, _ = clip.load(str(vit), device=device)
    return lambda videos: laion_aesthetic(model, features, videos, device)


def imaging_quality(device: str, checkpoint: Path) -> Callable:
    from pyiqa.archs.musiq_arch import MUSIQ
    from vbench.imaging_quality import technical_quality

    model = MUSIQ(pretrained_model_path=str(checkpoint)).to(device).eval()
    return lambda videos: technical_quality(model, videos, device)


DIMENSIONS = {
    subject_consistency: ["dino_model/dino_vitbase16_pretrain.pth"],
    background_consistency: ["clip_model/ViT-B-32.pt"],
    temporal_flickering: [],
    motion_smoothness: ["amt_model/amt-s.pth"],
    dynamic_degree: ["raft_model/models/raft-things.pth"],
    aesthetic_quality: ["clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"],
    imaging_quality: ["pyiqa_model/musiq_spaq_ckpt-358bb6af.pth"],
}


def load(make: Callable, device: str) -> Callable:
    """What scores the videos of a dimension. Raises Unavailable."""
    names = DIMENSIONS[make]
    files = locate(names)
    try:
        return make(device, *files)
    except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        if not names:
            raise
        # torch's own message advises to load the file unsafely.
        refused = isinstance(error, pickle.UnpicklingError)
        why = "damaged, or more in it than tensors" if refused else one_line(error)
        raise Unavailable(f"{' or '.join(map(str, files))} cannot be loaded: {why}", names) from error


def score(dimension: Callable, videos: list[dict], folder: Path) -> list[dict]:
    """`{"path", "score"}` or `{"path", "error"}` for each of `videos`."""
    import cv2
    import torch

    results = []
    for number, video in enumerate(videos, 1):
        path = str(folder / video["path"])
        try:
            if (frames := int(cv2.VideoCapture(path).get(cv2.CAP_PROP_FRAME_COUNT))) < 2:
                raise ValueError(f"{max(frames, 0)} frames can be read, and two are the least to compare")
            with redirect_stderr(io.StringIO()), torch.no_grad():  # the package draws a bar for this one video
                value = float(dimension([path])[0])
            outcome = {"score": value} if math.isfinite(value) else {"error": f"the score is {value}"}
        except Exception as error:  # whatever a damaged file makes a decoder raise
            outcome = {"error": one_line(error)}
        results.append({"path": video["path"]} | outcome)
        print(f"VBench: {number} of {len(videos)} videos", file=sys.stderr, flush=True)
    return results


def main() -> None:
    dimensions = {make.__name__: make for make in DIMENSIONS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("request", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--dimension", required=True, choices=dimensions)
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    given = parser.parse_args()

    warnings.filterwarnings("ignore")  # the pinned versions' deprecations tell nobody anything
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # whatever the packages ask for, no pickled code is run
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    socket.setdefaulttimeout(60)  # a server that says nothing is a failed download
    videos = json.loads(given.request.read_text(encoding="utf-8"))["videos"]
    for video in videos:
        if not isinstance(video["path"], str):
            raise TypeError(f"paths must be strings, got {video['path']!r}")
    try:
        import torch

        device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dimension = load(dimensions[given.dimension], device)
        answer = {"videos": score(dimension, videos, given.request.resolve().parent)}
    except Unavailable as error:
        answer = {"unavailable": {"reason": str(error), "command": error.command}}
    part = given.result.with_name(f".{given.result.name}.{os.getpid()}.part")
    part.write_text(json.dumps(answer, indent=1), encoding="utf-8")
    os.replace(part, given.result)


if __name__ == "__main__":
    main()
