"""read(): images from whatever file or folder the user has."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from batchnorm.errors import ArgumentError
from batchnorm.lab.datasets.cifar import holds_cifar, read_cifar_archive, read_cifar_folder
from batchnorm.lab.datasets.folders import holds_splits, read_image_folder, read_image_zip
from batchnorm.lab.datasets.idx import holds_idx, read_idx_folder
from batchnorm.lab.datasets.images import Images, as_labels, as_pixels

KNOWN = (
    "an .npz with train_x, train_y, test_x, test_y (or x_train, ...); a .zip or a folder of images as "
    "train/<class>/<file> and test/<class>/<file>; a folder of MNIST's IDX files; CIFAR-10 as .tar.gz or unpacked"
)


def read(path: Path) -> Images:
    """Images from a file or a folder; its kind is found out.

    Args:
        path: one of what `KNOWN` lists. A folder that holds one such folder or archive alone counts as it.

    Returns:
        The images; nothing is written.

    Raises:
        ArgumentError: there is nothing there, it is of no known kind, or it is damaged.
    """
    if path.is_dir():
        return _from_folder(path)
    if not path.exists():
        raise ArgumentError(f"there is no file or folder {path}; expected {KNOWN}")
    name = path.name.lower()
    if name.endswith(".npz"):
        return _from_npz(path)
    if name.endswith(".zip"):
        return read_image_zip(path)
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return read_cifar_archive(path)
    raise ArgumentError(f"{path} is of no known kind; expected {KNOWN}")


def _from_folder(folder: Path) -> Images:
    if holds_splits(folder):
        return read_image_folder(folder)
    if holds_idx(folder):
        return read_idx_folder(folder)
    if holds_cifar(folder):
        return read_cifar_folder(folder)
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if len(inside) == 1:
        return read(inside[0])
    names = ", ".join(sorted(path.name for path in inside)[:5]) or "nothing"
    raise ArgumentError(f"{folder} holds {names}; expected {KNOWN}")


def _from_npz(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ArgumentError(f"{path} is no whole .npz file of plain arrays ({error})") from error
    parts = []
    for split in ("train", "test"):
        for letter in ("x", "y"):
            array = arrays.get(f"{split}_{letter}", arrays.get(f"{letter}_{split}"))
            if array is None:
                raise ArgumentError(f"{path} has no {split}_{letter} or {letter}_{split}, only {', '.join(arrays)}")
            parts.append(array)
    source = str(path)
    x, y, test_x, test_y = parts
    return Images(
        as_pixels(x, source), as_labels(y, source), as_pixels(test_x, source), as_labels(test_y, source), source
    )
