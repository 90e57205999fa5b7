"""The benchmark of full-size configurations, on tiny ones."""

import sys
from importlib.util import find_spec

import pytest
import torch

from scripts.bench_full_size import METHODS, MODELS, Rollout, benchmark, main, table, untouched

# No projection to predict; a learned variance; 3 x 3 tokens, which have no cells of 2 x 2.
FAILING = {("dit", name) for name in ("diffusers_taylorseer_lite", "easycache", "toca")}


@pytest.fixture(scope="module", params=MODELS)
def measured(request):
    rollout = Rollout(request.param, "tiny", 8, "cpu", torch.float32)
    return request.param, rollout, benchmark(rollout, list(METHODS), [4], repeats=1)


def test_every_method_computes_the_budget_and_skipped_steps_do_less(measured):
    name, _, (full, *rows) = measured
    assert full.computed == list(range(8))
    for row in rows:
        if (name, row.name) in FAILING:
            assert row.failure.startswith(("SettingError: ", "ValueError: "))
            continue
        if row.name.startswith("cache_dit") and not find_spec("cache_dit"):
            assert "'.[peers]'" in row.failure
            continue
        assert not row.failure and len(row.computed) == row.budget == 4 and row.computed[0] == 0
        skipped = [row.operations[step] for step in row.skipped_steps]
        assert max(skipped) < min(row.operations[step] for step in row.computed) <= full.operations[0] + 60
        assert row.own and row.skipped and row.full and row.loop


def test_the_table_has_every_row(measured):
    _, _, rows = measured
    header, _, *lines = table(rows, 8, 4).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in ("full", *METHODS)]
    assert {line.count("|") for line in [header, *lines]} == {header.count("|")}


def test_added_memory_is_that_of_the_features(measured):
    name, rollout, rows = measured
    config, branches, batch = rollout.model.config, len(rollout.branches), rollout.batch
    width, row = config.num_attention_heads * config.attention_head_dim, {row.name: row for row in rows}
    features = 3 * branches * batch * 9 * width * 4  # keys, 9 tokens, float32
    assert 0 <= row["dpcache"].memory - features < 100  # zeros that stand for the embedders' outputs
    prediction = branches * batch * (2 if name == "dit" else 1) * rollout.start.numel() * 4
    assert 0 <= row["uniform_skip"].memory - prediction < 100


def test_methods_leave_the_model_as_it_was(measured):
    _, rollout, _ = measured
    fresh = Rollout(measured[0], "tiny", 8, "cpu", torch.float32).model
    assert [name for name, _ in rollout.model.named_modules()] == [name for name, _ in fresh.named_modules()]
    assert not any("_is_cached" in vars(module) or "forward" in vars(module) for module in rollout.model.modules())


def test_cache_dit_that_is_not_installed_is_a_row(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    arguments = (
        "--model flux --scale tiny --steps 6 --budgets 3 --repeats 1 --device cpu --methods cache_dit_dbcache fora"
    )
    monkeypatch.setattr(sys, "argv", ["bench_full_size.py", *arguments.split()])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("flux, tiny: ")
    assert "pip install -e '.[peers]'" in lines[-2] and lines[-1].startswith("| fora | 3 |")


def test_untouched_restores_what_changed():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    with untouched(model):
        first = model[0]
        first.forward = None
        del model._modules["0"]
        model._modules["0"] = first
        model.patched = True
    assert list(model._modules) == ["0", "1"] and "forward" not in vars(model[0]) and not hasattr(model, "patched")
