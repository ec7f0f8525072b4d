"""What every reader gives: labelled images in two parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import ArgumentError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images of one size, split as their source splits them.

    Attributes:
        train_x: (images, height, width, channels), uint8; 1 channel for grey, 3 for red, green and blue.
        train_y: (images,), int64; class numbers from 0.
        test_x: as train_x.
        test_y: as train_y.
        source: where they come from, in words.

    Raises:
        ArgumentError: shapes, dtypes or class numbers do not go together, or a part is empty.
    """

    train_x: Pixels
    train_y: Labels
    test_x: Pixels
    test_y: Labels
    source: str

    def __post_init__(self) -> None:
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3):
                raise ArgumentError(
                    f"{self.source}: expected {part} images as uint8 (images, height, width, 1 or 3), "
                    f"got {x.dtype} {x.shape}"
                )
            if y.shape != (len(x),) or not len(x):
                raise ArgumentError(f"{self.source}: {len(x)} {part} images, but labels of shape {y.shape}")
            if y.min() < 0:
                raise ArgumentError(f"{self.source}: {part} labels start at {y.min()}; class numbers start at 0")
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise ArgumentError(
                f"{self.source}: train images are {self.train_x.shape[1:]}, test images {self.test_x.shape[1:]}"
            )
        missing = set(np.unique(self.test_y)) - set(np.unique(self.train_y))
        if missing:
            raise ArgumentError(f"{self.source}: classes {sorted(map(int, missing))} are in the test part only")

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_y.max()) + 1

    @property
    def sha256(self) -> str:
        """Hash of shapes, pixels and labels: the same images in another file format have the same."""
        digest = hashlib.sha256()
        for array in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def as_pixels(x: NDArray[np.generic], source: str) -> Pixels:
    """Images with a channel axis: (images, height, width) get one.

    Raises:
        ArgumentError: x is not uint8, or has another rank.
    """
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise ArgumentError(
            f"{source}: expected uint8 images (images, height, width) or (images, height, width, channels), "
            f"got {x.dtype} {x.shape}"
        )
    return np.asarray(x if x.ndim == 4 else x[..., None])


def as_labels(y: NDArray[np.generic], source: str) -> Labels:
    """Class numbers as int64.

    Raises:
        ArgumentError: y holds no whole numbers, or has another rank than 1.
    """
    if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
        raise ArgumentError(f"{source}: expected labels as whole numbers (images,), got {y.dtype} {y.shape}")
    return y.astype(np.int64)
