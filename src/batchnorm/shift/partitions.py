"""One Reference from many partitions, wherever each is read: here, on Dask's workers, or on Spark's."""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from batchnorm.errors import ArgumentError
from batchnorm.shift.column import Kind
from batchnorm.shift.reference import SAMPLE_ROWS, Reference, merged
from batchnorm.shift.tables import NULLS, Table, kinds_of, scan


def from_parts(
    parts: Sequence[Table],
    *,
    kinds: Mapping[str, Kind] | None = None,
    sample_rows: int = SAMPLE_ROWS,
    nulls: Sequence[str] = NULLS,
) -> Reference:
    """The Reference of a table that lies in several files or frames, one after the other.

    The first part says the columns and their kinds. Arguments as `Reference.of`.

    Raises:
        ArgumentError: there are no parts, or one lacks a column.
    """
    if not parts:
        raise ArgumentError("no parts came: expected at least one table")
    known = {**kinds_of(scan(parts[0], kinds, nulls=nulls)), **(kinds or {})}
    one = partial(of_part, kinds=known, sample_rows=sample_rows, nulls=nulls)
    return merged(one(part, number) for number, part in enumerate(parts))


def from_dask(
    parts: Any,
    *,
    kinds: Mapping[str, Kind] | None = None,
    sample_rows: int = SAMPLE_ROWS,
    nulls: Sequence[str] = NULLS,
) -> Reference:
    """The same with each part read by a Dask worker: only References travel.

    Args:
        parts: paths that every worker can read, or a dask DataFrame, whose partitions are the parts.
        kinds: as for `Reference.of`.
        sample_rows: likewise.
        nulls: likewise.

    Raises:
        ArgumentError: dask is not installed, or there are no parts.
    """
    try:
        from dask.base import compute
        from dask.delayed import delayed
    except ModuleNotFoundError as error:
        raise ArgumentError("--engine dask needs dask: pip install 'batchnorm[dask]'") from error
    lazy = parts.to_delayed() if hasattr(parts, "to_delayed") else [delayed(part) for part in parts]
    if not len(lazy):
        raise ArgumentError("no parts came: expected at least one table")
    first = lazy[0].compute()
    known = {**kinds_of(scan(first, kinds, nulls=nulls)), **(kinds or {})}
    one = delayed(partial(of_part, kinds=known, sample_rows=sample_rows, nulls=nulls))
    return merged(compute(*(one(part, number) for number, part in enumerate(lazy))))


def from_spark(
    parts: Any,
    *,
    kinds: Mapping[str, Kind] | None = None,
    sample_rows: int = SAMPLE_ROWS,
    nulls: Sequence[str] = NULLS,
) -> Reference:
    """The same on Spark's executors, by `mapInPandas`: only References travel.

    Args:
        parts: a pyspark.sql.DataFrame, whose partitions are the parts and whose first rows say the kinds as pandas
            shows them; or paths that every executor can read, in the session that stands or a local one.
        kinds: as for `Reference.of`.
        sample_rows: likewise.
        nulls: likewise.

    Raises:
        ArgumentError: pyspark is not installed, there are no parts, or an executor cannot read one.
    """
    try:
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ModuleNotFoundError as error:
        raise ArgumentError("--engine spark needs pyspark and Java: pip install 'batchnorm[spark]'") from error
    try:
        if hasattr(parts, "mapInPandas"):
            frame, first = parts, parts.limit(1000).toPandas()
        else:
            if not len(parts):
                raise ArgumentError("no parts came: expected at least one table")
            first = parts[0]
            # Spark's own choice is whatever python3 the path finds first, which need not have this library.
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
            session = SparkSession.builder.config("spark.ui.enabled", "false").getOrCreate()
            numbered = [(number, str(part)) for number, part in enumerate(parts)]
            frame = session.createDataFrame(numbered, "number int, path string").repartition(len(parts), "number")
        known = {**kinds_of(scan(first, kinds, nulls=nulls)), **(kinds or {})}
        of_frames = spark_partition if frame is parts else spark_files
        run = partial(of_frames, kinds=known, sample_rows=sample_rows, nulls=nulls)
        rows = frame.mapInPandas(run, "reference binary").collect()
    except PySparkException as error:
        said = str(error).strip().splitlines()
        reasons = [line for line in said if re.match(r"[\w.]+Error: ", line)]
        raise ArgumentError(f"Spark cannot read the parts: {(reasons or said)[-1]}") from error
    return merged(pickle.loads(row.reference) for row in rows)


def spark_partition(
    frames: Iterable[Any], *, kinds: Mapping[str, Kind], sample_rows: int, nulls: Sequence[str] = NULLS
) -> Iterator[Any]:
    """What an executor runs: pandas frames of one partition in, one row with its Reference out, in a column of bytes.

    Args:
        frames: as `mapInPandas` hands them over; the partition's number comes from Spark, where there is one.
        kinds: of the columns.
        sample_rows: as for `Reference.of`.
        nulls: likewise.
    """
    of = partial(of_part, kinds=kinds, sample_rows=sample_rows, nulls=nulls)
    return _in_bytes(of(frame, f"{_spark_partition_number()}-{i}") for i, frame in enumerate(frames) if len(frame))


def spark_files(
    frames: Iterable[Any], *, kinds: Mapping[str, Kind], sample_rows: int, nulls: Sequence[str] = NULLS
) -> Iterator[Any]:
    """The same for frames of paths, with the columns `number` and `path`."""
    of = partial(of_part, kinds=kinds, sample_rows=sample_rows, nulls=nulls)
    return _in_bytes(of(row.path, row.number) for frame in frames for row in frame.itertuples())


def _in_bytes(references: Iterable[Reference]) -> Iterator[Any]:
    import pandas as pd

    parts = list(references)
    if parts:
        yield pd.DataFrame({"reference": [pickle.dumps(merged(parts))]})


def of_part(
    part: Table, number: int | str, *, kinds: Mapping[str, Kind], sample_rows: int, nulls: Sequence[str] = NULLS
) -> Reference:
    """The Reference of one part; its number makes its rows be sampled apart from those of the others."""
    return Reference.of(part, kinds=kinds, only=True, sample_rows=sample_rows, salt=f"part {number}", nulls=nulls)


def _spark_partition_number() -> int:
    try:
        from pyspark import TaskContext
    except ModuleNotFoundError:
        return 0
    context = TaskContext.get()
    return 0 if context is None else int(context.partitionId())
