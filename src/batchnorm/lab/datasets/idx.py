"""IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import ArgumentError
from batchnorm.lab.datasets.images import Images, as_labels, as_pixels

_PARTS = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}
_UNSIGNED_BYTE = 8


def holds_idx(folder: Path) -> bool:
    """Whether the folder looks like MNIST's."""
    return any(_found(folder, stem) is not None for stem in _PARTS.values())


def read_idx_folder(folder: Path) -> Images:
    """The four files of MNIST or Fashion-MNIST.

    Raises:
        ArgumentError: one of them is missing, or no whole IDX file.
    """
    arrays = {}
    for name, stem in _PARTS.items():
        path = _found(folder, stem)
        if path is None:
            raise ArgumentError(f"{folder} has no {stem} or {stem}.gz; it needs {', '.join(_PARTS.values())}")
        arrays[name] = read_idx(path)
    source = str(folder)
    return Images(
        as_pixels(arrays["train_x"], source),
        as_labels(arrays["train_y"], source),
        as_pixels(arrays["test_x"], source),
        as_labels(arrays["test_y"], source),
        source,
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of one IDX file of unsigned bytes.

    Format: two zero bytes, the type (8), the rank, each size as a big-endian 32-bit number, then the values.

    Raises:
        ArgumentError: the file is something else, or not whole.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArgumentError(f"{path} is no whole gzip file ({error}); get it again") from error
    rank = data[3] if len(data) >= 4 else 0
    start = 4 + 4 * rank
    if data[:3] != bytes((0, 0, _UNSIGNED_BYTE)) or not rank or len(data) < start:
        raise ArgumentError(f"{path} is no IDX file of unsigned bytes (it starts with {data[:4].hex(' ')})")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", rank, 4))
    if len(data) - start != math.prod(shape):
        raise ArgumentError(f"{path}: shape {shape} needs {math.prod(shape)} bytes, the file has {len(data) - start}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _found(folder: Path, stem: str) -> Path | None:
    # Some copies write a dot where the originals have a dash.
    names = (stem, f"{stem}.gz", stem.replace("-idx", ".idx"), f"{stem.replace('-idx', '.idx')}.gz")
    return next((folder / name for name in names if (folder / name).is_file()), None)
