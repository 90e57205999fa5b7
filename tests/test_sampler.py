"""Prompts that name a class, for pipelines that take classes."""

import diffusers
import pytest

from dpcache import SettingError
from dpcache.sampler import class_of
from helpers.families import image_vae


def pipeline(names: dict[int, str] | None) -> diffusers.DiTPipeline:
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1, "sample_size": 8}
    transformer = diffusers.DiTTransformer2DModel(in_channels=4, out_channels=4, num_embeds_ada_norm=10, **sizes)
    return diffusers.DiTPipeline(transformer, image_vae(), diffusers.DDIMScheduler(), names)


def test_a_class_is_given_by_a_name_or_its_number():
    pipe = pipeline({0: "cat, tabby", 3: "dog"})
    assert [class_of(pipe, prompt) for prompt in ("cat", "tabby", "dog", "0", "3")] == [0, 0, 3, 0, 3]
    for prompt in ("2", "9", "cow"):
        with pytest.raises(SettingError, match=rf"'{prompt}' is not one of the model's classes 0 to 3 \(cat, dog, tab"):
            class_of(pipe, prompt)


def test_classes_without_names_are_numbers():
    pipe = pipeline(None)
    assert [class_of(pipe, prompt) for prompt in ("0", "9")] == [0, 9]
    for prompt in ("10", "cat"):
        with pytest.raises(SettingError, match=f"'{prompt}' is not one of the model's classes 0 to 9$"):
            class_of(pipe, prompt)
