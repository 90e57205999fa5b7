"""What the board uses of the methods: the record `about` in each file of `conf/method`, and the order and the colours
of rows, which follow from the records."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

from eval.schema import About, Group

FOLDER = Path(__file__).parents[1] / "conf" / "method"
COLORS = {
    Group.plain: ("#6b7280", "#9aa3ad"),
    Group.reuse: ("#a0722a", "#d6a85c"),
    Group.forecast: ("#4f8a3a", "#8cc376"),
    Group.online: ("#1f5fa8", "#6fa8ea"),
    Group.planned: ("#c2362d", "#ee7f6f"),
    Group.learned: ("#7d7d12", "#c4c45a"),
    Group.partial: ("#7b5ea7", "#b49adb"),
    Group.library: ("#1f8a8a", "#5fc4c0"),
    Group.other: ("#b8336a", "#ee7fac"),
}
"""Of each group on a light and on a dark ground."""
assert set(COLORS) == set(Group)

SHAPES = 7
"""How many shapes of marks a picture has."""


class Style(NamedTuple):
    """Colours of a row on a light and on a dark ground, and the number of its shape."""

    light: str
    dark: str
    shape: int


@cache
def records() -> dict[str, About]:
    """The record of every method that has one."""
    found = {path.stem: OmegaConf.load(path).get("about", {}) for path in sorted(FOLDER.glob("*.yaml"))}
    return {name: OmegaConf.to_object(OmegaConf.merge(About, about)) for name, about in found.items()}


FULL = next(name for name, known in records().items() if known.reference)
"""The method that computes every step: the reference of every comparison."""


def about(label: str) -> About:
    """The record of the method with which a row of the board begins; an empty record if it has none."""
    return records().get(label.split()[0], About())


def order(label: str) -> tuple:
    """Key that sorts the rows of the board: the full-step run first, then by group, year, method and changed
    settings."""
    method, known, words = label.split()[0], about(label), re.split(r"(\d+)", label)
    natural = [int(word) if index % 2 else word for index, word in enumerate(words)]  # numbers in the order of numbers
    known_name = method if method in records() else ""  # a row with a label of its own is sorted by the label
    return method != FULL, list(Group).index(known.group), known.year or 0, known_name, natural


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """How rows are drawn, in the order of the board. Each group has a colour, and its rows have different shapes. If
    all rows are of one group, they have different colours."""
    labels, found = sorted(set(labels), key=order), {}
    groups = {label: about(label).group for label in labels}
    palette = list(COLORS.values())
    for label in labels:
        place = sum(groups[other] is groups[label] for other in found)
        colors = COLORS[groups[label]] if len(set(groups.values())) > 1 else palette[place % len(palette)]
        found[label] = Style(*colors, place % SHAPES)
    return found
