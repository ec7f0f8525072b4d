"""Both sides as one matrix: what is encoded or filled apart manufactures drift, so nothing here sees one side only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from batchnorm.shift.column import Kind

_MOST_CODES = 250
"""Codes of a categorical column, the rarest categories sharing one; gradient boosting takes 255."""

_INDICATORS = 10
"""Categories of a column that distances tell apart."""

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Rows of both sides.

    Attributes:
        names: of the columns.
        values: (N, D), float64: numbers as they are, codes of categories; NaN is a missing value.
        is_category: (D,).
        is_new: (N,): whether a row is of the new side; the reference's rows come first.
    """

    names: tuple[str, ...]
    values: Floats
    is_category: Bools
    is_new: Bools

    def only(self, names: Sequence[str]) -> Encoded:
        """These columns."""
        index = [self.names.index(name) for name in names]
        return Encoded(tuple(names), self.values[:, index], self.is_category[index], self.is_new)


def encode(old: pl.DataFrame, new: pl.DataFrame, kinds: Mapping[str, Kind]) -> Encoded:
    """The columns of `kinds` of both samples; categories are numbered by how frequent they are in both together."""
    both = pl.concat([old.select(list(kinds)), new.select(list(kinds))])
    columns = [_codes(both[name]) if kind == "category" else _numbers(both[name]) for name, kind in kinds.items()]
    values = np.column_stack(columns) if columns else np.zeros((both.height, 0))
    is_new = np.arange(old.height + new.height) >= old.height
    return Encoded(tuple(kinds), values, np.array([kind == "category" for kind in kinds.values()], dtype=bool), is_new)


def _numbers(values: pl.Series) -> Floats:
    numbers = values.to_numpy().astype(np.float64)
    largest = np.finfo(np.float64).max
    return np.asarray(np.clip(numbers, -largest, largest), dtype=np.float64)


def _codes(values: pl.Series) -> Floats:
    table = values.drop_nulls().value_counts(name="n").sort(["n", values.name], descending=[True, False])
    names = table[values.name].to_list()
    codes = {name: float(min(code, _MOST_CODES)) for code, name in enumerate(names)}
    return np.array([np.nan if value is None else codes[value] for value in values.to_list()], dtype=np.float64)


def quantile_edges(values: Floats, groups: int) -> Floats:
    """Ascending upper edges of at most `groups` groups, all but the last, as even as the values allow; NaN is left out.

    Each of few distinct values is a group of its own. `np.searchsorted(edges, values, side="left")` gives the groups.

    Example:
        >>> quantile_edges(np.array([0.0, 1.0, 1.0, np.nan, 5.0]), 8).tolist()
        [0.0, 1.0]
    """
    held = values[~np.isnan(values)]
    distinct: Floats = np.unique(held)
    if distinct.size <= groups:
        return distinct[:-1]
    return np.unique(np.quantile(held, np.linspace(0, 1, groups + 1)[1:-1], method="lower"))


def dense(data: Encoded, rows: npt.NDArray[np.int64]) -> Floats:
    """`rows` of the data as numbers that distances can be taken of: (N, D'), no NaN.

    Numbers as clipped standard scores over these rows, with missing ones at 0 and an indicator; the most frequent
    categories as indicators. Both sides are in `rows`, so that both are scaled alike.
    """
    columns: list[Floats] = []
    for values, is_category in zip(data.values[rows].T, data.is_category, strict=True):
        missing = np.isnan(values)
        if is_category:
            columns += [(values == code).astype(np.float64) for code in range(_INDICATORS) if (values == code).any()]
        else:
            held = values[~missing]
            std = float(held.std()) if held.size else 0.0
            scores = (values - held.mean()) / std if std > 0 else np.zeros(values.size)
            columns.append(np.clip(np.where(missing, 0.0, scores), -5, 5))
        if missing.any():
            columns.append(missing.astype(np.float64))
    return np.column_stack(columns)
