"""Histogram: counts on a dyadic grid that needs no agreement in advance, so that histograms merge exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.errors import ArgumentError

MOST_BINS = 1024
"""Occupied bins at most. A column with fewer different values keeps each in a bin of its own."""

_DIGITS = 52
"""Bits of a bin's number: what a float64 can tell apart at the largest value."""

_DENSE = 2**21
"""Span of bin numbers that is counted in an array; a wider one is sorted."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values in bins of width 2**level: bin i holds i * 2**level <= x < (i + 1) * 2**level.

    Only occupied bins are kept, at most `MOST_BINS`; the level is the lowest at which that many suffice. Bins of one
    level unite in pairs to those of the next, and the level can only rise as values come in. So the histogram is a
    function of the values alone: whatever is counted in whatever parts and merged in whatever order gives the same.

    Attributes:
        level: the bins' width is 2**level.
        index: (B,), int64, ascending: numbers of the occupied bins.
        count: (B,), int64: values in each.

    Example:
        >>> import numpy as np
        >>> part = Histogram.of(np.array([1.0, 1.0, 2.0]))
        >>> whole = part.merge(Histogram.of(np.array([7.0])))
        >>> whole.values().tolist(), whole.count.tolist()
        ([1.0, 2.0, 7.0], [2, 1, 1])
    """

    level: int
    index: Ints
    count: Ints

    @staticmethod
    def of(values: Floats, level: int | None = None) -> Histogram:
        """The histogram of finite `values`, (N,), float64.

        Args:
            values: what to count.
            level: a level that the result cannot be below, as what it is merged with has it: saves time.
        """
        if not values.size:
            return Histogram(_LOWEST, np.zeros(0, np.int64), np.zeros(0, np.int64))
        start = max(_level_of(float(np.abs(values).max())), _LOWEST if level is None else level)
        scaled = np.ldexp(values, -start)
        numbers = np.floor(scaled).astype(np.int64)
        if start > 0:  # small negative values may have become -0, and still belong below 0
            numbers[(scaled == 0) & (values < 0)] = -1
        return _coarse_enough(start, *_counted(numbers))

    def merge(self, *others: Histogram) -> Histogram:
        """The histogram of all values together."""
        parts = [part for part in (self, *others) if part.index.size]
        if not parts:
            return self
        level = max(part.level for part in parts)
        index = np.concatenate([part.index >> (level - part.level) for part in parts])
        return _coarse_enough(level, *_united(index, np.concatenate([part.count for part in parts])))

    def at(self, level: int) -> Histogram:
        """The same counts in bins of width 2**level, which must not be below this histogram's level."""
        if level < self.level:
            raise ArgumentError(f"a histogram of level {self.level} cannot be refined to level {level}.")
        return Histogram(level, *_united(self.index >> min(level - self.level, 63), self.count))

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.count.sum())

    def values(self) -> Floats:
        """(B,), the lower edge of each occupied bin: the value itself where every value has a bin of its own."""
        return np.ldexp(self.index.astype(np.float64), self.level)

    @property
    def width(self) -> float:
        """Of each bin, in the unit of the values."""
        return float(np.ldexp(1.0, self.level))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; bin numbers as differences, which are short."""
        return {
            "level": self.level,
            "index": np.diff(self.index, prepend=0).tolist(),
            "count": self.count.tolist(),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Histogram:
        """The reverse of `as_dict`.

        Raises:
            ArgumentError: the numbers make no histogram.
        """
        index = np.cumsum(np.asarray(data["index"], dtype=np.int64))
        count = np.asarray(data["count"], dtype=np.int64)
        if index.shape != count.shape or index.ndim != 1 or (count < 1).any() or (np.diff(index) < 1).any():
            raise ArgumentError("a histogram needs ascending bins, and a count of at least 1 for each")
        return Histogram(int(data["level"]), index, count)


_LOWEST = -1126
"""No level is lower: that of a column of zeros."""


def shared(one: Histogram, other: Histogram) -> tuple[Floats, Floats, Floats]:
    """Both on the same bins.

    Returns:
        Edges (lower; (B,), ascending) of the bins that either occupies, and both counts, (B,), float64.
    """
    level = max([part.level for part in (one, other) if part.index.size], default=0)
    parts = [part.at(level) if part.index.size else part for part in (one, other)]
    index = np.union1d(parts[0].index, parts[1].index)
    counts = np.zeros((2, index.size))
    for row, part in zip(counts, parts, strict=True):
        row[np.searchsorted(index, part.index)] = part.count
    return np.ldexp(index.astype(np.float64), level), counts[0], counts[1]


def _level_of(largest: float) -> int:
    """The level at which the largest magnitude has a number of `_DIGITS` bits."""
    return max(int(np.frexp(largest)[1]) - _DIGITS, _LOWEST) if largest else _LOWEST


def _counted(index: Ints) -> tuple[Ints, Ints]:
    low, high = int(index.min()), int(index.max())
    if high - low < _DENSE:
        counts = np.bincount(index - low)
        occupied = np.flatnonzero(counts)
        return occupied + low, counts[occupied].astype(np.int64)
    found, counts = np.unique(index, return_counts=True)
    return found, counts.astype(np.int64)


def _united(index: Ints, count: Ints) -> tuple[Ints, Ints]:
    if not index.size:
        return index, count
    order = np.argsort(index, kind="stable")
    index, count = index[order], count[order]
    first = np.flatnonzero(np.diff(index, prepend=index[0] - 1))
    return index[first], np.add.reduceat(count, first)


def _coarse_enough(level: int, index: Ints, count: Ints) -> Histogram:
    """The lowest level, from `level` on, at which the bins are few enough."""
    shift = 0
    while 1 + np.count_nonzero(np.diff(index >> shift)) > MOST_BINS:
        shift += 1
    return Histogram(level + shift, *_united(index >> shift, count))
