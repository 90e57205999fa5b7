"""Embedded models that are loaded wrongly are found out before they make anything."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpcache.models import expectation
from dpcache.models.pretrained import EMBEDDED, load
from eval.metrics import Settings, clip


def copy_of(name, tmp_path):
    return shutil.copytree(EMBEDDED / name, tmp_path / name, ignore=shutil.ignore_patterns("*.png", "features_*"))


def spoil(path, name):
    """Other random weights of the same size in one matrix, as a library makes them that finds none under its name."""
    weights = load_file(path)
    found = next(key for key in weights if key.endswith(name))
    noise = torch.randn(weights[found].shape, generator=torch.Generator().manual_seed(0))
    save_file(
        weights | {found: (noise * weights[found].float().std()).to(weights[found].dtype)}, path, {"format": "pt"}
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["tiny_flux", "tiny_dit", "tiny_video"])
def test_embedded_models_make_what_they_should_in_every_dtype(name, dtype, monkeypatch):
    checked = []
    check = expectation.check
    monkeypatch.setattr(expectation, "check", lambda folder, made: checked.append(folder.name) or check(folder, made))
    pipe = load(name, dtype, "cpu", scheduler={"shift": 2.5} if name == "tiny_video" else None)
    assert checked == [name]
    assert pipe.transformer.dtype == getattr(torch, dtype)  # the check leaves the pipeline as it was


@pytest.mark.parametrize(
    "name, part, matrix",
    [
        ("tiny_flux", "text_encoder/model.safetensors", "position_embedding.weight"),
        ("tiny_flux", "text_encoder_2/model.safetensors", "SelfAttention.q.weight"),
        ("tiny_flux", "vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
        ("tiny_dit", "transformer/diffusion_pytorch_model.safetensors", "to_q.weight"),
        ("tiny_video", "text_encoder/model.safetensors", "SelfAttention.v.weight"),
    ],
)
def test_wrong_weights_in_any_part_end_the_load_with_the_versions(name, part, matrix, tmp_path):
    folder = copy_of(name, tmp_path)
    load(str(folder), "bfloat16", "cpu")
    spoil(folder / part, matrix)
    with pytest.raises(ValueError) as error:
        load(str(folder), "float32", "cpu")
    message = str(error.value)
    expected = json.loads((folder / "expectation.json").read_text())
    assert f"{name} is loaded wrongly here" in message and expected["settings"]["prompt"] in message
    assert f"torch {torch.__version__.split('+')[0]}" in message and expected["versions"] in message
    assert "\n" not in message


def test_wrong_weights_of_tiny_clip_end_the_run(tmp_path):
    folder = copy_of("tiny_clip", tmp_path)
    clip.load(Settings(clip_model=str(folder)))
    spoil(folder / "open_clip_model.safetensors", "positional_embedding")
    with pytest.raises(ValueError, match=r"tiny_clip is loaded wrongly here: its .* of the prompt 'red apple' deviate"):
        clip.load(Settings(clip_model=str(folder)))


@pytest.mark.parametrize("output", [[1.0, 2.1], [1.0, float("nan")], [1.0, 2.0, 3.0]])
def test_deviations_nan_and_other_sizes_are_refused(output, tmp_path):
    expectation.write(tmp_path, {"prompt": "dog"}, {"latents": [1.0, 2.0]})
    expectation.check(tmp_path, lambda settings: {"latents": [1.0, 2.001]})
    with pytest.raises(ValueError, match="its latents of the prompt 'dog' deviate by"):
        expectation.check(tmp_path, lambda settings: {"latents": output})


def test_a_folder_without_expectation_is_not_checked(tmp_path):
    expectation.check(tmp_path, lambda settings: pytest.fail("nothing to compare"))
