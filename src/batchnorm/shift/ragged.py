"""What polars reads in silence and a user would not: ragged lines, names twice, other separators and encodings."""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from batchnorm.errors import ArgumentError

_PART = 2**23


def refuse_ragged(path: Path, separator: str = ",") -> None:
    """Raises ArgumentError for a bad first line, and for the first line that has not as many fields as it.

    A first line is bad if it is no UTF-8, says a name twice, or has one field with another separator in it.

    Lines without quotes are counted as bytes, at about the speed of the disk; a part of the file with quotes in it is
    read by Python's csv module, about 30 times as slow. A blank line has one field, so that it fits one column only.
    """
    try:
        _check(path, separator)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ArgumentError(f"{path} is no whole gzip file: {error}") from error


def _check(path: Path, separator: str) -> None:
    with _opened(path) as file:
        header = file.readline()
        while header.count(b'"') % 2 and (more := file.readline()):
            header += more
        if not header.strip():
            raise ArgumentError(f"{path} is empty: expected a first line with the columns' names")
        fields = len(_names(path, header, separator))
        number = 1 + header.count(b"\n")
        while part := file.read(_PART):
            part += file.readline()
            while part.count(b'"') % 2 and (more := file.readline()):
                part += more
            found = _bad_line(part, fields, separator)
            if found is not None:
                raise ArgumentError(
                    f"{path}, line {number + found[0]}: expected {fields} fields as in the first line, got {found[1]}"
                )
            number += part.count(b"\n")


def _names(path: Path, header: bytes, separator: str) -> list[str]:
    try:
        names = next(csv.reader([header.decode("utf-8-sig")], delimiter=separator))
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is no UTF-8 text ({error.reason} in its first line): convert it") from error
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise ArgumentError(f"{path} has two columns named {twice!r}: rename one")
    other = next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None)
    if other is not None:
        raise ArgumentError(f"{path} seems to be separated by {other!r}: expected {separator!r}")
    return names


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _bad_line(part: bytes, fields: int, separator: str) -> tuple[int, int] | None:
    """Number (from 0, within `part`) and fields of the first line that does not fit."""
    if b'"' in part:
        reader = csv.reader(part.decode("utf-8", "replace").splitlines(keepends=True), delimiter=separator)
        start = 0
        for row in reader:
            if max(len(row), 1) != fields:
                return start, max(len(row), 1)
            start = reader.line_num
        return None
    data = np.frombuffer(part if part.endswith(b"\n") else part + b"\n", dtype=np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    separators = np.diff(np.searchsorted(np.flatnonzero(data == ord(separator)), ends), prepend=0)
    bad = np.flatnonzero(separators != fields - 1)
    return (int(bad[0]), int(separators[bad[0]]) + 1) if bad.size else None
