"""The examples of docs/keras.md and docs/port.md run."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(("name", "least"), [("keras.md", 20), ("port.md", 7)])
def test_the_examples_run(name, least):
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    found = doctest.testfile(str(DOCS / name), module_relative=False, optionflags=flags)
    assert found.attempted >= least
    assert found.failed == 0
