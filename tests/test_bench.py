"""The benchmark of published sizes, on tiny ones."""

import sys
from importlib.util import find_spec

import pytest
import torch

from dpcache.denoisers import denoiser
from scripts.bench_full_size import METHODS, Operations, benchmark, main, table
from scripts.rollout import Rollout, caching, untouched

pytestmark = pytest.mark.ci
_FLUX = "in_channels=8 joint_attention_dim=16 pooled_projection_dim=16 axes_dims_rope=[4,6,6]"
_HUNYUAN = "num_refiner_layers=1 text_embed_dim=16 pooled_projection_dim=16 rope_axes_dim=[4,6,6]"
TINY = {  # model: its tiny configuration, beside two heads of 16
    "flux": f"num_layers=2 num_single_layers=3 {_FLUX}",
    "dit": "num_layers=3 sample_size=6",
    "hunyuan_video": f"num_layers=2 num_single_layers=2 {_HUNYUAN}",
    "wan21_t2v_14b": "num_layers=3 ffn_dim=32 text_dim=16 freq_dim=16",
}
HEADS, CALL = "num_attention_heads=2 attention_head_dim=16", "height=48 width=48 num_frames=1 max_sequence_length=3"
# Diffusers offers none of its caches for it; a learned variance; 3 x 3 tokens, which have no cells of 2 x 2.
FAILING = {
    ("dit", name)
    for name in (
        *("diffusers_taylorseer", "diffusers_taylorseer_lite", "first_block_cache", "magcache"),
        *("easycache", "toca"),
    )
}


def tiny(model: str) -> Rollout:
    return Rollout(model, 8, config=f"{HEADS} {TINY[model]}", call=CALL)


@pytest.fixture(scope="module", params=TINY)
def measured(request):
    rollout = tiny(request.param)
    return request.param, rollout, benchmark(rollout, METHODS, [4], repeats=1)


def test_every_method_computes_the_budget_and_skipped_steps_do_less(measured):
    name, _, (full, *rows) = measured
    assert full.computed == list(range(8))
    for row in rows:
        if (name, row.name) in FAILING:
            assert row.failure.startswith("SettingError: ")
            continue
        if row.name.startswith("dbcache") and not find_spec("cache_dit"):
            assert "'.[peers]'" in row.failure
            continue
        assert not row.failure and len(row.computed) == row.budget == 4 and row.computed[0] == 0
        skipped = [row.operations[step] for step in row.skipped]
        assert max(skipped) < min(row.operations[step] for step in row.computed) <= full.operations[0] + 60
        assert len(row.times) == 1 and min(row.times[0]) > 0


def test_the_table_has_every_row(measured):
    _, _, rows = measured
    header, _, *lines = table(rows, 8, 4).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in ("full", *METHODS)]
    assert {line.count("|") for line in [header, *lines]} == {header.count("|")}


def test_added_memory_is_that_of_the_features(measured):
    name, rollout, rows = measured
    config, branches, batch = rollout.transformer.config, len(rollout.branches), rollout.batch
    width, row = config.num_attention_heads * config.attention_head_dim, {row.name: row for row in rows}
    features = 3 * branches * batch * 9 * width * 4  # keys, 9 tokens, float32
    assert 0 <= row["dpcache"].memory - features < 100  # zeros that stand for the embedders' outputs
    prediction = branches * batch * (2 if name == "dit" else 1) * rollout.start.numel() * 4
    assert 0 <= row["uniform_skip"].memory - prediction < 100


def test_methods_leave_the_model_as_it_was(measured):
    name, rollout, _ = measured
    names = [name for name, _ in tiny(name).transformer.named_modules()]
    assert [name for name, _ in rollout.transformer.named_modules()] == names
    modules = rollout.transformer.modules()
    assert not any("_is_cached" in vars(module) or "forward" in vars(module) for module in modules)


def test_an_online_method_computes_the_steps_that_it_is_told():
    rollout, computed, plan = tiny("flux"), set(), [0, 1, 4, 7]
    with caching(rollout, "teacache", plan):
        last = rollout.transformer.single_transformer_blocks[-1].attn.to_q
        handle = last.register_forward_hook(lambda *_: computed.add(rollout.step))
        rollout(Operations())
        handle.remove()
    assert sorted(computed) == plan and denoiser(rollout) is rollout.transformer


def test_cache_dit_that_is_not_installed_is_a_row(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    run = "bench --model flux --steps 6 --budgets 3 --repeats 1 --device cpu --methods dbcache fora"
    sizes = ["--config", f"{HEADS} {TINY['flux']}", "--call", CALL]
    monkeypatch.setattr(sys, "argv", [*run.split(), *sizes])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("flux, small: ") and "latents (1, 9, 8), torch.float32" in lines[0]
    assert "pip install -e '.[peers]'" in lines[-2] and lines[-1].startswith("| fora | 3 |")


def test_a_model_without_a_small_size_needs_one_to_be_given(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--model", "qwen_image", "--device", "cpu"])
    with pytest.raises(SystemExit):
        main()
    assert "there is no small size of qwen_image, only of flux, dit" in capsys.readouterr().err


def test_untouched_restores_what_changed():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    with untouched(model):
        first = model[0]
        first.forward = None
        del model._modules["0"]
        model._modules["0"] = first
        model.patched = True
    assert list(model._modules) == ["0", "1"] and "forward" not in vars(model[0]) and not hasattr(model, "patched")
