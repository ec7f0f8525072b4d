"""The examples of docs/deploy.md run."""

from __future__ import annotations

import doctest
from pathlib import Path


def test_the_examples_run():
    path = Path(__file__).parent.parent / "docs" / "deploy.md"
    found = doctest.testfile(str(path), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted >= 9
    assert found.failed == 0
