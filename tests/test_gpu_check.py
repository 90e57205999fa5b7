"""The check for a first GPU, on the CPU at tiny size; and on a GPU where there is one."""

import subprocess
import sys

import pytest
import torch

from helpers.commands import ENVIRONMENT, ROOT
from scripts.gpu_check import part

TINY = "num_layers=2 num_single_layers=3 in_channels=8 joint_attention_dim=16 pooled_projection_dim=16"
TINY += " axes_dims_rope=[4,6,6] num_attention_heads=2 attention_head_dim=16"


def check(tmp_path, *arguments):
    command = [sys.executable, "scripts/gpu_check.py", "--out", str(tmp_path / "page.md"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (tmp_path / "page.md").exists(), done.stderr
    return done.returncode, (tmp_path / "page.md").read_text()


@pytest.mark.ci
def test_the_page_has_every_part_and_names_what_failed(tmp_path):
    tiny = ["--device", "cpu", "--config", TINY, "--call", "height=48 width=48 max_sequence_length=3", "--steps", "8"]
    code, page = check(tmp_path, *tiny, "--methods", "fora", "teacache", "pab", "--families", "flux", "dit_ddim")
    assert code == 0, page
    assert "| fora | 0e+00 | 0e+00 |" in page and "| pab | 0e+00 | refused |" in page
    assert "| teacache | " in page and "not without a GPU" in page
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert len(titles) == 5 and page.count("T = 8, K = 4") == 2


def test_a_part_that_fails_says_how_and_takes_nothing_with_it():
    text = part("Broken", lambda: 1 / 0)
    assert text.startswith("## Broken\n\nFAILED") and "ZeroDivisionError: division by zero" in text
    assert part("Whole", lambda: "| a |").startswith("## Whole\n\n| a |")


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_everything_is_the_same_as_on_the_cpu(tmp_path):
    code, page = check(tmp_path, "--config", TINY, "--call", "height=48 width=48 max_sequence_length=3")
    assert code == 0, page
