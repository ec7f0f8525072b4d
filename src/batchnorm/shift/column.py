"""Column: what a Reference holds of one column of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import polars as pl

from batchnorm.errors import ArgumentError
from batchnorm.shift.categories import Categories
from batchnorm.shift.histogram import Histogram
from batchnorm.stats.moments import Moments

Kind: TypeAlias = Literal["number", "category", "date"]
"""Of a column. Dates are numbers too: seconds since 1970, UTC."""


@dataclass(frozen=True, eq=False)
class Column:
    """One column: its missing values, and Moments and a histogram, or counts of categories, of the others.

    Attributes:
        kind: "number", "category" or "date".
        rows: number of rows.
        missing: rows without a value: null and NaN.
        infinite: rows with inf or -inf, which no mean can hold; in neither Moments nor histogram.
        moments: of the finite values, as one channel, (1,); count 0 for categories.
        histogram: of the finite values; empty for categories.
        categories: of the values; empty for numbers and dates.
    """

    kind: Kind
    rows: int
    missing: int
    infinite: int
    moments: Moments
    histogram: Histogram
    categories: Categories

    @staticmethod
    def of(values: pl.Series, kind: Kind, level: int | None = None) -> Column:
        """The column of `values`, as `tables.batches` gives them: Float64 for numbers and dates, String for categories.

        Args:
            values: all or some of the rows.
            kind: of the column.
            level: of the histogram that the result is merged with: see `Histogram.of`.
        """
        rows, none = len(values), np.zeros(0)
        if kind == "category":
            table = values.drop_nulls().value_counts(name="n")
            counts = dict(zip(table[values.name].to_list(), table["n"].to_list(), strict=True))
            missing = values.null_count()
            return Column(kind, rows, missing, 0, _moments(none), Histogram.of(none), Categories.of(counts))
        numbers = values.to_numpy()  # nulls become NaN
        finite = numbers[np.isfinite(numbers)]
        missing = int(np.isnan(numbers).sum())
        infinite = rows - missing - finite.size
        return Column(kind, rows, missing, infinite, _moments(finite), Histogram.of(finite, level), Categories.of({}))

    def merge(self, *others: Column) -> Column:
        """The column of all rows together, exactly.

        Raises:
            ArgumentError: the kinds differ.
        """
        parts = (self, *others)
        kinds = {part.kind for part in parts}
        if len(kinds) > 1:
            raise ArgumentError(f"columns of different kinds cannot be merged: {', '.join(sorted(kinds))}")
        return Column(
            self.kind,
            sum(part.rows for part in parts),
            sum(part.missing for part in parts),
            sum(part.infinite for part in parts),
            Moments.merge(*(part.moments for part in parts)),
            Histogram.merge(*(part.histogram for part in parts)),
            Categories.merge(*(part.categories for part in parts)),
        )

    @property
    def distinct(self) -> int:
        """How many different values there are; at least that many where the histogram has united some."""
        return self.categories.distinct if self.kind == "category" else int(self.histogram.index.size)

    @property
    def is_constant(self) -> bool:
        """Whether it holds one value in every row, or none in any."""
        parts = self.distinct + (self.missing > 0) + (self.infinite > 0)
        return parts <= 1

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        own: dict[str, Any] = {"kind": self.kind, "rows": self.rows, "missing": self.missing}
        if self.kind == "category":
            return {**own, "categories": self.categories.as_dict()}
        mean, var = float(self.moments.mean[0]), float(self.moments.var[0])
        moments = {"mean": mean, "var": var, "count": int(self.moments.count)}
        return {**own, "infinite": self.infinite, "moments": moments, "histogram": self.histogram.as_dict()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Column:
        """The reverse of `as_dict`.

        Raises:
            ArgumentError: the numbers contradict each other.
        """
        kind, rows, missing = data["kind"], int(data["rows"]), int(data["missing"])
        if kind not in get_args(Kind):
            raise ArgumentError(f"expected a kind of {', '.join(get_args(Kind))}; got {kind!r}")
        empty = Column.of(pl.Series("", [], pl.String), "category")
        if kind == "category":
            categories = Categories.from_dict(data["categories"])
            found = Column(kind, rows, missing, 0, empty.moments, empty.histogram, categories)
            values = categories.total
        else:
            given = data["moments"]
            moments = Moments(np.array([float(given["mean"])]), np.array([float(given["var"])]), int(given["count"]))
            histogram, infinite = Histogram.from_dict(data["histogram"]), int(data["infinite"])
            found = Column(kind, rows, missing, infinite, moments, histogram, empty.categories)
            if histogram.total != moments.count or not moments.var[0] >= 0 or not np.isfinite(moments.mean[0]):
                raise ArgumentError("histogram and moments must go together, with a finite mean and a variance >= 0")
            values = moments.count + infinite
        if min(rows, missing) < 0 or values + missing != rows:
            raise ArgumentError(f"{values} values and {missing} missing ones are not {rows} rows")
        return found


def _moments(values: Any) -> Moments:
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused, by name, in Reference
        return Moments.of(values.reshape(-1, 1), axes=0)
