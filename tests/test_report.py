"""The board and the notebooks, made from real runs; the page as its readers see it, in a browser without a network."""

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from eval import leaderboard, report
from eval.results import collect
from helpers.commands import ROOT
from helpers.commands import run as command

SMALL = ["num_inference_steps=8", "num_prompts=2", "batch_size=1"]
PROMPTS = ["red <b>apple</b> </script>", "door & {{script}}", "tram", "wrench"]
ERROR = "ValueError: budget=9 </script><img src=x onerror=alert(1)>\n  at step 3 & on"


def sweep(folder: Path, *arguments: str) -> None:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    code, _, err = command("-m", *SMALL, *arguments, f"prompts={folder / 'prompts.txt'}", folder=folder)
    assert code == 0, err


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Six runs, one that failed and one that never ended, with the board as the command writes it."""
    folder = tmp_path_factory.mktemp("outputs")
    timed = ["calibration.num_prompts=2", "eval.timing.repeats=1"]
    sweep(folder, "method=full,fewer_steps,dpcache", "budget=4,5", *timed)
    for name in ("fora-K9", "fora-K3"):
        (folder / "runs" / name / ".hydra").mkdir(parents=True)
    (folder / "runs" / "fora-K9" / "error.json").write_text(json.dumps({"error": ERROR}))
    command = [sys.executable, "-m", "eval.leaderboard", folder]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return folder


def results(folder: Path) -> dict[str, dict]:
    return {p.relative_to(folder).as_posix(): json.loads(p.read_text()) for p in folder.rglob("result.json")}


def embedded(folder: Path) -> dict:
    text = (folder / "report.html").read_text()
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


# --- files


def test_csv_holds_the_numbers_of_the_results(outputs):
    frame = pd.read_csv(outputs / "leaderboard.csv", float_precision="round_trip")
    assert sorted(zip(frame["method"], frame["budget"])) == [
        *(("dpcache", budget) for budget in (4, 5)),
        *(("fewer_steps", budget) for budget in (4, 5)),
        ("full", 8),  # its two runs are the same thing: all steps, whatever the budget
    ]
    for row in frame.to_dict("records"):
        result = results(outputs)[row["path"]]
        assert row["computed_steps"] == result["computed_steps"] and row["equal_compute"]
        for name, value in result["metrics"].items():
            assert [row[name], row[f"{name}_lo"], row[f"{name}_hi"]] == [value["mean"], *value["ci95"]]
        assert row["speedup"] == result["timing"]["speedup"] and row["history"] == result["memory"]["history"]
        assert json.loads(row["schedules"]) == result["schedules"]


def test_markdown_holds_the_numbers_of_the_results(outputs):
    text = (outputs / "leaderboard.md").read_text()
    for result in results(outputs).values():
        (line,) = [
            line
            for line in text[text.index("### PSNR") : text.index("### SSIM")].splitlines()
            if line.startswith(f"| {result['method']} |")
        ]
        assert f" {result['metrics']['psnr']['mean']:.2f} ± " in line
    assert all(f"### {title}" in text for title in ("latent error", "speed-up", "efficiency", "Failed"))
    assert "| not reliable |" in text[text.index("### efficiency") :]  # a single round has no spread
    assert {run["unreliable"] for run in embedded(outputs)["runs"]} == {"a single round has no spread"}
    assert f"- fora-K9: `{' '.join(ERROR.split())}`" in text and "- fora-K3: unfinished" in text


def test_images_are_those_of_the_runs(outputs):
    data = embedded(outputs)
    (wall,) = data["walls"]
    assert wall["prompts"] == PROMPTS[:2] and len(data["runs"]) == 5
    for run in data["runs"]:
        (result,) = [
            path
            for path, result in results(outputs).items()
            if result["method"] == run["label"] and (run["full"] or result["budget"] == run["budget"])
        ][:1]
        for place, path in enumerate(sorted((outputs / result).parent.glob("images/*.png"))):
            assert (pixels(data["images"][run["images"][place]]) == np.asarray(Image.open(path))).all()
        assert run["scores"]["psnr"] == results(outputs)[result]["per_prompt"]["psnr"]
        assert not run["other_reference"]
        if run["full"]:
            assert run["images"] == wall["reference"]  # which was read from the shared store


def test_the_board_can_show_fewer_prompts_and_stand_in_another_folder(outputs, tmp_path, monkeypatch):
    before = (outputs / "report.html").read_bytes()
    monkeypatch.setattr("sys.argv", ["leaderboard", str(outputs), "--out", str(tmp_path / "new"), "--prompts", "1"])
    leaderboard.main()
    assert embedded(tmp_path / "new")["walls"][0]["prompts"] == PROMPTS[:1]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "leaderboard.csv",
        "leaderboard.md",
        "report.html",
    ]
    assert (outputs / "report.html").read_bytes() == before


def test_unequal_compute_and_variants_are_told_apart(outputs, tmp_path):
    changed = {"a": {"computed_steps": 6.0, "label": "dpcache"}, "b": {"label": "dpcache order=1"}}
    for name, changes in changed.items():
        result = next(r for r in results(outputs).values() if (r["method"], r["budget"]) == ("dpcache", 4))
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result | {"seed": name == "a"} | changes))
    frame = report.board(collect(tmp_path))
    assert list(frame["label"]) == ["dpcache", "dpcache order=1"] and list(frame["equal_compute"]) == [False, True]
    assert "- dpcache, K = 4: 6 steps computed, not at equal compute" in report.markdown(frame, [])


# --- notebooks


def execute(name: str, folder: Path, monkeypatch) -> str:
    """Runs a notebook; returns all that it shows."""
    monkeypatch.setenv("OUTPUTS", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()
    return json.dumps([output for cell in notebook.cells for output in cell.get("outputs", [])], ensure_ascii=False)


def test_the_leaderboard_notebook_shows_every_run(outputs, monkeypatch):
    shown = execute("leaderboard.ipynb", outputs, monkeypatch)
    for result in results(outputs).values():
        assert f" {result['metrics']['psnr']['mean']:.2f} ± " in shown
    assert "PSNR (dB) against fewer_steps" in shown and "application/vnd.plotly" in shown


def test_the_ablation_notebook_shows_every_number_of_prompts(tmp_path, monkeypatch):
    sweep(tmp_path, "method=dpcache", "budget=4,5", "calibration.num_prompts=1,2", "eval.timing.repeats=0")
    shown = execute("ablation_calibration_size.ipynb", tmp_path, monkeypatch)
    assert sorted(r["calibration_prompts"] for r in results(tmp_path).values()) == [1, 1, 2, 2]
    for result in results(tmp_path).values():
        label = f"dpcache calibrated on {result['calibration_prompts']:3d} prompts"
        assert label in shown and f" {result['metrics']['psnr']['mean']:.2f} ± " in shown
    assert "against dpcache calibrated on   2 prompts" in shown and "application/vnd.plotly" in shown


# --- the page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, google-chrome or chrome on the PATH")
QUIET = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture
def page(outputs):
    """The report in a browser, which must not complain and must not ask for anything but the file."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--disable-gpu", *QUIET])
        page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
        page.set_default_timeout(20_000)
        complaints, requests = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        address = (outputs / "report.html").as_uri()
        page.goto(address)
        yield page
        assert complaints == [] and {url for url in requests if not url.startswith("data:")} == {address}
        browser.close()


def column(page, title: str) -> list[str]:
    titles = page.locator("#board thead th").all_inner_texts()
    (place,) = [index for index, text in enumerate(titles) if text.startswith(title)]
    return page.locator(f"#board tbody td:nth-child({place + 1})").all_inner_texts()


@needs_browser
def test_page_shows_every_run_and_every_failure(page, outputs):
    shown = column(page, "PSNR")
    board = report.board(collect(outputs))
    assert [float(text.split()[0]) for text in shown] == pytest.approx(list(board["psnr"]), abs=0.1)
    assert len(column(page, "Efficiency")) == 5 and page.locator("#panels figure").count() == 3
    assert page.locator("#strips .strip .bar").count() == 5
    assert page.locator("#failed-list li").count() == 2 and page.locator("#failed-list pre").inner_text() == ERROR
    assert page.locator("#wall tbody th").all_inner_texts() == PROMPTS[:2]


@needs_browser
def test_columns_sort_by_mouse_and_keyboard(page):
    psnr = page.get_by_role("button", name="PSNR")
    psnr.click()
    values = [float(text.split()[0]) for text in column(page, "PSNR")]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("PSNR")
    page.keyboard.press("Enter")  # the heading keeps the focus
    assert [float(text.split()[0]) for text in column(page, "PSNR")] == values[::-1]
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("PSNR")
    page.get_by_role("searchbox").fill("dpcache 4")
    assert column(page, "Method") == ["dpcache"] and column(page, "Budget") == ["4"]


@needs_browser
def test_plots_are_read_by_keyboard_and_switch_their_axis(page):
    plot = page.locator("#panels .plot").first
    plot.focus()
    page.keyboard.press("ArrowRight")
    assert "PSNR" in page.locator("#tip").inner_text() and "end to end" in page.locator("#tip").inner_text()
    page.get_by_label("ideal T / K").check()
    assert "not measured" in page.locator("#panels").inner_text()
    assert page.locator("#panels .plot").first.locator(".point").count() == 4
    page.get_by_role("button", name="fewer_steps", exact=True).click()
    assert page.locator("#panels .plot").first.locator(".point").count() == 2


@needs_browser
def test_an_image_opens_and_flips_by_keyboard(page):
    page.locator("#wall tbody tr").first.locator("button").nth(1).focus()
    page.keyboard.press("Enter")
    viewer, shown = page.locator("#viewer"), page.locator("#stack img:not(.under)")
    assert viewer.is_visible() and page.locator("#viewer-title").inner_text() == PROMPTS[0]
    accelerated = shown.get_attribute("src")
    assert "fewer_steps" in page.locator("#shown").inner_text()
    for key in ("Space", "ArrowRight", "ArrowLeft"):
        before = shown.get_attribute("src")
        page.keyboard.press(key)
        assert shown.get_attribute("src") != before
    assert "full, 8 steps" in page.locator("#shown").inner_text() and shown.get_attribute("src") != accelerated
    page.keyboard.press("ArrowDown")
    assert page.locator("#viewer-title").inner_text() == PROMPTS[1]
    page.keyboard.press("d")
    assert page.locator("#stack.difference").count() == 1
    page.keyboard.press("Escape")
    assert not viewer.is_visible()


@needs_browser
def test_the_page_is_light_or_dark_as_the_system_or_the_reader_says(page):
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert light != dark and page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.locator("#theme").click()  # the reader's choice goes before the system's
    assert page.evaluate(background) == light
    page.reload()
    assert page.evaluate(background) == light
