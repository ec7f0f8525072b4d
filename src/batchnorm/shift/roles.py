"""Which columns are compared for what: inputs, target, time and group, and those that can tell nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from batchnorm.errors import ArgumentError
from batchnorm.shift.column import Column
from batchnorm.shift.reference import Reference
from batchnorm.shift.units import Ints, block_seconds

_FEWEST = 50
"""Rows below which nothing is called an identifier."""


@dataclass(frozen=True)
class Roles:
    """What the caller says of columns.

    Attributes:
        target: what a model predicts.
        time: when a row was observed: a date, or a number of seconds.
        block: length of a block of time, as in 7D.
        group: rows with the same value belong together (a patient, a user).
    """

    target: str | None = None
    time: str | None = None
    block: str | None = None
    group: str | None = None

    def check(self, columns: Mapping[str, Column]) -> None:
        """Raises ArgumentError where they name no column, or do not go together."""
        for option in ("target", "time", "group"):
            name = getattr(self, option)
            if name is not None and name not in columns:
                raise ArgumentError(f"{option}: the reference has no column {name!r}; it has {', '.join(columns)}")
        if (self.time is None) != (self.block is None):
            raise ArgumentError("time and block go together: time='t', block='7D'")
        if self.time is not None and self.group is not None:
            raise ArgumentError("rows belong together by time or by group: give one of them")
        if self.time is not None and columns[self.time].kind == "category":
            raise ArgumentError(f"time: expected a date or a number in column {self.time!r}, got text")
        if self.block is not None:
            block_seconds(self.block)

    def units(self, old: pl.DataFrame, new: pl.DataFrame) -> Ints | None:
        """The group or block of each row of both samples, old ones first; None where each row is its own."""
        if self.time is not None and self.block is not None:
            seconds = pl.concat([old[self.time], new[self.time]])
            if seconds.null_count():
                raise ArgumentError(f"time: column {self.time!r} has missing values: leave those rows out")
            found = np.floor(seconds.to_numpy() / block_seconds(self.block))
        elif self.group is not None:
            found = pl.concat([old[self.group], new[self.group]]).rank("dense").fill_null(0).to_numpy()
        else:
            return None
        return np.unique(found, return_inverse=True)[1].astype(np.int64)


def left_out(old: Reference, new: Reference, roles: Roles) -> dict[str, str]:
    """Columns that the joint test does not use: name -> why."""
    reasons: dict[str, str] = {}
    for name, column in old.columns.items():
        if name in (roles.target, roles.time, roles.group):
            reasons[name] = "target" if name == roles.target else "time" if name == roles.time else "group"
        elif column.is_constant and new.columns[name].is_constant and _same(column, new.columns[name]):
            reasons[name] = "constant"
        elif _is_id(column, old.sample[name]):
            reasons[name] = "id-like"
        elif column.kind == "date":
            reasons[name] = "date"
    return reasons


def _is_id(column: Column, sample: pl.Series) -> bool:
    """Whether values number or name the rows: text that hardly repeats, or whole numbers, all different and dense."""
    values = column.rows - column.missing
    if values < _FEWEST:
        return False
    if column.kind == "category":
        return column.distinct > 0.5 * values
    held = sample.drop_nulls()
    if column.kind == "date" or held.len() < _FEWEST or held.n_unique() < held.len() or (held % 1 != 0).any():
        return False
    lowest, highest = column.histogram.values()[[0, -1]]
    return bool(values > 0.3 * (highest - lowest + column.histogram.width))


def _same(old: Column, new: Column) -> bool:
    if (old.missing > 0) != (new.missing > 0) or old.kind == "category":
        return dict.fromkeys(old.categories.counts) == dict.fromkeys(new.categories.counts)
    return bool(old.moments.mean[0] == new.moments.mean[0])
