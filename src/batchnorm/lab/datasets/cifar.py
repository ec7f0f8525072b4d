"""CIFAR-10 as its authors publish it: the Python batches and the binary ones, as an archive or unpacked."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from batchnorm.errors import ArgumentError
from batchnorm.lab.datasets.images import Images, Labels, Pixels

_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = "test_batch"
_ROW = 1 + 3 * 32 * 32


def holds_cifar(folder: Path) -> bool:
    """Whether the folder looks like CIFAR-10, unpacked."""
    return _stem_of(path.name for path in folder.iterdir()) is not None


def read_cifar_folder(folder: Path) -> Images:
    """CIFAR-10 from its unpacked batches.

    Raises:
        ArgumentError: a batch is missing or damaged.
    """
    return _images({path.name: path.read_bytes() for path in folder.iterdir() if _is_batch(path.name)}, str(folder))


def read_cifar_archive(path: Path) -> Images:
    """CIFAR-10 from cifar-10-python.tar.gz or cifar-10-binary.tar.gz; nothing is unpacked to disk.

    Raises:
        ArgumentError: the file is no whole archive, or one of something else.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isfile() and _is_batch(name):
                    file = archive.extractfile(member)
                    found[name] = b"" if file is None else file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ArgumentError(f"{path} is no whole tar archive ({error}); get it again") from error
    return _images(found, str(path))


def _is_batch(name: str) -> bool:
    return name.removesuffix(".bin") in (*_TRAIN, _TEST)


def _stem_of(names: Iterable[str]) -> str | None:
    """What the names of the batches among these end with: nothing, or .bin."""
    present = set(names)
    return next((suffix for suffix in ("", ".bin") if f"{_TEST}{suffix}" in present), None)


def _images(found: dict[str, bytes], source: str) -> Images:
    suffix = _stem_of(found)
    if suffix is None:
        raise ArgumentError(f"{source} holds no {_TEST} or {_TEST}.bin: it is not CIFAR-10 as its authors publish it")
    missing = [name for name in _TRAIN if f"{name}{suffix}" not in found]
    if missing:
        raise ArgumentError(f"{source}: CIFAR-10 without {', '.join(missing)}")
    parse = _parse_binary if suffix else _parse_python
    parts = [parse(found[f"{name}{suffix}"], f"{source}: {name}") for name in _TRAIN]
    test_x, test_y = parse(found[f"{_TEST}{suffix}"], f"{source}: {_TEST}")
    train_x, train_y = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Images(train_x, train_y, test_x, test_y, source)


def _parse_binary(data: bytes, what: str) -> tuple[Pixels, Labels]:
    if not data or len(data) % _ROW:
        raise ArgumentError(f"{what}: {len(data)} bytes are no whole number of images ({_ROW} bytes each)")
    rows = np.frombuffer(data, np.uint8).reshape(-1, _ROW)
    return _last_axis_channels(rows[:, 1:]), rows[:, 0].astype(np.int64)


def _parse_python(data: bytes, what: str) -> tuple[Pixels, Labels]:
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"], dtype=np.int64)
    except ArgumentError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ArgumentError(f"{what} is no whole batch of CIFAR-10 ({type(error).__name__}: {error})") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _ROW - 1:
        raise ArgumentError(f"{what}: expected uint8 (images, {_ROW - 1}), got {pixels.dtype} {pixels.shape}")
    return _last_axis_channels(pixels), labels


def _last_axis_channels(flat: Pixels) -> Pixels:
    return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _Unpickler(pickle.Unpickler):
    """Unpickles arrays and nothing else: a pickle from elsewhere could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        is_array = module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy") and name in (
            "_reconstruct",
            "ndarray",
            "dtype",
        )
        if not is_array and (module, name) != ("_codecs", "encode"):
            raise ArgumentError(f"a batch of CIFAR-10 holds arrays only; this file asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core") if _HAS_NEW_CORE else module, name)


_HAS_NEW_CORE = hasattr(np, "_core")
