"""The CSV of a run: its columns, written whole or not at all, and read again."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "date", "commit", "machine", "cores", "threads", "load", "versions", "settings",
    "group", "shape", "dtype", "layout", "operation", "peer", "memory", "phase",
    "median_us", "p20_us", "p80_us", "samples", "calls", "times_copy", "others",
)  # fmt: skip
"""`memory`: "as it comes", "malloc tuned", "pool on" or "pool off"; `calls`: in a row, in one sample; `times_copy`: the
median over that of a copy in the same process, empty for networks; `load`: load average when the run began;
`others`: cores that other processes kept busy while the row was measured."""

Row = Mapping[str, Any]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows beside their place and moves them there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows that all have the same columns to a file that may be there already.

    Raises:
        ValueError: what is there has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    is_new = not path.exists()
    if not is_new:
        with path.open(encoding="utf-8", newline="") as file:
            if csv.DictReader(file).fieldnames != columns:
                raise ValueError(f"{path} was written by another version, with other columns: move it away")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a finished run.

    Raises:
        ValueError: the file is not such a table.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing or not rows:
        raise ValueError(f"{path} is no table of benchmark results: it lacks {', '.join(missing) or 'rows'}")
    return rows
