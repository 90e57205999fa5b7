"""Every metric against a direct call of its library on the same images, and its promises about what is missing."""

import builtins
import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image import (
    learned_perceptual_image_patch_similarity,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.models import alexnet

from dpcache import quality
from dpcache.errors import SettingError
from dpcache.models.pretrained import EMBEDDED
from dpcache.sampler import generate
from eval import metrics, runs
from eval.metrics import Samples, Settings, fid
from eval.results import column
from helpers.commands import ENVIRONMENT, ROOT, TINY, compose, results, run

TINY_FLUX = EMBEDDED / "tiny_flux"
FEATURES = TINY_FLUX / "features_efficientnet_lite0.safetensors"
NAMES = (TINY_FLUX / "prompts.txt").read_text().splitlines()


def images(seed: int, number: int = 3, size: int = 24) -> np.ndarray:
    """Coarse noise: unlike plain noise it has structure at the scale that networks look at."""
    coarse = np.random.default_rng(seed).integers(0, 256, (number, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size))) for image in coarse])


def samples(seed: int, number: int = 3, **changes) -> Samples:
    latents = torch.from_numpy(np.random.default_rng(seed).normal(size=(number, 4, 5)))
    return Samples(**{"images": images(seed, number), "latents": latents, "prompts": NAMES[:number]} | changes)


def score(name: str, sample: Samples, reference: Samples, **settings) -> list[float]:
    """The metric as a run computes it; fails if it is unavailable."""
    values, unavailable, _ = metrics.evaluate(metrics.load([name], Settings(**settings)), sample, reference)
    assert not unavailable
    return values[name]


def tensors(sample: Samples) -> torch.Tensor:
    return sample.images.permute(0, 3, 1, 2)


# --- fidelity


def ssim_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 with an 11 x 11 Gaussian window, sigma 1.5, over the windows that lie inside the image."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def blur(z):
        return (np.lib.stride_tricks.sliding_window_view(z, (11, 11), (0, 1)) * window).sum((-2, -1))

    x, y = x.astype(np.float64), y.astype(np.float64)
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    return float((((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_fidelity_matches_formulas():
    x, ref = samples(0), samples(1)
    mixed = samples(0, images=(0.7 * ref.images.numpy() + 0.3 * x.images.numpy()).astype(np.uint8))
    names = ["psnr", "ssim", "latent_error"]
    values, unavailable, details = metrics.evaluate(metrics.load(names, Settings()), mixed, ref)
    assert not unavailable and not details
    a, b = mixed.images.numpy().astype(np.float64), ref.images.numpy().astype(np.float64)
    assert values["psnr"] == pytest.approx(10 * np.log10(255**2 / ((a - b) ** 2).mean((1, 2, 3))), abs=1e-4)
    assert values["ssim"] == pytest.approx([ssim_by_hand(p, q) for p, q in zip(a, b, strict=True)], abs=1e-4)
    z, z_ref = x.latents.numpy().reshape(3, -1), ref.latents.numpy().reshape(3, -1)
    expected = np.sqrt(((z - z_ref) ** 2).sum(1) / (z_ref**2).sum(1))
    assert values["latent_error"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["psnr", "ssim", "clip"])
def test_a_video_scores_the_mean_of_its_frames(name):
    settings = {"clip_model": "tiny_clip", "clip_pretrained": None}
    frames, others = (np.stack([images(seed + f, 2) for f in range(3)], 1) for seed in (0, 10))  # (2, 3, H, W, 3)
    others[0, 1] = frames[0, 1]  # one frame is alike: its PSNR counts as the cap, not as infinite
    video = [Samples(part, None, NAMES[:2]) for part in (frames, others)]
    single = [
        score(name, *(Samples(part[:, f], None, NAMES[:2]) for part in (frames, others)), **settings) for f in range(3)
    ]
    assert score(name, *video, **settings) == pytest.approx(np.mean(single, 0).tolist(), rel=1e-5)


def test_every_frame_of_a_video_counts_for_fid():
    frames = np.stack([images(seed, 2) for seed in range(3)], 1)
    video, flat = Samples(frames, None, NAMES[:2]), Samples(frames.reshape(6, 24, 24, 3), None, NAMES[:6])
    scored = [
        metrics.evaluate(metrics.load(["kid_efficientnet_lite0"], Settings(fid_reference=str(FEATURES))), s, s)
        for s in (video, flat)
    ]
    assert scored[0][0] == scored[1][0] and scored[0][2]["kid_efficientnet_lite0"]["n"] == 6


def test_psnr_and_ssim_agree_with_torchmetrics():
    x, ref = samples(0), samples(1)
    pair = tensors(x).double(), tensors(ref).double()
    direct = peak_signal_noise_ratio(*pair, data_range=255.0, dim=(1, 2, 3), reduction="none")
    assert score("psnr", x, ref) == pytest.approx(direct.tolist(), abs=1e-5)
    _, maps = structural_similarity_index_measure(*pair, data_range=255.0, return_full_image=True)
    direct = maps[..., 5:-5, 5:-5].mean((1, 2, 3))  # the windows inside the image, as in the paper
    assert score("ssim", x, ref) == pytest.approx(direct.tolist(), abs=1e-5)
    assert all(5 < value < 30 for value in score("psnr", x, ref)) and direct.std() > 1e-3


def test_identical_samples_are_finite():
    scorers = metrics.load(["psnr", "ssim", "latent_error"], Settings())
    values, unavailable, _ = metrics.evaluate(scorers, samples(0), samples(0))
    assert not unavailable
    assert values["psnr"] == [100.0] * 3 and values["latent_error"] == [0.0] * 3
    assert values["ssim"] == pytest.approx([1.0] * 3)


def test_shapes_never_broadcast():
    scorers = metrics.load(["psnr", "latent_error"], Settings())
    _, unavailable, _ = metrics.evaluate(scorers, samples(0), samples(1, images=images(1, 3, 32)))
    assert "image shapes differ" in unavailable["psnr"]
    _, unavailable, _ = metrics.evaluate(scorers, samples(0), samples(1, latents=torch.ones(3, 1, 5)))
    assert "latent shapes differ" in unavailable["latent_error"]


# --- records


@pytest.mark.parametrize("name", ["psnr", "ssim", "latent_error", "fid_efficientnet_lite0", "kid_efficientnet_lite0"])
def test_a_record_says_which_direction_is_better(name, folder, tmp_path):
    """Against samples that are the reference itself, noise must be worse."""
    real = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))[:6]])
    good, bad = (Samples(made, torch.from_numpy(made).float(), NAMES[:6]) for made in (real, images(77, 6) // 3))
    settings = {"fid_reference": str(folder), "cache": tmp_path / "features"}
    best, worst = (np.mean(score(name, made, good, **settings)) for made in (good, bad))
    assert bool(best > worst) is metrics.METRICS[name].higher_is_better


def test_a_new_metric_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "brightness.py").write_text(
        "from eval.metrics.base import Metric\n"
        "METRICS = (Metric(name='brightness', label='Brightness', higher_is_better=False, digits=1, unit='levels',\n"
        "    load=lambda settings: lambda sample, reference: sample.images.double().mean((1, 2, 3))),)\n"
    )
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    try:
        found = {metric.name: metric for metric in metrics._records()}
    finally:
        del sys.modules["eval.metrics.brightness"], metrics.brightness
    assert found.keys() - metrics.METRICS.keys() == {"brightness"}
    monkeypatch.setitem(metrics.METRICS, "brightness", found["brightness"])
    assert score("brightness", samples(0), samples(1)) == pytest.approx(images(0).mean((1, 2, 3)).tolist())
    assert column("brightness").title == "Brightness (levels)"


# --- LPIPS


@pytest.fixture
def torch_hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of torch.hub's, and no network."""
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def unreachable(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setattr("open_clip.factory.download_pretrained", unreachable)
    return folder


@pytest.mark.ci
def test_lpips_agrees_with_torchmetrics(torch_hub):
    """With a random AlexNet where torchvision keeps the real one."""
    x, ref = samples(0, images=images(0, 3, 64)), samples(1, images=images(1, 3, 64))
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(alexnet().state_dict(), torch_hub / "alexnet-owt-7be5be79.pth")
        pair = tensors(x) / 255, tensors(ref) / 255
        direct = learned_perceptual_image_patch_similarity(*pair, net_type="alex", reduction="none", normalize=True)
        found.append(score("lpips", x, ref))
        assert len(found[-1]) == 3 and found[-1] == pytest.approx(direct.flatten().tolist(), abs=1e-5)
        assert min(found[-1]) > 1e-3
    assert np.abs(np.subtract(*found)).min() > 1e-4  # the weights were read each time
    assert score("lpips", x, x) == [0.0] * 3


@pytest.mark.ci
def test_lpips_measures_in_a_search_for_a_quality(torch_hub):
    x, ref = samples(0, images=images(0, 3, 64)), samples(1, images=images(1, 3, 64))
    config = compose("quality=0.05", "quality_metric=lpips")
    with pytest.raises(SettingError, match=r"quality_metric=lpips: ImageNet weights .* cannot be loaded .*: python -c"):
        runs.check(config)
    torch.save(alexnet().state_dict(), torch_hub / "alexnet-owt-7be5be79.pth")
    runs.check(config)
    measure = runs.measure(config)
    pair = [part.images.numpy() for part in (x, ref)]
    assert measure.score(*pair).tolist() == score("lpips", x, ref) and measure.best == 0
    assert runs.measure(compose("quality=0.9", "quality_metric=ssim")).best == 1
    own = runs.measure(compose("quality=30", "quality_metric=psnr"))
    assert own.best is None and own.score(*pair).tolist() == pytest.approx(quality.PSNR.score(*pair))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["quality=101"], "quality=101.0 must be above 0 and at most 100 dB"),
        (["quality=1", "quality_metric=ssim"], "quality=1.0 must be above 0 and below 1: it is of SSIM"),
        (["quality=1", "quality_metric=clip"], "quality_metric=clip is not one of latent_error, lpips, psnr, ssim"),
        (["quality=1", "quality_metric=latent_error"], "needs the latents .*, and a search has images alone"),
        (["quality_metric=ssim"], "quality_metric=ssim is that of quality=, which is not given"),
    ],
)
def test_a_quality_that_cannot_be_is_told_before_the_model_is_loaded(settings, message):
    with pytest.raises(SettingError, match=message):
        runs.check(compose(*settings))


# --- CLIP


def cosines(sample: Samples) -> torch.Tensor:
    """100 times the cosines (N, N) of all images with all prompts, straight from open_clip."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{EMBEDDED / 'tiny_clip'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{EMBEDDED / 'tiny_clip'}")(sample.prompts)
    pixels = torch.stack([preprocess(Image.fromarray(image)) for image in sample.images.numpy()])
    with torch.no_grad():
        seen, read = model.eval().encode_image(pixels), model.encode_text(tokens)
    return 100 * torch.nn.functional.cosine_similarity(seen[:, None], read[None], dim=-1)


def test_clip_agrees_with_open_clip():
    sample = samples(3, number=40)  # more than one batch
    direct = cosines(sample)
    assert (direct < -1).any() and (direct > 1).any()
    for shift in (0, 1):
        prompts = sample.prompts[shift:] + sample.prompts[:shift]
        turned = Samples(sample.images, None, prompts)
        expected = direct.roll(-shift, dims=1).diagonal().clamp(min=0)
        assert score("clip", turned, turned, clip_model="tiny_clip") == pytest.approx(
            expected.tolist(), rel=1e-5, abs=1e-5
        )


@pytest.mark.ci
def test_clip_takes_a_named_architecture_with_a_file_of_weights(tmp_path):
    """The way of the papers' ViT-L-14, with the smallest architecture that open_clip names, random weights."""
    torch.manual_seed(0)
    model = open_clip.create_model("RN50")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    sample = samples(0, images=images(0, 3, 64))
    _, _, preprocess = open_clip.create_model_and_transforms("RN50")
    pixels = torch.stack([preprocess(Image.fromarray(image)) for image in sample.images.numpy()])
    with torch.no_grad():
        seen = model.eval().encode_image(pixels, normalize=True)
        read = model.encode_text(open_clip.get_tokenizer("RN50")(sample.prompts), normalize=True)
    direct = 100 * (seen * read).sum(1)
    found = score("clip", sample, sample, clip_model="RN50", clip_pretrained=str(tmp_path / "weights.pt"))
    assert found == pytest.approx(direct.clamp(min=0).tolist(), rel=1e-5, abs=1e-5) and direct.abs().min() > 1e-3


# --- FID and KID


@pytest.fixture
def folder(tmp_path) -> Path:
    """Reference images of two sizes, one in a folder below."""
    path = tmp_path / "real"
    (path / "more").mkdir(parents=True)
    for index, image in enumerate([*images(10, 9), *images(11, 3, 40)]):
        Image.fromarray(image).save(path / ("more" if index == 5 else ".") / f"{index:02d}.png")
    (path / "licence.txt").write_text("not an image")
    return path


def update(metric, sample: Samples, folder: Path):
    metric.update(tensors(sample), real=False)
    for file in sorted(folder.rglob("*.png")):
        metric.update(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None], real=True)
    torch.manual_seed(0)  # KID draws subsets
    return metric.compute()


@pytest.mark.ci
def test_fid_and_kid_agree_with_torchmetrics(folder, tmp_path):
    sample, network = samples(12, 8, images=images(12, 8) // 3), fid.EXTRACTORS["efficientnet_lite0"]()  # darker
    settings = {"fid_reference": str(folder), "cache": tmp_path / "features"}
    direct = update(FrechetInceptionDistance(feature=network), sample, folder).item()
    (found,) = score("fid_efficientnet_lite0", sample, sample, **settings)
    assert found == pytest.approx(direct, rel=1e-5) and direct > 1
    direct = update(KernelInceptionDistance(feature=network, subset_size=8), sample, folder)[0].item()
    (found,) = score("kid_efficientnet_lite0", sample, sample, **settings)
    assert found == pytest.approx(direct, rel=1e-5, abs=1e-5) and abs(direct) > 1e-3


@pytest.mark.ci
def test_inception_agrees_with_torchmetrics(folder, tmp_path, torch_hub, monkeypatch):
    """With a random Inception where torch-fidelity keeps the real one; KID only, as FID of 2,048 features is slow."""
    for file in sorted(folder.rglob("*.png"))[6:]:
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        torch.manual_seed(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), torch_hub / "weights-inception-2015-12-05-6726825d.pth")
    sample = samples(12, 5, images=images(12, 5) // 3)
    direct = update(KernelInceptionDistance(subset_size=5), sample, folder)[0].item()
    settings = {"fid_reference": str(folder), "cache": tmp_path / "features"}
    (found,) = score("kid_inception", sample, sample, **settings)
    assert found == pytest.approx(direct, rel=1e-5, abs=1e-5) and abs(direct) > 1e-3


def test_reference_features_are_kept_and_made_again_when_images_change(folder, tmp_path, monkeypatch):
    settings = {"fid_reference": str(folder), "cache": tmp_path / "features"}
    scorers = metrics.load(["kid_efficientnet_lite0"], Settings(**settings))
    first, _, details = metrics.evaluate(scorers, samples(12, 8), samples(12, 8))
    assert details == {"kid_efficientnet_lite0": {"n": 8, "reference_n": 12}}
    (kept,) = (tmp_path / "features").glob("*.safetensors")
    assert not list((tmp_path / "features").glob("*.part"))
    with monkeypatch.context() as patch:
        patch.setattr(fid, "_read_image", lambda file: pytest.fail("read again"))
        assert fid.load("kid", "efficientnet_lite0", Settings(**settings))
    Image.fromarray(images(99, 1)[0]).save(folder / "00.png")
    assert (
        score("kid_efficientnet_lite0", samples(12, 8), samples(12, 8), **settings) != first["kid_efficientnet_lite0"]
    )
    # The kept file is itself a reference.
    again = score("kid_efficientnet_lite0", samples(12, 8), samples(12, 8), fid_reference=str(kept))
    assert again == first["kid_efficientnet_lite0"]


def test_few_samples_are_scored_with_a_warning():
    scorers = metrics.load(["fid_efficientnet_lite0", "kid_efficientnet_lite0"], Settings(fid_reference=str(FEATURES)))
    values, unavailable, details = metrics.evaluate(scorers, samples(0), samples(0))
    assert not unavailable and len(values["fid_efficientnet_lite0"]) == 1
    assert details["fid_efficientnet_lite0"].pop("warning").startswith("3 samples do not determine the covariance")
    assert details["fid_efficientnet_lite0"] == details["kid_efficientnet_lite0"] == {"n": 3, "reference_n": 1026}
    values, unavailable, _ = metrics.evaluate(scorers, samples(0, 1), samples(0, 1))  # one sample has no spread
    assert not values and set(unavailable) == set(scorers)


def test_half_precision_suffices_for_reference_features(tmp_path):
    real, fake = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)).unbind()
    fid.save_features(tmp_path / "half.safetensors", "any", real.half())
    read = fid.read_features(tmp_path / "half.safetensors", "any")
    assert read.dtype == torch.float32
    for distance in (fid.fid, fid.kid):
        assert torch.allclose(distance(read, fake), distance(real, fake), rtol=1e-2)


@pytest.mark.ci
def test_what_ships_knows_the_embedded_model(pipe):
    """Of generated images the nearest reference features, and the best CLIP name, are those of their own prompts."""
    batch = generate(pipe, NAMES[:6], list(range(6)), 16, height=64, width=64, max_sequence_length=12)
    generated = torch.from_numpy(batch.images).permute(0, 3, 1, 2)
    network, real = fid.EXTRACTORS["efficientnet_lite0"](), fid.read_features(FEATURES, "efficientnet_lite0")
    assert real.shape == (len(NAMES), 1280) and real.dtype == torch.float32
    similarity = torch.nn.functional.normalize(fid.extract(network, generated)) @ torch.nn.functional.normalize(real).T
    assert (similarity.argmax(1) == torch.arange(6)).sum() >= 5
    padded = np.concatenate([batch.images, np.zeros((len(NAMES) - 6, 64, 64, 3), np.uint8)])
    assert (cosines(Samples(padded, None, NAMES))[:6].argmax(1) == torch.arange(6)).sum() >= 5


# --- what is missing or wrong


NEEDS_WEIGHTS = ["lpips", "clip", "fid_inception", "kid_inception"]


def test_missing_weights_give_the_reason_and_the_command(torch_hub):
    settings = Settings(fid_reference=str(FEATURES))  # CLIP: ViT-L-14 of openai
    scorers = metrics.load([*NEEDS_WEIGHTS, "psnr"], settings)
    values, unavailable, _ = metrics.evaluate(scorers, samples(0), samples(1))
    assert list(values) == ["psnr"] and set(unavailable) == set(NEEDS_WEIGHTS)
    for reason in unavailable.values():
        assert "no route to host" in reason and "\n" not in reason
        program, flag, code = shlex.split(reason.partition("with a connection: ")[2])
        assert (program, flag) == ("python", "-c")
        with pytest.raises(Exception, match="no route to host"):  # so the command does go and fetch
            exec(code)
    with pytest.raises(ValueError, match=r"4 of 5 metrics cannot be had: lpips: .* \| clip: .* \| kid_inception: "):
        metrics.load([*NEEDS_WEIGHTS, "psnr"], settings, require_all=True)


def test_missing_packages_give_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    error = metrics.load(["fid_efficientnet_lite0"], Settings())["fid_efficientnet_lite0"]
    assert isinstance(error, metrics.Unavailable) and "pip install efficientnet-lite-pytorch==0.1.0" in str(error)


class Malice:
    def __reduce__(self):
        return exec, ("import builtins; builtins.harmed = True",)


@pytest.mark.parametrize(
    ("name", "file"),
    [("lpips", "alexnet-owt-7be5be79.pth"), ("fid_inception", "weights-inception-2015-12-05-6726825d.pth")],
)
def test_code_in_weights_is_never_run(torch_hub, name, file):
    (torch_hub / file).write_bytes(pickle.dumps(Malice(), 2))
    error = metrics.load([name], Settings(fid_reference=str(FEATURES)))[name]
    assert isinstance(error, metrics.Unavailable) and not hasattr(builtins, "harmed")


WRONG = [
    ("clip", {"clip_model": "ViT-Z-99"}, r"clip_model=ViT-Z-99 is not tiny_clip, .*ViT-L-14"),
    ("clip", {"clip_model": "/no/such/folder"}, "clip_model=/no/such/folder is not"),
    ("clip", {"clip_pretrained": "closedai"}, r"clip_pretrained=closedai .* tags of ViT-L-14: openai"),
    ("clip", {"clip_pretrained": None}, "clip_pretrained=None"),
    ("fid_efficientnet_lite0", {"fid_reference": "/no/such/images"}, "fid_reference=/no/such/images is neither"),
    ("kid_efficientnet_lite0", {"fid_reference": "README.md"}, r"README.md is not a file of features"),
]


@pytest.mark.parametrize(("name", "settings", "message"), WRONG)
def test_wrong_settings_raise_before_anything_is_sampled(name, settings, message):
    with pytest.raises(ValueError, match=message):
        metrics.load([name], Settings(**settings))


def test_references_that_do_not_fit_are_named(folder, tmp_path, torch_hub, monkeypatch):
    monkeypatch.setitem(fid.EXTRACTORS, "inception", torch.nn.Identity)
    for reference, reason in ((str(FEATURES), "features of efficientnet_lite0"), (None, "no reference images")):
        error = metrics.load(["fid_inception"], Settings(fid_reference=reference))["fid_inception"]
        assert isinstance(error, metrics.Unavailable) and reason in str(error) and "folder" in str(error)
    (folder / "07.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"cannot be read: .*07.png"):
        metrics.load(["fid_efficientnet_lite0"], Settings(fid_reference=str(folder), cache=tmp_path / "features"))


def test_a_metric_that_fails_leaves_the_others(monkeypatch):
    def broken(sample, reference):
        raise RuntimeError("weights\nnot found")

    def absent(settings):
        raise ImportError("no such package")

    nan = torch.tensor([1.0, float("nan")])
    loads = {"broken": lambda settings: broken, "absent": absent, "nan": lambda settings: lambda *samples: nan}
    for name, load in loads.items():
        metric = metrics.Metric(name=name, label=name, higher_is_better=True, load=load)
        monkeypatch.setitem(metrics.METRICS, name, metric)
    scorers = metrics.load(["broken", "absent", "nan", "latent_error", "psnr"], Settings())
    values, unavailable, _ = metrics.evaluate(scorers, samples(0, latents=None), samples(1))
    assert list(values) == ["psnr"] and len(values["psnr"]) == 3
    assert unavailable["broken"] == "RuntimeError: weights not found"
    assert unavailable["absent"] == "ImportError: no such package"
    assert "1 of 2 values are not finite" in unavailable["nan"]
    assert "needs the latents" in unavailable["latent_error"]


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match=r"unknown metrics \['lpipz'\].*fid_inception.*latent_error.*psnr.*ssim"):
        metrics.load(["psnr", "lpipz"], Settings())
    with pytest.raises(ValueError, match="different prompts"):
        metrics.evaluate({}, samples(0), samples(1, prompts=NAMES[:3][::-1]))
    with pytest.raises(ValueError, match="uint8"):
        samples(0, images=images(0) / 255.0)
    with pytest.raises(ValueError, match="one length"):
        samples(0, prompts=NAMES[:2])


# --- runs


@pytest.mark.ci
def test_a_run_with_eval_offline_has_all_its_metrics(tmp_path):
    code, out, err = run("method=uniform_skip", "budget=4", "eval=offline", *TINY, folder=tmp_path)
    assert code == 0, err
    (result,) = results(tmp_path)
    wanted = OmegaConf.load(ROOT / "conf/eval/offline.yaml").metrics
    assert set(result["metrics"]) == set(wanted) and not result["metrics_unavailable"]
    assert 0 < result["metrics"]["clip"]["mean"] <= 100 and result["metrics"]["clip"]["ci95"][0] is not None
    distance = result["metrics"]["fid_efficientnet_lite0"]
    assert (distance["n"], distance["reference_n"], distance["ci95"]) == (4, 1026, [None, None])
    assert distance["mean"] > 0 and "4 samples" in distance["warning"]
    assert set(result["per_prompt"]) == {"prompts", "psnr", "ssim", "latent_error", "clip"}
    assert "n=4 against 1,026 images" in out and "4 samples do not determine" in out
    json.dumps(result, allow_nan=False)


@pytest.mark.ci
def test_paper_run_without_weights_ends_before_it_samples(tmp_path):
    wanted = [name for name in OmegaConf.load(ROOT / "conf/eval/paper.yaml").metrics if name != "image_reward"]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    homes = {name: str(tmp_path / "home") for name in ("TORCH_HOME", "HF_HOME")}
    arguments = ["eval=paper", f"eval.metrics=[{','.join(wanted)}]", "model.metrics.clip_model=ViT-B-32"]
    command = [sys.executable, str(ROOT / "run.py"), *arguments, "model.metrics.clip_pretrained=openai"]
    done = subprocess.run(
        [*command, "budget=4", *TINY, f"output_dir={tmp_path}"],
        env=ENVIRONMENT | nowhere | homes,
        capture_output=True,
        text=True,
        timeout=300,
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "eval.require_all=true, but 4 of 7 metrics cannot be had" in line
    assert line.count("with a connection: python -c") == 4
    assert not (tmp_path / "references").exists() and not (tmp_path / "calibrations").exists()
