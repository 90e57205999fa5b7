"""The cross of plans and predictors, `scripts/cross.py`."""

import numpy as np
import pytest

from baselines.full import full
from dpcache.errors import SettingError
from dpcache.method import Method
from dpcache.predictors import Reuse
from dpcache.sampler import sample
from dpcache.schedules import EvenlySpaced
from scripts import cross
from scripts.cross import Cross, planners, shares, tables


def test_shares_are_those_of_an_analysis_of_variance():
    rows, columns = np.array([[1.0], [3.0], [8.0]]), np.array([[0.0, 2.0, 10.0, 4.0]])
    by_row, by_column, pairing = shares(rows + columns)
    assert pairing == pytest.approx(0, abs=1e-12) and by_row + by_column == pytest.approx(1)
    assert by_row / by_column == pytest.approx(rows.var() / columns.var())
    assert shares(np.array([[1.0, -1.0], [-1.0, 1.0]])) == pytest.approx((0, 0, 1))


def test_planners_are_found_by_their_records():
    found = planners(9)
    assert {"uniform_skip", "dpcache", "oss", "lemica"} <= {*found}
    assert not {"teacache", "taylorseer", "dyweight", "smoothcache"} & {
        *found
    }  # online, even, on its own grid, by layer


@pytest.mark.ci
def test_a_cross_scores_every_pair_and_runs_nothing_twice(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(cross, "T", 6)
    one = Cross("tiny_flux", 3, 2, tmp_path / "kept.json")
    one.pipe, one.lines = pipe, one.lines[:12]
    plans, names = ["uniform_skip", "gits"], ["taylor0", "l2p"]
    text = tables(one, plans, names)
    call = one.settings["call"]
    made = [
        sample(pipe, method, one.lines[:2], [0, 1], **call).images.astype(float)
        for method in (Method(EvenlySpaced(3, 6), "output", Reuse()), full(6))
    ]
    expected = 10 * np.log10(255**2 / np.square(made[0] - made[1]).mean((1, 2, 3)))
    assert one.scores("taylor0", [0, 2, 4]) == pytest.approx(expected.tolist())
    assert f"| taylor0 | {expected.mean():.1f} |" in text and "| gits | 10 | 0, " in text

    again = Cross("tiny_flux", 3, 2, tmp_path / "kept.json")
    again.pipe = None  # nothing is left to run
    assert tables(again, plans, names) == text
    one.prompts = 1
    assert one.scores("taylor0", [0, 2, 4]) == pytest.approx(expected[:1].tolist())
    with pytest.raises(SettingError, match="planners=fewer_steps: its steps are no list of 3 of the 6 steps"):
        one.plan("fewer_steps")
