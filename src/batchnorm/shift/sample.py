"""Rows that stand for a table: those with the smallest keys, so that samples merge as the tables would."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

KEY = "__key__"
"""The column that orders the rows of a sample."""

_GOLDEN = 0x9E3779B97F4A7C15


def keyed(batch: pl.DataFrame, offset: int, salt: str) -> pl.DataFrame:
    """`batch` with a key for each row: a hash of `salt` (which tells tables and partitions apart) and row number."""
    return batch.with_columns(pl.Series(KEY, _keys(offset, batch.height, salt)))


def smallest(parts: list[pl.DataFrame], size: int) -> pl.DataFrame:
    """The `size` rows with the smallest keys, ascending."""
    return pl.concat(parts).sort(KEY).head(size)


def below(batch: pl.DataFrame, key: int) -> pl.DataFrame:
    """The rows of `batch` whose key is below `key`: others cannot enter a full sample."""
    return batch.filter(pl.col(KEY) < key)


def _keys(offset: int, rows: int, salt: str) -> npt.NDArray[Any]:
    """splitmix64 (Steele et al. 2014) of the row's number, from a start that depends on the salt."""
    start = int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "big")
    with np.errstate(over="ignore"):
        z = np.uint64(start) + (np.arange(offset + 1, offset + rows + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
