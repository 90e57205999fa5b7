"""The board and the notebooks, made from real runs; the page as its readers see it, in a browser without a network."""

import base64
import io
import json
import re
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
from playwright.sync_api import expect, sync_playwright

from eval import leaderboard, ranks, report
from eval.results import collect
from helpers.boards import make
from helpers.commands import ROOT
from helpers.commands import run as command

pytestmark = pytest.mark.ci
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
    (board,) = embedded(outputs)["boards"]
    assert {run["unreliable"] for run in board["runs"]} == {"a single round has no spread"}
    assert f"- fora-K9: `{' '.join(ERROR.split())}`" in text and "- fora-K3: unfinished" in text


def test_images_are_those_of_the_runs(outputs):
    data = embedded(outputs)
    (board,) = data["boards"]
    assert sorted(board["prompts"]) == sorted(PROMPTS[:2]) and len(board["runs"]) == 5 and data["lossless"]
    for run in board["runs"]:
        (path,) = [
            path
            for path, result in results(outputs).items()
            if result["method"] == run["label"] and (run["full"] or result["budget"] == run["budget"])
        ][:1]
        stored = results(outputs)[path]["per_prompt"]
        for place, prompt in enumerate(board["prompts"]):
            index = stored["prompts"].index(prompt)
            (image,) = (outputs / path).parent.glob(f"images/{index:04d}-*.png")
            assert (pixels(data["images"][run["images"][place]]) == np.asarray(Image.open(image))).all()
            assert run["scores"]["psnr"][place] == pytest.approx(stored["psnr"][index])
        assert not run["other_reference"]
        if run["full"]:
            assert run["images"] == board["reference"]  # which was read from the shared store


def test_the_prompts_on_which_most_methods_fail_come_first(outputs):
    (board,) = embedded(outputs)["boards"]
    of = [run["scores"]["psnr"] for run in board["runs"] if not run["full"]]
    assert sum(first < second for first, second in of) >= len(of) / 2


def test_every_run_says_which_command_makes_it_again(outputs):
    for path, result in results(outputs).items():
        frame = collect((outputs / path).parent)
        words = frame["command"][0].split()
        assert words[:2] == ["python", "run.py"] and f"budget={result['budget']}" in words
        assert f"method={result['method']}" in words and "num_prompts=2" in words
    (board,) = embedded(outputs)["boards"]
    assert set(collect(outputs)["command"]) >= {run["command"] for run in board["runs"]}


def test_a_run_whose_settings_are_gone_has_no_command(outputs, tmp_path, monkeypatch):
    folder = shutil.copytree(outputs, tmp_path / "outputs")
    (gone,) = folder.rglob("*-dpcache-K5*")  # not one of the two runs with all steps, which are one on the board
    shutil.rmtree(gone / ".hydra")
    monkeypatch.setattr("sys.argv", ["leaderboard", str(folder)])
    leaderboard.main()
    commands = [run["command"] for board in embedded(folder)["boards"] for run in board["runs"]]
    assert commands.count(None) == 1 and len(commands) > 1


def test_the_board_can_show_fewer_prompts_and_stand_in_another_folder(outputs, tmp_path, monkeypatch):
    before = (outputs / "report.html").read_bytes()
    monkeypatch.setattr("sys.argv", ["leaderboard", str(outputs), "--out", str(tmp_path / "new"), "--prompts", "1"])
    leaderboard.main()
    assert len(embedded(tmp_path / "new")["boards"][0]["reference"]) == 1
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
    frame = ranks.board(collect(tmp_path))
    assert list(frame["label"]) == ["dpcache", "dpcache order=1"] and list(frame["equal_compute"]) == [False, True]
    assert "- dpcache, K = 4: 6 steps computed, not at equal compute" in report.markdown(frame, [])


# --- notebooks


def execute(name: str, folder: Path, monkeypatch) -> str:
    """Runs a notebook; returns all that it shows."""
    monkeypatch.setenv("OUTPUTS", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()
    return json.dumps([output for cell in notebook.cells for output in cell.get("outputs", [])], ensure_ascii=False)


def test_the_leaderboard_notebook_is_stored_with_what_its_command_made():
    path = ROOT / "notebooks" / "leaderboard.ipynb"
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs and cell.execution_count for cell in code)
    assert {output.output_type for cell in code for output in cell.outputs} <= {"execute_result", "display_data"}
    assert path.stat().st_size < 300_000 and str(ROOT) not in path.read_text()
    shown = json.dumps([cell.outputs for cell in code], ensure_ascii=False)
    methods = re.search(r"method=(\S+) budget=(\S+)", path.read_text())
    for method in methods[1].split(","):
        assert shown.count(f"| {method} | ") >= len(methods[2].split(","))  # in the ranks of every budget


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
def open_page():
    """Opens a report in a browser, which must not complain and must not ask for anything but the file."""
    complaints, requests, addresses = [], [], set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--disable-gpu", *QUIET])

        def open_(folder: Path, width: int = 1400):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
            page.set_default_timeout(20_000)
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda request: requests.append(request.url))
            addresses.add((folder / "report.html").as_uri())
            page.goto((folder / "report.html").as_uri())
            return page

        yield open_
        assert complaints == [] and {url for url in requests if not url.startswith("data:")} == addresses
        browser.close()


@pytest.fixture
def page(open_page, outputs):
    return open_page(outputs)


def column(page, title: str) -> list[str]:
    titles = page.locator("#board > thead th").all_inner_texts()
    (place,) = [index for index, text in enumerate(titles) if text.startswith(title)]
    return page.locator(f"#board tbody tr:not(.more) > td:nth-child({place + 1})").all_inner_texts()


@needs_browser
def test_page_shows_every_run_and_every_failure(page, outputs):
    board = ranks.board(collect(outputs)).sort_values(["budget", "rank"])
    board = board[board["method"] != "full"]
    assert column(page, "Rank") == ["–", "1", "2", "1", "2"]
    assert [text.split("\n")[0] for text in column(page, "Method")] == ["full", *board["label"]]
    for name, title in (("psnr", "PSNR"), ("psnr_worst", "Worst prompt")):
        shown = column(page, title)
        assert shown[0] == "–" and [float(t.split()[0]) for t in shown[1:]] == pytest.approx(list(board[name]), abs=0.1)
    assert all(text.startswith("⚠") for text in column(page, "Speed‑up")) and len(column(page, "FLOPs speed‑up")) == 5
    assert page.locator("#panels figure").count() == 2
    costs = [
        results(outputs)[Path(p).relative_to(outputs).as_posix()]["calibration_trajectories"] for p in board["path"]
    ]
    assert [float(text) for text in column(page, "Calibration")[1:]] == [sum(cost.values()) for cost in costs]
    assert page.locator("#strips .strip .bar").count() == 4
    assert page.locator("#failed-list li").count() == 2 and page.locator("#failed-list pre").inner_text() == ERROR
    assert sorted(text.split("\n")[0] for text in page.locator("#prompts li").all_inner_texts()) == sorted(PROMPTS[:2])


@needs_browser
def test_columns_sort_by_mouse_and_keyboard(page):
    psnr = page.get_by_role("button", name="PSNR")
    psnr.click()
    values = [float(text.split()[0]) for text in column(page, "PSNR")[:-1]]
    assert column(page, "PSNR")[-1] == "–"  # full steps, which have no distance to themselves
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("PSNR")
    page.keyboard.press("Enter")  # the heading keeps the focus
    assert [float(text.split()[0]) for text in column(page, "PSNR")[:-1]] == values[::-1]
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("PSNR")
    page.get_by_role("searchbox").fill("dpcache 4")
    assert column(page, "Budget") == ["4"] and "dpcache" in column(page, "Method")[0]


@needs_browser
def test_a_row_opens_by_keyboard_and_has_its_command(page, outputs):
    (row,) = page.locator("#board tbody tr", has_text="dpcache").filter(has_text="planned").all()[:1]
    row.locator(".open").focus()
    page.keyboard.press("Enter")
    command = page.locator("#command").inner_text()
    assert command in set(collect(outputs)["command"]) and "method=dpcache" in command
    assert "worst prompt" in page.locator("tr.more").inner_text() and page.locator("tr.more .bar").count() == 1
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    row.locator(".copy").click()
    page.locator("#tip", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == command
    page.keyboard.press("Escape")
    row.locator(".open").click()
    assert page.locator("tr.more").count() == 0


@needs_browser
def test_plots_are_read_by_keyboard_and_switch_their_axis(page):
    plot = page.locator("#panels .plot").first
    plot.focus()
    page.keyboard.press("ArrowRight")
    assert "PSNR" in page.locator("#tip").inner_text() and "FLOPs" in page.locator("#tip").inner_text()
    page.get_by_role("radio", name="ideal").check()
    assert "count as free" in page.locator("#panels").inner_text()
    plot = page.locator("#panels .plot").first
    assert plot.locator(".point").count() == 4 and plot.locator(".whisker").count() == 4
    assert plot.locator(".label.on").count() == plot.locator(".ring").count() > 0  # the front is named
    page.get_by_role("button", name="plain").click()
    assert page.locator("#panels .plot").first.locator(".point").count() == 2


@needs_browser
def test_two_methods_are_compared_on_one_prompt_by_mouse_and_keyboard(page, outputs):
    (board,) = embedded(outputs)["boards"]
    assert page.locator("#a").input_value() == "0" and "full" in page.locator("#a option").first.inner_text()
    page.locator("#a").select_option(label="fewer_steps, K = 4")
    page.locator("#b").select_option(label="dpcache, K = 5")
    runs = {run["label"] + str(run["budget"]): run for run in board["runs"]}
    ours, theirs = runs["dpcache5"]["scores"]["psnr"], runs["fewer_steps4"]["scores"]["psnr"]
    apart = [b - a for a, b in zip(theirs, ours)]
    assert f"on {sum(d > 0 for d in apart)} of 2 prompts" in page.locator("#verdict").inner_text()
    worst = board["prompts"][apart.index(min(apart))]
    assert page.locator("#prompts [aria-current=true]").inner_text().startswith(worst)  # and is the first one shown
    row = board["prompts"].index(worst)
    images = [image.get_attribute("src") for image in page.locator("#stack img").all()]
    expected = [runs[name]["images"][row] for name in ("fewer_steps4", "dpcache5")]
    assert images == [embedded(outputs)["images"][index] for index in expected]
    slide, at = page.locator("#slide"), lambda: page.locator("#stack").evaluate("n => n.style.getPropertyValue('--at')")
    slide.focus()
    page.keyboard.press("ArrowRight")
    assert at() == "51%"
    width = page.locator("#stack").bounding_box()["width"]
    page.locator("#stack").click(position={"x": width / 4, "y": 10})  # waits until the images are in place
    expect(page.locator("#stack")).to_have_attribute("style", re.compile(r"--at:\s*25%"))
    page.locator("#flip").press("Space")
    assert at() == "100%"
    page.locator("#difference").press("Enter")
    assert page.locator("#stack.difference").count() == 1
    page.locator("#prompts button:not([aria-current=true])").press("Enter")
    assert not page.locator("#prompts [aria-current=true]").inner_text().startswith(worst)


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


# --- a board of 40 methods, 7 budgets and 4 models


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    make(folder, 40, [5, 7, 9, 11, 13, 17, 25], ["tiny_flux", "tiny_dit", "tiny_video", "flux"])
    frame = ranks.board(collect(folder))
    (folder / "report.html").write_text(report.page(frame, [], 1))
    return folder, frame


@needs_browser
def test_a_large_board_is_a_filter_and_not_a_wall(open_page, large):
    folder, _ = large
    page = open_page(folder)
    assert (folder / "report.html").stat().st_size < 4e6
    groups = page.locator("#groups button").count()
    assert page.locator("#board tbody tr").count() == 1 + groups == 9  # full, and the best of each group, at one K
    assert page.locator("#setting option").count() == 4 and page.locator("#budgets input").count() == 8
    ranked = [int(text) for text in column(page, "Rank")[1:]]
    assert ranked[0] == 1 and ranked == sorted(ranked)
    first = column(page, "Difference to")
    assert first[1] == "the best" and all(text.startswith("−") for text in first[2:])
    page.get_by_label("All 40").check()
    assert page.locator("#board tbody tr").count() == 41 and page.locator("#wall button").count() == 40
    assert page.locator("#panels .plot").first.locator(".line").count() <= 9  # the other methods are grey dots
    page.get_by_label("all", exact=True).check()
    assert page.locator("#board tbody tr").count() == 281
    page.get_by_role("searchbox").fill("dpcache_lsq 9")
    assert {text.split("\n")[0] for text in column(page, "Method")} == {"dpcache_lsq", "dpcache_lsq_output"}
    page.get_by_role("searchbox").fill("")
    page.locator("#setting").select_option(label="tiny_dit, 50 steps")
    page.get_by_role("button", name="library").click()
    assert "library" not in column(page, "Group")


@needs_browser
def test_the_page_fits_the_window(open_page, large):
    page = open_page(large[0])
    for width in (1440, 700, 360):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        scale = "nodes => nodes.map(n => n.getBoundingClientRect().width / n.viewBox.baseVal.width)"
        scales = page.locator("#panels .plot").evaluate_all(scale)
        assert len(scales) == 2 and all(0.9 < size < 1.2 for size in scales)  # so that text keeps its size


def test_images_take_no_more_room_than_there_is(large, monkeypatch):
    _, frame = large
    frame = frame[(frame["model"] == "flux") & (frame["budget"] == 7)]

    def images(room: int) -> tuple[int, bool]:
        monkeypatch.setattr(report, "ROOM", room)
        text = report.page(frame, [], 8)
        data = json.loads(text.split('id="data">')[1].split("</script>")[0])
        assert sum(map(len, data["images"])) <= room or len(data["boards"][0]["reference"]) == 1
        return len(data["boards"][0]["reference"]), data["lossless"]

    assert images(10_000_000) == (8, True)
    count, lossless = images(200_000)
    assert not lossless and 1 < count <= 8
    assert images(1)[0] == 1  # one prompt is always there
