"""The file of a Reference: JSON with a format, a version and a checksum, written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from batchnorm.errors import ArgumentError, BatchNormError

_FORMAT, _VERSION = "batchnorm shift reference", 1


def write(path: Path, body: Mapping[str, Any], sample: pl.DataFrame) -> None:
    """Writes `body` and `sample` to `path`."""
    buffer = io.BytesIO()
    sample.write_parquet(buffer, compression="zstd")
    content = {**body, "sample": base64.b64encode(buffer.getvalue()).decode("ascii")}
    whole = {"format": _FORMAT, "version": _VERSION, "sha256": _checksum(content), **content}
    write_whole(path, json.dumps(whole, allow_nan=False).encode("utf-8"))


@contextmanager
def read(path: Path) -> Iterator[tuple[dict[str, Any], pl.DataFrame]]:
    """Body and sample of the file; what goes wrong with them inside the block is an ArgumentError that names it.

    Raises:
        ArgumentError: there is no such file, it is no Reference, of another version, or damaged.
    """
    if not path.is_file():
        raise ArgumentError(f"{path} is no file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError(
            f"{path} is no Reference (no JSON): write one with 'batchnorm shift reference'. {error}"
        ) from error
    if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
        raise ArgumentError(f"{path} is no Reference: write one with 'batchnorm shift reference'")
    version = data.pop("version", None)
    if version != _VERSION:
        raise ArgumentError(
            f"{path} is a Reference of version {version!r}, and this batchnorm reads version {_VERSION}: "
            "write it again from the data"
        )
    if data.pop("sha256", None) != _checksum(data):
        raise ArgumentError(f"{path} is damaged: its checksum does not fit. Write it again from the data")
    try:
        sample = pl.read_parquet(io.BytesIO(base64.b64decode(data.pop("sample"))))
        yield data, sample
    except (KeyError, TypeError, ValueError, AttributeError, pl.exceptions.PolarsError, BatchNormError) as error:
        raise ArgumentError(f"{path} is damaged ({error}): write it again from the data") from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes the file beside its place and moves it there, so that there is never half a file.

    Raises:
        ArgumentError: the folder does not exist.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ArgumentError(f"the folder of {path} does not exist")
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's files are for the owner only
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode("utf-8")).hexdigest()
