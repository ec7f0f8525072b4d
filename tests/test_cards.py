"""Each layer of the family has a card with the same sections, and its example runs."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

CARDS = Path(__file__).parent.parent / "docs" / "layers"
NAMES = ["sync", "ghost", "renorm", "decorrelated", "frozen", "domain"]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_complete_and_its_example_runs(name):
    path = CARDS / f"{name}.md"
    text = path.read_text(encoding="utf-8")
    for section in ("Source: ", "## When it helps", "## When it does not", "## Checkpoints", "## Example"):
        assert section in text, section
    found = doctest.testfile(str(path), module_relative=False)
    assert found.attempted >= 3
    assert found.failed == 0


def test_there_is_a_card_for_each_file_and_a_file_for_each_card():
    assert sorted(path.stem for path in CARDS.glob("*.md")) == sorted([*NAMES, "README"])
    for name in NAMES:
        assert f"({name}.md)" in (CARDS / "README.md").read_text(encoding="utf-8")
        assert (CARDS.parent.parent / "src" / "batchnorm" / "layers" / f"{name}.py").exists()
