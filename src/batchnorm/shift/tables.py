"""Tables from files and libraries: one lazy frame, and batches of it with three kinds of columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl

from batchnorm.errors import ArgumentError, DtypeError
from batchnorm.shift.column import Kind
from batchnorm.shift.ragged import refuse_ragged

Table: TypeAlias = Any
"""A path (.csv, .csv.gz, .parquet), a polars DataFrame or LazyFrame, a pandas DataFrame, or an Arrow table."""

ROWS = 2**18
"""Of a batch."""

NULLS = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
"""What counts as missing in csv files."""

_LOOKED_AT = 10_000
"""Rows of a csv file that decide on the kinds of its columns, where no Reference says them."""


def scan(table: Table, kinds: Mapping[str, Kind] | None = None, *, nulls: Sequence[str] = NULLS) -> pl.LazyFrame:
    """The table as a lazy frame; nothing is read but the schema.

    Args:
        table: see `Table`.
        kinds: kinds of the columns, as a Reference knows them: a csv file is read accordingly.
        nulls: what counts as missing in csv files.

    Raises:
        ArgumentError: there is no such file, it is of another format or broken, or the table has no columns.
        DtypeError: the table is of another class, or a column of its own is of no kind that we know.
    """
    with readable(table):
        if isinstance(table, str | Path):
            frame = _scan_file(Path(table), kinds or {}, list(nulls))
        elif isinstance(table, pl.LazyFrame | pl.DataFrame):
            frame = table.lazy()
        elif hasattr(table, "__arrow_c_stream__"):  # Arrow, pandas from 2.2 on, and whatever else speaks it
            found = _from_arrow(table)
            frame = found.lazy()
        else:
            raise DtypeError(
                f"expected a path, a polars, pandas or Arrow table; got {type(table).__name__}: pass pl.DataFrame(...)"
            )
        schema = frame.collect_schema()
    if not schema:
        raise ArgumentError(f"{_name(table)} has no columns")
    for name, dtype in schema.items():
        _kind(name, dtype, _name(table))
    return frame


def kinds_of(frame: pl.LazyFrame) -> dict[str, Kind]:
    """The kind of each column."""
    return {name: _kind(name, dtype, "the table") for name, dtype in frame.collect_schema().items()}


def as_kinds(frame: pl.LazyFrame, kinds: Mapping[str, Kind], source: Table = None) -> pl.LazyFrame:
    """The columns of `kinds`, and no others: numbers and dates (in seconds) as Float64, categories as String.

    Raises:
        ArgumentError: a column is missing, or of a kind that cannot be read as the one asked for.
    """
    own, schema = kinds_of(frame), frame.collect_schema()
    missing = [name for name in kinds if name not in own]
    if missing:
        raise ArgumentError(
            f"{_name(source)} lacks {_listed(missing)}; it has {_listed(list(own))}: give tables with the same columns"
        )
    for name, kind in kinds.items():
        # A column without any value has no kind of its own, and anything can be read as a category.
        if kind not in (own[name], "category") and schema[name] != pl.Null:
            raise ArgumentError(f"{_name(source)}: expected {kind}s in column {name!r}, got {schema[name]}")
    return frame.select([_plain(name, kind, schema[name]) for name, kind in kinds.items()])


def batches(frame: pl.LazyFrame, source: Table = None) -> Iterator[pl.DataFrame]:
    """The rows in batches, in their order.

    Raises:
        ArgumentError: the file turns out to be broken.
    """
    with readable(source):
        if str(source).endswith(".parquet") or isinstance(source, pl.DataFrame):
            # Slices are asked for one after the other; a stream would read ahead, and hold much of the file.
            rows = frame.select(pl.len()).collect().item()
            for start in range(0, rows, ROWS):
                yield frame.slice(start, ROWS).collect()
        else:
            yield from frame.collect_batches(chunk_size=ROWS, maintain_order=True)


@contextmanager
def readable(source: Table) -> Iterator[None]:
    """Turns what polars raises about a file into an ArgumentError that names it."""
    try:
        yield
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArgumentError(f"{_name(source)} cannot be read: {first}") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ArgumentError(f"{_name(source)} is no file") from error


def _scan_file(path: Path, kinds: Mapping[str, Kind], nulls: list[str]) -> pl.LazyFrame:
    if not path.is_file():
        raise ArgumentError(f"{path} is no file")
    if path.suffix == ".parquet":
        return pl.scan_parquet(path, glob=False)
    if not path.name.endswith((".csv", ".csv.gz")):
        raise ArgumentError(f"expected a file named *.csv, *.csv.gz or *.parquet; got {path}")
    refuse_ragged(path)
    seen = pl.scan_csv(
        path, glob=False, infer_schema_length=_LOOKED_AT, null_values=nulls, try_parse_dates=True
    ).collect_schema()
    # Whole numbers of the first rows may be followed by others, so numbers are read as floats throughout. What a
    # Reference knows goes before what the first rows look like: codes such as 007 stay categories.
    types: dict[str, pl.DataType] = {}
    for name, dtype in seen.items():
        kind = kinds.get(name) or ("number" if dtype.is_numeric() else None)
        if kind == "number":
            dtype = pl.Float64()
        elif kind == "category" or dtype == pl.Null:
            dtype = pl.String()
        types[name] = dtype
    # A schema that is said is not looked for again, each time from the beginning of a packed file.
    return pl.scan_csv(path, glob=False, schema=types, null_values=nulls)


def _from_arrow(table: Any) -> pl.DataFrame:
    if type(table).__module__.partition(".")[0] == "pandas":
        try:
            return pl.from_pandas(table, nan_to_null=True)
        except ModuleNotFoundError as error:  # polars takes pandas apart with it
            raise ArgumentError(f"pandas tables need pyarrow: pip install 'batchnorm[shift]' ({error})") from error
    return pl.DataFrame(table)


def _kind(name: str, dtype: pl.DataType, source: str) -> Kind:
    if dtype.is_numeric():
        return "number"
    if dtype in (pl.Date, pl.Datetime):
        return "date"
    if dtype in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null):
        return "category"
    raise DtypeError(
        f"{source}: column {name!r} is of type {dtype}: expected numbers, text, booleans, dates; drop or convert it"
    )


def _plain(name: str, kind: Kind, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if kind == "category":
        return column.cast(pl.String)
    if kind == "number" or dtype == pl.Null:
        return column.cast(pl.Float64).fill_nan(None)
    seconds = column.cast(pl.Datetime("us")).dt.timestamp("us") if dtype == pl.Date else column.dt.timestamp("us")
    return seconds.cast(pl.Float64) / 1e6


def _name(source: Table) -> str:
    return str(source) if isinstance(source, str | Path) else "the table"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
