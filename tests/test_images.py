"""An image with each prompt: of pipelines that start a video from one, or edit it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import dpcache
from baselines.uniform_skip import uniform_skip
from dpcache.prompts import identity
from dpcache.sampler import generate
from dpcache.statistics import Gram
from eval import prompts
from eval.kept import Loaded
from eval.runs import Run, check, check_samples, read_prompts
from helpers.cases import case
from helpers.commands import compose, run

T = 4
CALL = {name: value for name, value in case("wan21_i2v").family.call.items() if name != "image"}
TEXTS = ("a red fox in the snow", "two boats", "a city at night", "an old clock")


def paint(path, seed: int):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 40, 3), np.uint8)).save(path)


@pytest.fixture
def file(tmp_path):
    """A prompt file beside a folder with its images, no two alike."""
    (tmp_path / "frames").mkdir()
    for index in range(len(TEXTS)):
        paint(tmp_path / f"frames/{index}.png", index)
    rows = [f"{text},frames/{index}.png" for index, text in enumerate(TEXTS)]
    (tmp_path / "mine.csv").write_text("\n".join(["prompt,image", *rows]))
    return tmp_path / "mine.csv"


def settings(file, *more: str):
    few = [f"num_inference_steps={T}", "num_prompts=2", "calibration.num_prompts=2", "budget=3"]
    config = compose("model=wan21_i2v", f"prompts={file}", *few, f"output_dir={file.parent / 'outputs'}", *more)
    config.model.call = CALL
    return config


def start(file) -> tuple[Run, list[str], list[str]]:
    """A run of the small pipeline, its prompts, and those to calibrate with."""
    config = settings(file)
    check(config)
    return Run(config, Loaded(case("wan21_i2v").pipe), file.parent / "run"), *read_prompts(config, True)


def by_hand(text: str, image, seed: int, **call) -> torch.Tensor:
    """Final latents of the pipeline itself."""
    generator = torch.Generator().manual_seed(seed)
    one = {"prompt": text, "image": Image.open(image), "num_inference_steps": T, "output_type": "latent"}
    return case("wan21_i2v").pipe(**one | CALL | call, generator=generator).frames


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_column_of_the_prompt_file_holds_the_images(tmp_path, name):
    folder = tmp_path / "pictures"
    folder.mkdir()
    paint(folder / "fox.png", 0)
    paint(folder / "mask.png", 1)
    row = {"Prompt": "a fox, running", "image": "fox.png", "Mask_Image": str(folder / "mask.png"), "id": "7"}
    if name == "a.jsonl":
        text = json.dumps(row)
    else:
        between = "," if name == "a.csv" else "\t"
        text = "\n".join(between.join(f'"{cell}"' for cell in line) for line in (row.keys(), row.values()))
    (folder / name).write_text(text)
    (found,) = prompts.read("prompts", folder / name, ["image", "mask_image"])
    assert found == "a fox, running" and set(found.load()) == {"image", "mask_image"}
    assert found.load()["image"].tobytes() == Image.open(folder / "fox.png").tobytes()
    assert prompts.read("prompts", folder / name) == [found]  # of a model that takes none
    assert not hasattr(prompts.read("prompts", folder / name)[0], "images")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "fox", r" has no images \(the model takes a csv, tsv or jsonl file with columns .* image\)"),
        ("a.csv", "prompt,picture\nfox,0.png", ", line 2: none of image is among its columns prompt, picture"),
        ("a.csv", "prompt,image\nfox,0.png\nboat,", ", line 3: image='' is not the file of an image"),
        ("a.csv", "prompt,image\nfox,0.png\nboat,1.png", ", line 3: image=.*1.png cannot be read: No such file"),
        ("a.csv", "prompt,image\nfox,0.png\nboat,text.png", ", line 3: image=.*text.png is not an image, or cut off"),
        ("a.csv", "prompt,image\nfox,cut.png", ", line 2: image=.*cut.png is not an image, or cut off"),
        ("a.jsonl", '{"prompt": "fox", "image": 7}', ", line 1: image=7 is not the file of an image"),
        ("a.jsonl", '"fox"', ", line 1: none of image is among its columns prompt"),
        ("none.csv", None, " is not a readable UTF-8 text file.*with columns for the prompt and its image"),
    ],
)
def test_a_missing_or_wrong_image_is_named_with_its_file_and_line(tmp_path, name, content, message):
    paint(tmp_path / "0.png", 0)
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:-99])
    (tmp_path / "text.png").write_text("no image")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(dpcache.SettingError, match=f"^prompts={tmp_path / name}{message}"):
        read_prompts(settings(tmp_path / name, f"num_prompts={message.count('line 3') + 1}"), False)


def test_each_prompt_starts_from_its_own_image(file):
    one, wanted, _ = start(file)
    samples, _ = one.samples(uniform_skip(T, T), wanted)
    expected = [by_hand(text, file.parent / f"frames/{i}.png", i) for i, text in enumerate(TEXTS[:2])]
    assert torch.equal(samples.latents, torch.cat(expected).float())
    swapped = by_hand(TEXTS[0], file.parent / "frames/1.png", 0)
    assert not torch.equal(swapped, expected[0])


def test_a_killed_run_ends_with_the_same_bits(file):
    one, wanted, _ = start(file)
    whole, _ = one.samples(uniform_skip(3, T), wanted)
    (one.folder / "samples/batch_0000.safetensors").unlink()
    one, wanted, _ = start(file)
    again, _ = one.samples(uniform_skip(3, T), wanted)
    assert torch.equal(again.latents, whole.latents) and torch.equal(again.images, whole.images)


def test_a_changed_image_meets_no_old_reference_calibration_or_sample(file):
    one, wanted, calibrating = start(file)
    keep = one.reference_folder(wanted, T)
    one.samples(uniform_skip(3, T), wanted)
    _, kept = one.calibration((), calibrating)
    (file.parent / "elsewhere").mkdir()
    moved = file.parent / "elsewhere/mine.csv"
    (file.parent / "frames").rename(file.parent / "elsewhere/frames")
    file.rename(moved)
    assert start(moved)[0].reference_folder(start(moved)[1], T).name == keep.name  # the same images elsewhere

    for name in ("0.png", "3.png"):
        paint(moved.parent / "frames" / name, 9)
    other, wanted, calibrating = start(moved)
    assert other.reference_folder(wanted, T).name != keep.name
    assert other.calibration((), calibrating)[1].name != kept.name
    other.folder = one.folder
    with pytest.raises(dpcache.SettingError, match="was made from other prompts or images"):
        other.samples(uniform_skip(3, T), wanted)
    with pytest.raises(dpcache.SettingError, match="overwrite=true makes it again"):
        check_samples(other.config, one.folder, wanted)


def test_a_calibration_remembers_its_images_and_refuses_others(file):
    pipe, own = case("wan21_i2v").pipe, [dpcache.Prompt(TEXTS[0], image=file.parent / "frames/0.png")]
    calibration = dpcache.calibrate(pipe, own, T, (), **CALL)
    path = file.parent / "calibration.safetensors"
    calibration.save(path)
    again = dpcache.Calibration.load(path)
    again.measure(pipe, [Gram("output")])
    assert torch.equal(torch.as_tensor(again.latents), by_hand(TEXTS[0], file.parent / "frames/0.png", 0))
    assert identity(again.made_from["prompts"]) == identity(own)
    again.save(path)
    paint(file.parent / "frames/0.png", 9)
    with pytest.raises(dpcache.SettingError, match=f"{TEXTS[0]}.*0.png is not the image that it was"):
        dpcache.Calibration.load(path).rerun(pipe, uniform_skip(3, T))
    with pytest.raises(dpcache.SettingError, match=r"dpcache.Prompt\(text, image=FILE\)"):
        image = Image.open(file.parent / "frames/1.png")
        dpcache.calibrate(pipe, TEXTS[:1], T, (), image=image, **CALL).save(path)


def test_images_are_refused_where_they_would_be_lost_or_mixed(file):
    pipe, frames = case("wan21_i2v").pipe, file.parent / "frames"
    one, two = (dpcache.Prompt(text, image=frames / f"{index}.png") for index, text in enumerate(TEXTS[:2]))
    for wanted, call, message in [
        ([one, two], {}, "2 prompts in one call, but those with images are sampled with batch_size=1"),
        ([one], {"image": Image.open(frames / "1.png")}, "image is given twice"),
        ([TEXTS[0]], {"image": str(frames / "1.png")}, "an image comes with its prompt"),
        ([dpcache.Prompt(TEXTS[0], mask=frames / "1.png")], {}, "WanImageToVideoPipeline does not take mask"),
    ]:
        with pytest.raises(dpcache.SettingError, match=message):
            generate(pipe, wanted, range(len(wanted)), T, decode=False, **CALL | call)
    with pytest.raises(dpcache.SettingError, match="batch_size=2 must be 1"):
        check(settings(file, "batch_size=2"))
    config = settings(file)
    config.model.call = CALL | {"image": "fox.png"}
    with pytest.raises(dpcache.SettingError, match=r"model\.call\.image: images stand in the prompt file"):
        check(config)


@pytest.mark.ci
def test_a_dry_run_needs_no_prompts_of_a_model_with_images(tmp_path):
    code, out, err = run("model=wan21_i2v", "method=fora", "dry_run=true", folder=tmp_path)
    assert code == 0 and "16 in batches of 1" in out, err
