"""Images by split and class: train/cat/1.png, test/dog/7.jpg, in a folder or in a zip file."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from batchnorm.errors import ArgumentError
from batchnorm.lab.datasets.images import Images, Labels, Pixels

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm")
_SPLITS = ("train", "test")


class _Entry(NamedTuple):
    split: str
    label: str
    name: str


def holds_splits(folder: Path) -> bool:
    """Whether the folder has train/ and test/."""
    return all((folder / split).is_dir() for split in _SPLITS)


def read_image_folder(folder: Path) -> Images:
    """Images from train/<class>/<file> and test/<class>/<file>; classes are numbered in alphabetical order.

    Raises:
        ArgumentError: there is nothing of that kind, a file is no image, or sizes differ.
    """
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return _images(names, lambda name: (folder / name).read_bytes(), str(folder))


def read_image_zip(path: Path) -> Images:
    """The same from a zip file, which may have one folder above train/ and test/; nothing is unpacked to disk.

    Raises:
        ArgumentError: as `read_image_folder`, or the file is no whole zip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _images(archive.namelist(), archive.read, str(path))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ArgumentError(f"{path} is no whole zip file ({error}); get it again") from error


def _images(names: list[str], read: Callable[[str], bytes], source: str) -> Images:
    entries = sorted(entry for name in names if (entry := _entry(name)) is not None)
    found = {split: [entry for entry in entries if entry.split == split] for split in _SPLITS}
    if not all(found.values()):
        raise ArgumentError(
            f"{source}: expected images as train/<class>/<file> and test/<class>/<file> ({', '.join(_SUFFIXES)}); "
            f"found {len(found['train'])} of train and {len(found['test'])} of test"
        )
    classes = {label: number for number, label in enumerate(sorted({entry.label for entry in entries}))}
    parts = [_part(found[split], read, classes, source) for split in _SPLITS]
    (train_x, train_y), (test_x, test_y) = parts
    return Images(train_x, train_y, test_x, test_y, source)


def _entry(name: str) -> _Entry | None:
    path = PurePosixPath(name)
    if path.suffix.lower() not in _SUFFIXES or len(path.parts) < 3 or path.parts[-3] not in _SPLITS:
        return None
    return _Entry(path.parts[-3], path.parts[-2], name)


def _part(
    entries: list[_Entry], read: Callable[[str], bytes], classes: dict[str, int], source: str
) -> tuple[Pixels, Labels]:
    first = _pixels(read(entries[0].name), entries[0].name)
    x = np.empty((len(entries), *first.shape), np.uint8)
    for row, entry in enumerate(entries):
        pixels = _pixels(read(entry.name), entry.name)
        if pixels.shape != first.shape:
            raise ArgumentError(
                f"{source}: images must have one size, but {entries[0].name} is {first.shape} and {entry.name} "
                f"{pixels.shape} (height, width, channels)"
            )
        x[row] = pixels
    return x, np.array([classes[entry.label] for entry in entries], dtype=np.int64)


def _pixels(data: bytes, name: str) -> Pixels:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ArgumentError(f"{name} is no whole image ({error})") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]
