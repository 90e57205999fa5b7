"""The examples of dpcache/README.md, run one after the other."""

import re

import pytest

import dpcache
from helpers.commands import ROOT

OTHERS = ("my_step", "cogview4")  # a loop of the reader's own, and the record of a family


def examples() -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / "dpcache" / "README.md").read_text(), re.DOTALL)
    return [code for code in found if not any(word in code for word in OTHERS)]


@pytest.mark.slow
def test_the_examples_run_and_print_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in examples():
        exec(code, names)
    printed = capsys.readouterr().out
    assert "[0, 1, 2, 8, 14, 20, 26, 32, 38, 44]" in printed and "True" in printed
    assert len(examples()) >= 6 and dpcache.Method.load("mine.safetensors").num_inference_steps == 50
