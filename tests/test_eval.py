"""The eval package against independent formulas, and its promises about failures."""

import io
import json
import logging
import os
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import wandb
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from eval import (
    charts,
    console,
    failures,
    leaderboard,
    methods,
    pictures,
    ranks,
    report,
    results,
    statistics,
    tables,
    timing,
    tracking,
)

PROMPTS = ["a red circle", "a small yellow star above a long grey line, seen from far away, oil on canvas", "two cats"]


def images(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)


# --- statistics


def test_the_interval_covers_the_mean(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    intervals = [statistics.summarise(rng.normal(3.0, 2.0, 40))["ci95"] for _ in range(300)]
    assert 0.90 <= np.mean([lo <= 3.0 <= hi for lo, hi in intervals]) <= 0.98


def test_the_interval_of_a_large_sample_is_the_normal_one():
    values = np.random.default_rng(1).normal(size=400)
    summary = statistics.summarise(values.tolist())
    half = 1.96 * values.std() / 20
    assert summary["mean"] == pytest.approx(values.mean()) and summary["n"] == 400
    assert summary["ci95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)
    assert summary == statistics.summarise(values) != statistics.summarise(values, seed=1)
    json.dumps(summary, allow_nan=False)


def test_pairing_removes_the_spread_between_prompts():
    rng = np.random.default_rng(2)
    prompt_effect = rng.normal(30, 5, 50)
    a, b = prompt_effect + 0.5 + rng.normal(0, 0.2, 50), prompt_effect
    lo, hi = statistics.paired_difference(a, b)["ci95"]
    assert 0.3 < lo < 0.5 < hi < 0.7
    assert statistics.summarise(a)["ci95"][0] < statistics.summarise(b)["ci95"][1]  # alone they overlap


def test_one_sample_has_no_interval_and_bad_values_are_refused():
    assert statistics.summarise([2.5]) == {"mean": 2.5, "ci95": [None, None], "n": 1}
    for bad in ([], [1.0, float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="finite numbers"):
            statistics.summarise(bad)
    with pytest.raises(ValueError, match="equal lengths"):
        statistics.paired_difference([1.0], [1.0, 2.0])


@settings(max_examples=20)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_the_interval_lies_within_the_values(values):
    lo, hi = statistics.summarise(values)["ci95"]
    assert min(values) - 1e-9 <= lo <= hi <= max(values) + 1e-9


# --- timing


def test_compare_alternates_and_takes_medians(monkeypatch):
    clock, calls = [0.0], []

    def fake(name, seconds):
        durations = iter(seconds)

        def call():
            calls.append(name)
            clock[0] += next(durations)

        return call

    monkeypatch.setattr(timing, "perf_counter", lambda: clock[0])
    reference, accelerated = fake("full", [100, 8, 10, 12]), fake("cached", [100, 4, 2, 2])
    result = timing.compare(reference, accelerated, repeats=3, warmup=1)
    assert calls == ["full", "cached"] * 4
    assert result["reference_all_s"] == [8, 10, 12] and result["cached_all_s"] == [4, 2, 2]
    assert (result["reference_s"], result["cached_s"], result["speedup"]) == (10, 2, 5)  # ratios 2, 5, 6
    assert result["speedup_range"] == [2, 6]
    with pytest.raises(ValueError, match="repeats"):
        timing.compare(reference, accelerated, repeats=0)


TIMED = {"reference_s": 10.0, "cached_s": 2.5, "speedup": 4.0, "reference_all_s": [10.0] * 3, "ideal_speedup": 5.0}


@pytest.mark.parametrize(
    "rounds, whole, transformer, spread, reason",
    [
        (3, [4.0, 4.2], [4.5, 4.9], 4.9 / 4.5 - 1, None),
        (3, [4.0, 4.2], [4.9, 5.1], 0.05, None),  # above 1, but not beyond the spread
        (3, [3.0, 4.5], [4.5, 4.9], 0.5, "the rounds differ by 50%"),
        (3, [4.0, 4.2], [4.5, 8.1], 0.8, "the rounds differ by 80%"),
        (3, [4.0, 4.2], [5.1, 5.2], 0.05, "every round is faster than its computed steps allow, by 2.0% and more"),
        (1, [4.0, 4.0], [4.5, 4.5], 0.0, "a single round has no spread"),
    ],
)
def test_an_efficiency_is_printed_only_where_the_rounds_agree_on_it(rounds, whole, transformer, spread, reason):
    timed = TIMED | {"reference_all_s": [10.0] * rounds, "speedup_range": whole}
    timed |= {"transformer_speedup": 4.6, "transformer_speedup_range": transformer, "efficiency": 0.92}
    found = timing.reliability(timed)
    assert found == {"spread": pytest.approx(spread), "unreliable": reason} | ({"efficiency": None} if reason else {})
    run = result("fora", 10, 30.0, timing=timed | found, metrics_unavailable={})
    text = console.summary(run, Path("out"))
    assert f"4.00x end to end (10.00 s -> 2.50 s), {whole[0]:.2f}x to {whole[1]:.2f}x" in text
    if reason is None:
        low, high = (value / 5 for value in transformer)
        assert f"4.60x of 5.00x ideal, efficiency 0.92, {low:.2f} to {high:.2f}" in text and "not reliable" not in text
    else:
        assert "efficiency" not in text and f"not reliable: {reason}" in text


def test_an_old_result_without_a_spread_is_not_called_reliable():
    run = result("fora", 10, 30.0, timing=TIMED | {"efficiency": 1.6}, metrics_unavailable={})
    text = console.summary(run, Path("out"))
    assert "not reliable" in text and "efficiency" not in text


def test_tables_say_which_speeds_are_not_reliable(tmp_path):
    for method, reason in (("fora", None), ("toca", "the rounds differ by 50%")):
        efficiency = None if reason else 0.8
        timed = {"speedup": 4.0, "speedup_range": [3.9, 4.1], "efficiency": efficiency, "unreliable": reason}
        (tmp_path / method).mkdir()
        (tmp_path / method / "result.json").write_text(json.dumps(result(method, 9, 30.0, timing=timed)))
    frame = results.collect(tmp_path)
    assert "| fora | 4.00 ± 0.10 |" in tables.table(frame, "speedup")
    assert "| fora | 0.80 |" in tables.table(frame, "efficiency")
    for metric in ("speedup", "efficiency"):
        assert "| toca | not reliable |" in tables.table(frame, metric)
    assert "not reliable" not in tables.table(frame, "psnr")


def test_efficiency_is_that_of_the_rounds_and_memory_and_versions_are_known():
    # Ratios of the same rounds: 2, 4, 5. The medians, 20 and 6, would give 3.3.
    assert timing.efficiency(50, 10, full_s=[20.0, 12.0, 30.0], cached_s=[10.0, 3.0, 6.0]) == {
        "transformer_speedup": 4.0,
        "transformer_speedup_range": [2.0, 5.0],
        "ideal_speedup": 5.0,
        "efficiency": 0.8,
    }
    assert 50e6 < timing.memory("cpu")["peak_rss"] < 1e12  # torch alone takes more than 50 MB
    found = timing.versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert (
        found["processor"] and {"python", "diffusers", "transformers", "torchmetrics", "numpy", "git"} <= found.keys()
    )


# --- pictures


def test_grid_shows_every_image(tmp_path):
    flat = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (10, 120, 200)])
    path = pictures.grid(tmp_path / "new" / "grid.png", {"full, 50 steps": flat, "cached": 255 - flat}, PROMPTS)
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert 1200 <= picture.shape[1] <= 1600
    for value in (10, 120, 200, 245, 135, 55):  # every cell keeps its exact colour over its whole area
        assert (picture == value).all(-1).sum() > 400 * 400
    assert os.listdir(tmp_path / "new") == ["grid.png"]  # no temporary file is left
    eight = pictures.grid(tmp_path / "eight.png", {"full": np.repeat(flat, 4, 0)}, PROMPTS * 4)
    assert 1300 <= Image.open(eight).width <= 1400
    with pytest.raises(ValueError, match="one shape"):
        pictures.grid(path, {"full": flat, "cached": flat[:2]}, PROMPTS)


def test_videos_are_shown_as_strips(tmp_path):
    video = np.stack([np.full((16, 16, 3), value, np.uint8) for value in range(10, 100, 10)])  # 9 frames
    strip = pictures.still(video)
    assert strip.shape == (16, 4 * 16 + 3, 3) and pictures.still(video[0]) is not None
    assert [strip[0, x, 0] for x in (0, 17, 34, 51)] == [10, 40, 60, 90]  # the first to the last
    assert (strip[:, 16] == 255).all()
    path = pictures.grid(tmp_path / "g.png", {"full": video[None], "cached": video[None]}, PROMPTS[:1])
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert all((picture == value).all(-1).any() for value in (10, 40, 60, 90))


def test_timeline_marks_computed_steps(tmp_path):
    picture = np.asarray(Image.open(pictures.timeline(tmp_path / "t.png", [0, 1, 30], 50, "dpcache")).convert("RGB"))
    line = picture[-12]  # below the numbers
    dark = (line == [0x1F, 0x4E, 0x79]).all(-1)
    starts = np.flatnonzero(dark[1:] & ~dark[:-1])
    assert len(starts) == 3 and (starts[2] - starts[0]) / (starts[1] - starts[0]) == pytest.approx(30, rel=0.05)
    with pytest.raises(ValueError, match=r"0\.\.49"):
        pictures.timeline(tmp_path / "t.png", [50], 50)


@pytest.mark.parametrize("axes", [3, 4])
def test_a_cost_of_any_history_is_drawn(tmp_path, axes):
    steps = 12
    *earlier, j, k = np.indices((steps,) + (steps + 1,) * (axes - 1))
    cost = np.where((earlier[-1] <= j) & (j < k), (k - j - 1.0) ** 2, np.inf)
    path = pictures.cost_heatmap(tmp_path / "c.png", cost, [0, 1, 2, 6])
    assert Image.open(path).size == (1000, 820) and path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="no finite positive"):
        pictures.cost_heatmap(path, np.full((3, 4, 4), np.inf), [0])


def drawn_texts(monkeypatch, module, draw) -> list[str]:
    """All texts that a picture shows."""
    figures = []
    monkeypatch.setattr(module, "save", lambda plot, path: (plot.savefig(io.BytesIO()), figures.append(plot)) and path)
    draw()
    return [text.get_text() for text in figures[0].findobj(Text) if text.get_text() and not text.get_parse_math()]


def test_dollars_are_no_formulas(tmp_path, monkeypatch):
    face, price = "a face with $_$ eyes", "mine $x^$"
    rows = dict.fromkeys((price, "full"), images(0)[:1])
    assert {price, face} <= set(drawn_texts(monkeypatch, pictures, lambda: pictures.grid("g.png", rows, [face])))
    assert price in drawn_texts(monkeypatch, pictures, lambda: pictures.timeline("t.png", [0], 3, price))
    for index, budget in enumerate((5, 9, 13)):
        lpips = {"mean": 0.1**index, "ci95": [None, None], "n": 1}
        content = result("fora", budget, 0.0, label=price, metrics={"lpips": lpips}, timing={"speedup": 50 / budget})
        write(tmp_path, str(budget), content)
    frame = results.collect(tmp_path)
    for few in (frame, frame[:2]):
        assert price in drawn_texts(monkeypatch, charts, lambda few=few: charts.figure("f.png", few, "lpips"))
    texts = drawn_texts(monkeypatch, charts, lambda: charts.pareto("p.png", frame, "lpips"))
    assert f"{price} 9" in texts and not any("mathdefault" in text for text in texts)
    cost = np.full((4, 5, 5), 1e-5) * 10.0 ** np.arange(5)
    texts = drawn_texts(monkeypatch, pictures, lambda: pictures.cost_heatmap("c.png", cost, [0, 2]))
    assert "1e\u221205" in texts and not any("mathdefault" in text for text in texts)


def test_a_write_that_fails_keeps_the_old_picture(tmp_path, monkeypatch):
    path = pictures.timeline(tmp_path / "t.png", [0], 5)
    before = path.read_bytes()
    monkeypatch.setattr("eval.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pictures.timeline(path, [0, 1], 5)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["t.png"]


# --- leaderboard


def result(method: str, budget: int, psnr: float, seed: int = 0, **changes) -> dict:
    return {
        "model": "tiny",
        "method": method,
        "budget": budget,
        "num_inference_steps": 50,
        "seed": seed,
        "computed_steps": float(budget),
        "schedules": [list(range(budget))],
        "metrics": {"psnr": {"mean": psnr, "ci95": [psnr - 2, psnr + 1], "n": 8}},
        "timing": {"speedup": 50 / budget, "reference_all_s": [1.0, 2.0]},
        "memory": {"peak_rss": 1},
        "versions": {"torch": "2"},
        "config_hash": "0",
    } | changes


@pytest.fixture
def runs(tmp_path):
    results = [
        result("zebra", 10, 21.0),
        result("dpcache", 10, 30.0),
        result("dpcache", 10, 32.0, seed=1),
        result("dpcache", 5, 25.0, metrics={"psnr": {"mean": 25.0, "ci95": [None, None], "n": 1}}),
        result("uniform_skip", 10, 20.0, metrics_unavailable={"ssim": "ImportError: no ssim"}),
        result("full", 50, 100.0),
        result("dpcache", 10, 40.0, model="other"),
    ]
    for index, content in enumerate(results):
        (tmp_path / f"run{index}").mkdir()
        (tmp_path / f"run{index}" / "result.json").write_text(json.dumps(content))
    for name, text in {"broken": "{", "foreign": '{"accuracy": 1}', "list": "[1]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    return tmp_path


def test_collect_flattens_and_names_what_it_skips(runs, caplog):
    frame = results.collect(runs)
    assert len(frame) == 7
    row = frame[(frame.method == "zebra")].iloc[0]
    assert (row.psnr, row.psnr_lo, row.psnr_hi, row.psnr_n) == (21.0, 19.0, 22.0, 8)
    assert (row.speedup, row.computed_steps, row.peak_rss, row.torch) == (5.0, 10, 1, "2")
    for name in ("broken", "foreign", "list"):
        assert f"{name}/result.json" in caplog.text


def test_table_orders_methods_and_separates_models(runs):
    frame = results.collect(runs)
    text = tables.table(frame)
    tiny = text[text.index("tiny, 50 steps") :].splitlines()
    assert tiny[2:] == [
        "| method | K = 5 | K = 10 | K = 50 |",
        "| --- | ---: | ---: | ---: |",
        "| full | – | – | 100.00 ± 1.50 |",
        "| uniform_skip | – | 20.00 ± 1.50 | – |",
        "| dpcache | 25.00 | 31.00 ± 1.50 | – |",  # two seeds, of which no scores of prompts are known
        "| zebra | – | 21.00 ± 1.50 | – |",
    ]
    assert "40.00" in text[: text.index("tiny, 50 steps")]
    with pytest.raises(ValueError, match="no result has 'lpips'"):
        tables.table(frame, "lpips")


def test_newest_of_repeated_runs_counts(runs):
    again = runs / "again" / "result.json"
    again.parent.mkdir()
    again.write_text(json.dumps(result("zebra", 10, 50.0)))
    os.utime(again, (1, 1))
    assert "| zebra | – | 21.00" in tables.table(results.collect(runs))
    os.utime(again, (2**32, 2**32))
    assert "| zebra | – | 50.00" in tables.table(results.collect(runs))


def write(folder: Path, name: str, content: dict, known: dict | None = None) -> None:
    """A run's folder with its result and, unless they are gone, its settings."""
    (folder / name / ".hydra").mkdir(parents=True)
    (folder / name / "result.json").write_text(json.dumps(content))
    if known is not None:
        (folder / name / ".hydra" / "config.yaml").write_text(json.dumps(known))  # which is YAML


def scored_run(method: str, values: list[float], **changes) -> dict:
    prompts = [f"prompt {index}" for index in range(len(values))]
    metrics = {"psnr": statistics.summarise(values)}
    return result(method, 10, 0.0, metrics=metrics, per_prompt={"prompts": prompts, "psnr": values}, **changes)


def test_runs_with_other_references_share_no_table(tmp_path):
    """The report's boards are of the same settings, see `report._data`."""
    made = {
        (0, 1.5): [scored_run("fora", [30, 31], reference="a"), scored_run("toca", [20, 22], reference="a")],
        (0, 4): [scored_run("fora", [40, 41], reference="b"), scored_run("toca", [10, 13], reference="b")],
        (100, 4): [scored_run("fora", [44, 45], reference="c", seed=100)],
    }
    for (seed, guidance), contents in made.items():
        for content in contents:
            call = {"model": {"call": {"guidance_scale": guidance}}, "seed": seed, "num_prompts": 2}
            write(tmp_path, f"{content['method']}-{guidance}-{seed}", content | {"config_hash": f"{guidance}"}, call)
    write(tmp_path, "more", scored_run("fora", [50, 51, 52], reference="d"), {"model": {}, "num_prompts": 3})
    frame = results.collect(tmp_path)
    text = tables.table(frame)
    for setup, cells in {
        "guidance_scale=1.5, num_prompts=2": ["| fora | 30.50", "| toca | 21.00"],
        "guidance_scale=4, num_prompts=2": ["| fora | 42.50", "| toca | 11.50"],  # the mean of two seeds
        "num_prompts=3": ["| fora | 51.00"],
    }.items():
        part = text.split(f"### PSNR (dB): tiny, 50 steps, {setup}\n")[1].split("###")[0]
        assert all(cell in part for cell in cells)
    assert text.count("###") == 3
    board = ranks.board(frame)
    assert (board["rank"] == 1).sum() == 4  # one for each setup and seed
    apart = ranks.differences(board)
    paired = {(board.loc[index, "setup"][15:18], abs(d.mean)) for index, found in apart.items() for d in found.values()}
    assert paired == {("1.5", 9.5), ("4, ", 29.0)}
    lines = tables.paired_table(frame, "fora").splitlines()[4:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| tiny, 50 steps, guidance_scale=1.5, num_prompts=2",
        "| tiny, 50 steps, guidance_scale=4, num_prompts=2",
    ]
    assert {part["setup"] for part in report._data(board, [], 0)["boards"]} == set(frame["setup"])
    assert tables.league(frame, [10]).count("### PSNR (dB): tiny") == 4


def test_more_seeds_of_the_same_prompts_make_no_narrower_interval(tmp_path):
    prompts = np.random.default_rng(0).normal(30, 5, 16)
    for seed in (0, 100, 200, 300):
        values = prompts + np.random.default_rng(seed).normal(0, 1, 16)
        write(tmp_path, str(seed), scored_run("fora", values.tolist(), reference=str(seed), seed=seed))
    frame = results.collect(tmp_path)
    ((_, board),) = results.boards(frame, "psnr")
    expected = statistics.summarise(np.mean([scores["psnr"] for scores in frame["scores"]], axis=0))
    (row,) = board.itertuples()
    assert (row.mean, [row.lo, row.hi]) == (pytest.approx(expected["mean"]), pytest.approx(expected["ci95"]))
    assert row.hi - row.lo > 0.9 * np.mean(frame["psnr_hi"] - frame["psnr_lo"])


def test_runs_whose_settings_are_gone_are_averaged_over_seeds_and_told_apart_by_their_references(tmp_path):
    for name, seed, psnr in (("aaaaaaaaaa", 0, 30), ("bbbbbbbbbb", 100, 32)):
        write(tmp_path, name, scored_run("fora", [psnr, psnr + 1], reference=name, seed=seed))
    assert "### PSNR (dB): tiny, 50 steps\n" in (text := tables.table(results.collect(tmp_path)))
    assert "| fora | 31.50" in text
    write(tmp_path, "cccccccccc", scored_run("toca", [40, 41], reference="cccccccccc"))
    frame = results.collect(tmp_path)
    assert set(frame["setup"]) == {"", "reference=aaaaaaaa", "reference=cccccccc"}


def test_two_fine_references_make_two_tables_and_a_run_without_one_belongs_to_the_only_one(tmp_path):
    for steps in (9, 16):
        content = scored_run("fora", [30, 31], reference="a", fine_reference=f"f{steps}", config_hash=str(steps))
        write(tmp_path, f"fora-{steps}", content, {"reference": {"num_inference_steps": steps}})
        if steps == 9:
            write(tmp_path, "toca", scored_run("toca", [30, 31], reference="a"), {"reference": {}})
            assert set(results.collect(tmp_path)["setup"]) == {""}
    names = [f"reference.num_inference_steps={steps}" for steps in (9, 16)]
    assert set(results.collect(tmp_path)["setup"]) >= set(names)


def test_runs_of_one_label_and_other_settings_both_stay(tmp_path):
    for name, known in {
        "a": {"method": {"_target_": "toca", "ratio": 0.5, "budget": 10}, "budget": 10},
        "b": {"method": {"_target_": "toca", "ratio": 0.75, "budget": 10}, "budget": 10},
        "c": None,
        "d": {"method": {"_target_": "toca", "ratio": 0.5, "budget": 10}, "budget": 10, "output_dir": "elsewhere"},
    }.items():
        content = scored_run("toca", [20, 22], reference="r", label="toca", config_hash="a" if name == "d" else name)
        write(tmp_path, name, content, known)
    frame = results.collect(tmp_path)
    assert sorted(results.newest(frame)["label"]) == ["toca", "toca ratio=0.5", "toca ratio=0.75"]
    for path in tmp_path.glob("*/.hydra/config.yaml"):
        path.unlink()
    labels = sorted(results.newest(results.collect(tmp_path))["label"])
    assert labels == [f"toca config_hash={name}" for name in "abc"]


def test_a_run_that_is_scored_again_is_no_newer(tmp_path):
    for name, psnr, ended in (("old", 20, 1), ("new", 30, 2)):
        write(tmp_path, name, scored_run("fora", [psnr, psnr], reference="r"))
        (tmp_path / name / "grid.png").touch()
        os.utime(tmp_path / name / "grid.png", (ended, ended))
    os.utime(tmp_path / "old" / "result.json", (2**32, 2**32))
    assert "| fora | 30.00" in tables.table(results.collect(tmp_path))


def test_the_newest_run_is_the_one_that_ended_last_whatever_became_of_its_files(tmp_path):
    for name, psnr, ended in (("old", 20, "2026-01-02T23:00:00+00:00"), ("new", 30, "2026-01-02T23:00:00.5+00:00")):
        write(tmp_path, name, scored_run("fora", [psnr, psnr], reference="r", ended=ended))
        (tmp_path / name / "grid.png").touch()
    os.utime(tmp_path / "new" / "grid.png", (1, 1))  # the other one has been copied since
    frame = results.collect(tmp_path)
    assert "| fora | 30.00" in tables.table(frame) and frame["written"].max() == 1767394800.5


def test_command_line_prints_and_reports_lost_metrics(runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["leaderboard", str(runs)])
    leaderboard.main()
    printed = capsys.readouterr().out
    assert "PSNR (dB): tiny" in printed and "speed-up: tiny" in printed and "computed steps: tiny" in printed
    assert (
        "- ssim unavailable: uniform_skip, K = 10, seed 0: ImportError: no ssim" in printed
    )  # though none has a value
    (runs / "run0" / "result.json").write_text(
        json.dumps(result("zebra", 10, 1.0, metrics={"ssim": {"mean": 0.5, "ci95": [0.4, 0.6], "n": 8}}))
    )
    monkeypatch.setattr("sys.argv", ["leaderboard", str(runs), "--metric", "ssim"])
    leaderboard.main()
    printed = capsys.readouterr().out
    assert "0.5000 ± 0.1000" in printed
    assert "- ssim unavailable: uniform_skip, K = 10, seed 0: ImportError: no ssim" in printed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--metric", "nosuch"], "--metric nosuch: no run has it; choose from psnr, ssim, "),
        (["--metric", "settled"], "--metric settled: no run has it; choose from psnr"),
        (["--gain", "nosuch"], "--gain nosuch is no column of these runs .* choose from psnr, speedup"),
        (["--league", "10", "99"], "--league 99: no run has this budget; choose from 5, 10"),
        (["--league", "5", "--metric", "nosuch"], "--metric nosuch: no run has it"),
        (["--league", "5", "--metric", "model"], "--metric model: no run has it"),
        (["--against", "nosuch"], "no result of 'nosuch'; the board has"),
        (["--out", "FILE"], "File exists: .*FILE"),
    ],
)
def test_a_mistake_ends_in_one_clear_line(runs, monkeypatch, capsys, arguments, line):
    (runs / "FILE").touch()
    monkeypatch.chdir(runs)
    monkeypatch.setattr("sys.argv", ["leaderboard", str(runs), *arguments])
    with pytest.raises(SystemExit, match="1"):
        leaderboard.main()
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(line, err)


def test_a_row_may_have_any_label(tmp_path):
    for index, label in enumerate(("a|b", "full")):
        write(tmp_path, str(index), scored_run("fora", [30 + index, 31], reference="a", label=label))
    write(tmp_path, "2", scored_run("full", [100, 100], reference="a", computed_steps=50.0))
    frame = results.collect(tmp_path)
    assert sorted(frame["label"]) == ["a|b", "fora full", "full"]
    text = tables.league(frame, [10])
    assert "| plain | full | – |" in text and "| reuse | fora full | 31.00 |" in text and "| other | a\\|b |" in text
    for made in (tables.table(frame), tables.ranking(frame), tables.paired_table(frame, "fora full")):
        assert "| a\\|b |" in made


def test_folders_of_other_commands_are_no_unfinished_runs(tmp_path):
    for name in ("dry_runs", "evaluations", "runs/fora"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
    assert failures.unfinished(tmp_path) == [{"run": "fora", "error": None}]


def test_paired_differences_use_the_same_prompts_alone(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.normal(30, 5, 40)
    for method, psnr, prompts in (
        ("fewer_steps", base, "a" * 40),
        ("dpcache", base + rng.normal(1, 0.1, 40), "a" * 40),
        ("fora", base + 1, "b" * 40),
    ):
        folder = tmp_path / method
        folder.mkdir()
        per_prompt = {"prompts": list(prompts), "psnr": psnr.tolist()}
        (folder / "result.json").write_text(json.dumps(result(method, 9, psnr.mean(), per_prompt=per_prompt)))
    text = tables.paired_table(results.collect(tmp_path), "fewer_steps")
    (line,) = [line for line in text.splitlines() if "dpcache" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    low, high = map(float, cells[4].strip("[]").split(","))
    assert 0.9 < low < float(cells[3]) < high < 1.1  # far narrower than the spread of 5 dB between prompts
    assert "fora" not in text  # other prompts: no pairs
    with pytest.raises(ValueError, match="no result of 'toca'"):
        tables.paired_table(results.collect(tmp_path), "toca")


@pytest.fixture
def scores(tmp_path):
    """Forecasts 3 and 1 dB, and a reuse 2 dB, above a base, each with one prompt on which it fails by 20 dB more."""
    rng, base = np.random.default_rng(1), np.random.default_rng(0).normal(30, 4, 40)
    made = {"taylorseer": 3, "hicache": 1, "fora": 2, "speca": 9, "full": 70}
    for place, (method, gain) in enumerate(made.items()):
        psnr = base + gain + rng.normal(0, 0.1, 40)
        psnr[place] -= 20
        budget, steps = 9, {"speca": 12.0, "full": 50.0}.get(method, 9.0)
        per_prompt = {"prompts": [f"p{i}" for i in range(40)], "psnr": psnr.tolist()}
        metrics = {"psnr": statistics.summarise(psnr)}
        (tmp_path / method).mkdir()
        text = json.dumps(result(method, budget, 0, computed_steps=steps, per_prompt=per_prompt, metrics=metrics))
        (tmp_path / method / "result.json").write_text(text)
    return results.collect(tmp_path)


def test_runs_are_ranked_at_equal_compute_alone(scores):
    board = ranks.board(scores).set_index("label")
    assert board["rank"].dropna().to_dict() == {"taylorseer": 1, "fora": 2, "hicache": 3}
    assert not board["equal_compute"]["speca"] and board["equal_compute"]["full"]
    assert ranks.board(scores, "beauty")["rank"].isna().all()


def test_the_worst_prompt_is_the_fifth_percentile_from_the_bad_end(scores):
    for row in scores.itertuples():
        ordered = sorted(row.scores["psnr"])
        assert row.psnr_worst == pytest.approx(ordered[1] + 0.95 * (ordered[2] - ordered[1]))  # 0.05 x 39 = 1.95
    assert statistics.worst(range(101), True) == 5 and statistics.worst(range(101), False) == 95
    assert results.column("psnr_worst").title == "PSNR, worst prompt (dB)"
    assert "worst prompt" in tables.table(scores, "psnr_worst")


def test_differences_are_to_the_best_of_each_group_in_pairs(scores):
    board = ranks.board(scores)
    found = {board.loc[index, "label"]: others for index, others in ranks.differences(board).items()}
    assert found["full"] == {} and set(found["taylorseer"]) == {"reuse"}
    values = {row.label: row.scores["psnr"] for row in scores.itertuples()}
    for method, group, best in (("hicache", "forecast", "taylorseer"), ("fora", "forecast", "taylorseer")):
        expected = statistics.paired_difference(values[method], values[best])
        assert found[method][group].label == best
        assert found[method][group][1:] == pytest.approx((expected["mean"], *expected["ci95"]))
    text = tables.ranking(scores)
    (line,) = [line for line in text.splitlines() if "| fora |" in line]
    d = found["fora"]["forecast"]
    assert line.startswith("| 2 | fora | reuse |")
    assert line.endswith(f"| – | {d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}] |")
    assert "| – | speca |" in text and "full" not in text


def test_the_league_has_a_row_for_each_method_with_every_budget_both_references_and_costs(scores):
    more = scores.assign(
        psnr_fine=scores["psnr"] / 2,
        calibration_trajectories=[{"statistics": 10.0, "method": 2.5}] * len(scores),
        history=3 * 2**19,
        flops_speedup=5.0,
    )
    small = more[more["method"] == "fora"].assign(budget=5, computed_steps=5.0, psnr=20.0)
    text = tables.league(pd.concat([more, small], ignore_index=True), [9, 5])
    heading, _, titles, _, *lines = text.splitlines()
    assert heading == "### PSNR (dB): tiny, 50 steps"
    assert titles == (
        "| group | method | K = 5 | K = 9 | K = 9, fine | K = 5, fine | K = 9: rank | worst prompt "
        "| to the best of its group | FLOPs | trajectories | MiB |"
    )
    cells = {line.split(" | ")[1]: line.strip("| ").split(" | ") for line in lines}
    assert list(cells) == ["full", "fora", "hicache", "taylorseer", "speca"]  # the board's order
    mean = scores.set_index("method")["psnr"]
    full = f"{mean['full'] / 2:.2f}"
    assert cells["full"] == ["plain", "full", "–", "–", full, full, *["–"] * 6]
    worst = scores.set_index("method")["psnr_worst"]
    fora = [f"{x:.2f}" for x in (20, mean["fora"], mean["fora"] / 2, mean["fora"] / 2)]
    assert cells["fora"] == ["reuse", "fora", *fora, "2", f"{worst['fora']:.2f}", "–", "5.00x", "12.5", "1.50"]
    values = {row.label: row.scores["psnr"] for row in scores.itertuples()}
    d = statistics.paired_difference(values["hicache"], values["taylorseer"])
    assert cells["hicache"][8] == f"{d['mean']:+.2f} [{d['ci95'][0]:+.2f}, {d['ci95'][1]:+.2f}]"
    assert cells["hicache"][2] == "–"  # has no run of five steps
    assert cells["speca"][3] == f"({mean['speca']:.2f}: 12.0 steps)" and cells["speca"][6] == "–"
    assert "fine" not in tables.league(scores, [9])


def test_an_interval_is_of_resampled_means():
    values = np.random.default_rng(3).normal(0, 1, 25)
    means = [np.random.default_rng(seed).choice(values, 25).mean() for seed in range(4000)]
    low, high = statistics.summarise(values)["ci95"]
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.03)


@pytest.mark.parametrize("metric", ["psnr", "speedup"])
def test_a_figure_has_a_panel_for_each_model_and_a_list_where_there_are_few_budgets(runs, tmp_path, metric):
    frame = results.collect(runs)
    more = pd.concat([frame.assign(budget=frame["budget"] + extra) for extra in (0, 30, 60)], ignore_index=True)
    path = charts.figure(tmp_path / "curves.png", more, metric)
    assert Image.open(path).size == (2080, 640)  # two models, two panels
    path = charts.figure(tmp_path / "list.png", frame, metric)  # one or two budgets
    assert Image.open(path).size[0] == 2280 and Image.open(path).size[1] < 640


def beaten_by_hand(points: list[tuple[float, float]], higher: bool) -> set[int]:
    """Indices of (gain, value) that another point beats: better at no less than 99 % of the gain, or as good and
    faster."""
    beaten = set()
    for i, (gain, value) in enumerate(points):
        for other_gain, other in points:
            better = other > value if higher else other < value
            if (better and other_gain >= 0.99 * gain) or (other == value and other_gain > gain):
                beaten.add(i)
    return beaten


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(2, 12), st.integers(-3, 3)), min_size=1, max_size=12), st.booleans())
def test_the_front_is_what_no_other_run_beats_whichever_direction_is_better(points, higher):
    gains, values = np.array(points, dtype=float).T
    on = statistics.front(gains, values, higher)
    assert set(np.flatnonzero(~on)) == beaten_by_hand(points, higher)
    best = values.max() if higher else values.min()
    assert on.any() and best in values[on] and gains.max() in gains[on]
    along = values[on][np.argsort(gains[on], kind="stable")]
    assert (np.diff(along) <= 0).all() if higher else (np.diff(along) >= 0).all()  # faster costs quality


def test_gains_that_no_machine_tells_apart_are_level():
    assert statistics.front([4.02, 4.0, 3.0], [20.0, 30.0, 30.0], True).tolist() == [False, True, False]
    assert statistics.front([4.1, 4.0, 3.0], [20.0, 30.0, 30.0], True).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("metric", "front"), [("psnr", ["fora 9", "toca 9"]), ("lpips", ["fora 9", "dicache 9"]), ("clip", ["fora 9"])]
)
def test_pareto_pictures_know_the_direction_of_their_metric(tmp_path, monkeypatch, metric, front):
    scored = {  # speed-up, PSNR, LPIPS, CLIP
        "fora": (4.0, 30.0, 0.3, 30.0),
        "toca": (3.0, 31.0, 0.4, 20.0),
        "dicache": (2.0, 29.0, 0.2, 30.0),
    }
    for name, (speedup, *values) in scored.items():
        (tmp_path / name).mkdir()
        means = {m: {"mean": v, "ci95": [None, None], "n": 1} for m, v in zip(("psnr", "lpips", "clip"), values)}
        run = result(name, 9, 0.0, timing={"speedup": speedup}, metrics=means)
        (tmp_path / name / "result.json").write_text(json.dumps(run))
    drawn = []
    monkeypatch.setattr(charts, "save", lambda plot, path: drawn.append(plot) or path)
    charts.pareto(tmp_path / "pareto.png", results.collect(tmp_path), metric)
    assert [text.get_text() for text in drawn[0].axes[0].texts] == front


def test_a_metric_of_another_version_is_listed_but_has_no_front(tmp_path):
    old = {"psnr": {"mean": 30.0, "ci95": [29.0, 31.0], "n": 8}, "beauty": {"mean": 0.5, "ci95": [0.4, 0.6], "n": 8}}
    (tmp_path / "result.json").write_text(json.dumps(result("fora", 9, 30.0, metrics=old)))
    frame = results.collect(tmp_path)
    assert results.metric_names(frame) == ["psnr", "beauty"] and "### beauty: tiny" in tables.table(frame, "beauty")
    with pytest.raises(ValueError, match="metric=beauty has no Pareto front"):
        charts.pareto(tmp_path / "pareto.png", frame, "beauty")


def test_pareto_front_names_the_runs_that_none_beats(tmp_path, monkeypatch):
    for name, budget, psnr, speedup in (("fora", 9, 30, 4.0), ("toca", 9, 31, 3.0), ("teacache", 9, 30, 3.5)):
        folder = tmp_path / name
        folder.mkdir()
        timing = {"speedup": speedup}
        (folder / "result.json").write_text(json.dumps(result(name, budget, psnr, timing=timing)))
    drawn = []
    monkeypatch.setattr(charts, "save", lambda plot, path: drawn.append(plot) or path)
    frame = results.collect(tmp_path)
    charts.pareto(tmp_path / "pareto.png", frame)
    (axes,), (legend,) = drawn[0].axes, drawn[0].legends
    assert [text.get_text() for text in axes.texts] == ["fora 9", "toca 9"]
    assert [text.get_text() for text in legend.get_texts()] == ["reuse", "partial", "others", "Pareto front"]
    colors = [line.get_color() for line in axes.lines]
    light = {label: style.light for label, style in methods.styles(["fora", "toca", "teacache"]).items()}
    assert colors == [light["fora"], "0.8", light["toca"], "k"]
    # The reader's choice has its name and colour, too.
    charts.pareto(tmp_path / "pareto.png", frame, chosen=["teacache"])
    assert [text.get_text() for text in drawn[1].axes[0].texts] == ["fora 9", "toca 9", "teacache 9"]
    assert drawn[1].axes[0].lines[1].get_color() == light["teacache"]
    with pytest.raises(ValueError, match="no result of easycache; the board has"):
        charts.pareto(tmp_path / "pareto.png", frame, chosen=["easycache"])
    with pytest.raises(ValueError, match="gain=computed_steps is not a column of which more is known to be better"):
        charts.pareto(tmp_path / "pareto.png", frame, gain="computed_steps")


@pytest.mark.parametrize("higher", [True, False])
def test_the_stairs_lead_through_the_front(higher):
    axes, (good, bad) = Figure().subplots(), (2.0, 1.0) if higher else (1.0, 2.0)
    best = pd.DataFrame({"gain": [4.0, 3.0], "mean": [bad, good]})
    axes.plot(best["gain"], best["mean"], "o")
    if not higher:
        axes.invert_yaxis()
    charts._stairs(axes, best)
    x, y = axes.lines[-1].get_data()
    left, worst = axes.get_xlim()[0], axes.get_ylim()[0]
    assert list(x) == [left, 3.0, 4.0, 4.0] and list(y) == [good, good, bad, worst]
    assert worst < bad if higher else worst > bad


# --- console


def test_a_phase_is_one_line_with_its_time_of_the_main_process_alone(capsys, monkeypatch):
    with console.phase("samples"):
        pass
    assert re.fullmatch(r"  samples +\d+\.\d s\n", capsys.readouterr().out)
    monkeypatch.setenv("RANK", "1")
    with console.phase("samples"):
        pass
    monkeypatch.delenv("RANK")
    with pytest.raises(RuntimeError), console.phase("samples"):
        raise RuntimeError
    assert capsys.readouterr().out == ""


def scored(method: str, budget: int, psnr: float, clip: float, **changes) -> dict:
    metrics = {name: {"mean": v, "ci95": [v - 1, v + 1], "n": 4} for name, v in (("psnr", psnr), ("clip", clip))}
    fields = {"metrics": metrics, "metrics_unavailable": {}, "reference": "a", "timing": {}}
    return result(method, budget, psnr, **fields | changes)


def test_a_run_ends_beside_full_steps_and_as_many_plain_ones(tmp_path):
    others = {
        "tiny-full-K7-T50": scored("full", 7, 100.0, 27.5, computed_steps=50.0),
        "tiny-fewer_steps-K10-T50": scored("fewer_steps", 10, 31.25, 26.5),
        "tiny-unipc-K9-T50": scored("unipc", 9, 33.0, 26.0),  # another budget
        "tiny-dpm_solver-K10-T50": scored("dpm_solver", 10, 33.0, 26.0, reference="b"),  # other prompts
        "tiny-fora-K10-T50": scored("fora", 10, 33.0, 26.0),  # not plain
    }
    for name, content in others.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(content))
    (tmp_path / "tiny-fewer_steps-K11-T50").mkdir()
    (tmp_path / "tiny-fewer_steps-K11-T50" / "result.json").write_text("{")
    run = scored("dpcache", 10, 35.5, 27.0)
    plain = results.plain_runs(tmp_path / "tiny-dpcache-K10-T50", run)
    assert [other["method"] for other in plain] == ["full", "fewer_steps"]
    lines = console.summary(run, tmp_path, plain).splitlines()
    table = {line[:24].strip(): re.split(r"\s{2,}", line[24:].strip()) for line in lines[2:5]}
    assert table[""] == ["full, 50 steps", "fewer_steps, 10 steps", "dpcache, 10 steps"]
    assert table["psnr"] == ["–", "31.25", "35.50", "[34.50, 36.50]", "n=4"]  # full steps are their own reference
    assert table["clip"] == ["27.50", "26.50", "27.00", "[26.00, 28.00]", "n=4"]
    alone = console.summary(run, tmp_path).splitlines()
    assert re.split(r"\s{2,}", alone[4].strip()) == ["clip", "–", "27.00", "[26.00, 28.00]", "n=4"]
    assert len(console.summary(others["tiny-full-K7-T50"], tmp_path).splitlines()[2].split("steps")) == 2  # once


# --- tracking


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """W&B as on a machine without an API key or own settings."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))


def test_wandb_writes_its_files_offline(tmp_path, no_account, caplog):
    picture = pictures.timeline(tmp_path / "timeline.png", [0, 1], 5)
    logger = tracking.Wandb("test")
    logger.start({"method": "dpcache"}, "name", "group", tmp_path / "run")
    rows = zip(PROMPTS, images(0), images(1), [30.0, 31.0, 32.0], strict=True)
    logger.log(result("dpcache", 10, 30.0), {"timeline": picture}, rows)
    run = logger.run
    assert run.offline and run.summary["psnr"] == 30.0 and run.summary["schedules"] == [list(range(10))]
    logger.finish()
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    written, patience = next(folder.glob("run-*.wandb")), time.monotonic() + 15
    while written.stat().st_size < 1000 and time.monotonic() < patience:
        time.sleep(0.1)  # W&B's service writes it out shortly after `finish` returns
    assert written.stat().st_size > 1000
    media = sorted(path.name for path in (folder / "files" / "media").rglob("*.*"))
    assert len(media) == 2 and media[0].startswith("samples") and media[1].startswith("timeline")
    # Two images for each of three prompts wait for `wandb sync` in W&B's own folder, beside the table and its index.
    assert len(list((tmp_path / "DATA" / "artifacts" / "staging").iterdir())) == 8
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_wandb_failures_become_warnings(tmp_path, monkeypatch, caplog):
    modes = []

    def broken(*args, mode, **kwargs):
        modes.append(mode)
        raise wandb.errors.CommError("no\nroute")

    monkeypatch.setattr(wandb, "init", broken)
    logger = tracking.Wandb("test", mode="online")
    logger.start({}, "name", "group", tmp_path)
    assert logger.run is None and modes == ["online", "offline"]
    assert [record.getMessage() for record in caplog.records] == [
        "W&B could not start a run (online): CommError: no route",
        "W&B could not start a run (offline): CommError: no route",
    ]
    logger.log(result("dpcache", 10, 30.0))
    logger.finish()

    class BrokenRun:
        def __getattr__(self, name):
            raise RuntimeError("gone")

    logger.run = BrokenRun()
    logger.log(result("dpcache", 10, 30.0), {"missing": tmp_path / "missing.png"})
    logger.finish()
    assert "could not log the result" in caplog.text and "could not finish the run" in caplog.text


def test_a_papers_numbers_stand_beside_the_measured_ones():
    shared = {"model": "flux", "num_inference_steps": 50, "setup": "", "seed": 0}
    rows = [("full", 10, 100.0, 1.0), ("dpcache", 13, 20.0, 3.4), ("dpcache", 9, 18.0, 4.5)]
    frame = pd.DataFrame(
        [
            shared | {"label": label, "budget": budget, "psnr": psnr, "speedup": speed, "written": place}
            for place, (label, budget, psnr, speed) in enumerate(rows)
        ]
    )
    published = [
        {"label": "full", "budget": 50, "image_reward": 0.979},
        {"label": "dpcache", "budget": 13, "psnr": 21.65, "speedup": 3.54},
        {"label": "teacache", "budget": 13, "psnr": 16.31},
    ]
    *_, full, planned, missing = tables.published_table(frame, published).splitlines()
    assert full.split(" | ")[2:] == ["0.98", "–", "–", "100.00", "–", "1.00 |"]
    assert planned.split(" | ")[2:] == ["–", "–", "21.65", "20.00", "3.54", "3.40 |"]
    assert missing.split(" | ")[2:] == ["–", "–", "16.31", "–", "–", "– |"]
