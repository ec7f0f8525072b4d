"""Reference: what is remembered of a table and of a network's layers, so that others can be compared to it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from batchnorm.errors import ArgumentError
from batchnorm.shift import sample as rows_of
from batchnorm.shift import storage
from batchnorm.shift.column import Column, Kind
from batchnorm.shift.layer import Layer
from batchnorm.shift.tables import NULLS, Table, as_kinds, batches, kinds_of, scan

SAMPLE_ROWS = 20_000
"""Rows of a sample: what classifiers learn from."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Columns, layers and a sample of rows; immutable, and merged exactly.

    Attributes:
        columns: name -> Moments, histogram or categories, and missing values, over all rows.
        layers: name -> Moments or running statistics; empty for a table alone.
        rows: of the table; 0 where there is none.
        sample: rows of the table, numbers and dates as Float64, categories as String, and their keys.
        sample_rows: rows that the sample holds at most.
        nulls: what counted as missing, and so has to on the other side.

    Example:
        >>> import polars as pl
        >>> one = Reference.of(pl.DataFrame({"x": [1.0, 2.0, None], "c": ["a", "b", "a"]}))
        >>> both = one.merge(Reference.of(pl.DataFrame({"x": [3.0], "c": ["b"]})))
        >>> both.rows, both.columns["x"].moments.mean.tolist(), both.columns["x"].missing
        (4, [2.0], 1)
    """

    columns: Mapping[str, Column]
    layers: Mapping[str, Layer]
    rows: int
    sample: pl.DataFrame
    sample_rows: int = SAMPLE_ROWS
    nulls: tuple[str, ...] = NULLS

    def __post_init__(self) -> None:
        wide = [name for name, column in self.columns.items() if not math.isfinite(column.moments.var[0])]
        if wide:
            raise ArgumentError(f"the values in column {wide[0]!r} are too large for a variance: rescale them")

    @staticmethod
    def of(
        table: Table,
        *,
        like: Reference | None = None,
        kinds: Mapping[str, Kind] | None = None,
        only: bool = False,
        sample_rows: int = SAMPLE_ROWS,
        salt: str = "",
        nulls: Sequence[str] | None = None,
    ) -> Reference:
        """The Reference of a table, in one pass and bounded memory.

        Args:
            table: path of a .csv, .csv.gz or .parquet file, or a polars, pandas or Arrow table.
            like: take its columns only, each as the same kind; other columns are left out.
            kinds: name -> "number", "category" or "date" for columns whose kind is not what it looks like (codes).
            only: take the columns of `kinds` and no others.
            sample_rows: rows to keep; 0 keeps none, and then no classifier can be asked.
            salt: tells partitions of one table apart, so that their rows are sampled independently.
            nulls: what counts as missing in csv files; None: what did in `like`, else "", NA, nan, null and their kin.

        Raises:
            ArgumentError: the table has no rows, or lacks a column, or cannot be read.
        """
        if not isinstance(sample_rows, int) or sample_rows < 0:
            raise ArgumentError(f"sample_rows must be an int of at least 0, got {sample_rows!r}")
        asked = {name: column.kind for name, column in like.columns.items()} if like else dict(kinds or {})
        gaps = tuple(nulls) if nulls is not None else like.nulls if like else NULLS
        frame = scan(table, asked, nulls=gaps)
        wanted: dict[str, Kind] = asked if like or only else {**kinds_of(frame), **asked}
        if rows_of.KEY in wanted:
            raise ArgumentError(f"a column is named {rows_of.KEY!r}, as the sample's own is: rename it")
        frame = as_kinds(frame, wanted, table)
        found: dict[str, Column] = {}
        parts: list[pl.DataFrame] = []
        rows, limit = 0, None
        for batch in batches(frame, table):
            for name, kind in wanted.items():
                before = found.get(name)
                part = Column.of(batch[name], kind, before.histogram.level if before else None)
                found[name] = before.merge(part) if before else part
            candidates = rows_of.keyed(batch, rows, salt)
            parts.append(candidates if limit is None else rows_of.below(candidates, limit))
            rows += batch.height
            if sum(part.height for part in parts) > 2 * sample_rows:
                parts = [rows_of.smallest(parts, sample_rows)]
                limit = int(parts[0][rows_of.KEY].max() or 0) if parts[0].height == sample_rows else None  # type: ignore[arg-type]
        if rows == 0:
            raise ArgumentError(f"{table if isinstance(table, str | Path) else 'the table'} has no rows")
        return Reference(found, {}, rows, rows_of.smallest(parts, sample_rows), sample_rows, gaps)

    def without(self, *names: str) -> Reference:
        """The same without these columns (a target that new rows lack), for `like`; names that it has not are no error.

        Example:
            >>> import polars as pl
            >>> list(Reference.of(pl.DataFrame({"x": [1.0], "y": [2.0]})).without("y").columns)
            ['x']
        """
        columns = {name: column for name, column in self.columns.items() if name not in names}
        return replace(self, columns=columns, sample=self.sample.drop(names, strict=False))

    def with_layers(self, layers: Mapping[str, Layer]) -> Reference:
        """The same with these layers."""
        return replace(self, layers=dict(layers))

    def merge(self, *others: Reference) -> Reference:
        """The Reference of all rows together: what one pass over all of them gives, the choice of sampled rows aside.

        Raises:
            ArgumentError: columns or layers differ in name or kind.
        """
        parts = (self, *others)
        for part in others:
            if set(part.columns) != set(self.columns) or set(part.layers) != set(self.layers):
                raise ArgumentError("References of different columns or layers cannot be merged")
        size = min(part.sample_rows for part in parts)
        names = self.sample.columns
        return Reference(
            {name: Column.merge(*(part.columns[name] for part in parts)) for name in self.columns},
            {name: Layer.merge(*(part.layers[name] for part in parts)) for name in self.layers},
            sum(part.rows for part in parts),
            rows_of.smallest([part.sample.select(names) for part in parts], size),
            size,
            self.nulls,
        )

    def save(self, path: str | Path) -> None:
        """Writes versioned JSON, the sample inside as parquet; whole or not at all."""
        columns = {name: column.as_dict() for name, column in self.columns.items()}
        layers = {name: layer.as_dict() for name, layer in self.layers.items()}
        own = {"rows": self.rows, "sample_rows": self.sample_rows, "nulls": list(self.nulls)}
        storage.write(Path(path), {**own, "columns": columns, "layers": layers}, self.sample)

    @staticmethod
    def load(path: str | Path) -> Reference:
        """The Reference in a file.

        Raises:
            ArgumentError: the file is no Reference, of another version, or damaged.
        """
        with storage.read(Path(path)) as (body, sample):
            columns = {name: Column.from_dict(one) for name, one in body["columns"].items()}
            layers = {name: Layer.from_dict(one) for name, one in body["layers"].items()}
            rows = int(body["rows"])
            for name, column in columns.items():
                if column.rows != rows:
                    raise ArgumentError(f"column {name!r} has {column.rows} rows of {rows}")
            if set(sample.columns) != {*columns, rows_of.KEY}:
                raise ArgumentError("the sample has other columns")
            return Reference(columns, layers, rows, sample, int(body["sample_rows"]), tuple(map(str, body["nulls"])))


def merged(parts: Iterable[Reference]) -> Reference:
    """The parts together, in any order.

    Raises:
        ArgumentError: there are none.
    """
    found = list(parts)
    if not found:
        raise ArgumentError("no partitions came: expected at least one")
    return found[0].merge(*found[1:])


def of_layers(layers: Mapping[str, Layer]) -> Reference:
    """A Reference of a network alone."""
    return Reference({}, dict(layers), 0, pl.DataFrame({rows_of.KEY: pl.Series([], dtype=pl.UInt64)}))
