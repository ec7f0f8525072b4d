"""Stored images as a data set: split, averaged down, and prepared. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import ArgumentError
from batchnorm.lab.config import Inputs
from batchnorm.lab.data import Dataset, Split
from batchnorm.lab.datasets.images import Images
from batchnorm.lab.datasets.stored import opened
from batchnorm.stats import Moments

_SHUFFLE_SEED = 0
_LARGEST_VALIDATION = 2000
_SCALE = np.float32(255)


@lru_cache(maxsize=4)
def load_images(folder: str, *, rows: int = 0, side: int = 0, inputs: Inputs = "unit") -> Dataset:
    """Images as (rows, channels, height, width), float32.

    Both parts of the source are shuffled once, by a fixed seed: folders and archives come class by class, and whoever
    takes the first images of a part must get a fair sample. The last tenth of the training part, 2,000 images at most,
    is for validation; training rows are the first ones of the rest. Two calls with other `rows` so share their
    validation.

    Args:
        folder: where `datasets.stored.store` put them.
        rows: how many training rows; 0 for all.
        side: averaged down to so many pixels a side (a divisor of height and width); 0 leaves them as they are.
        inputs: "unit": pixels from 0 to 1; "binarised": 1 from one half on; "standardised": each channel with mean 0
            and variance 1 over the training rows; "raw": pixels from 0 to 255.

    Returns:
        The splits.

    Raises:
        ArgumentError: there are fewer training rows, or the side does not divide the images' sides.
    """
    images = opened(Path(folder))
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(images.train_y))
    held_out = min(_LARGEST_VALIDATION, len(order) // 10)
    there = len(order) - held_out
    if not 0 <= rows <= there:
        raise ArgumentError(f"expected {rows} training images or more, {images.source} has {there} beside validation")
    tested = np.random.default_rng(_SHUFFLE_SEED).permutation(len(images.test_y))
    parts = [
        (_averaged(x[of], side, images), np.array(y[of], dtype=np.int64))
        for x, y, of in (
            (images.train_x, images.train_y, order[: rows or there]),
            (images.train_x, images.train_y, order[there:]),
            (images.test_x, images.test_y, tested),
        )
    ]
    prepare = _preparation(parts[0][0], inputs)
    train, validation, test = (Split(prepare(x), y) for x, y in parts)
    rule = f"shuffled once: {len(train.y)} train, {held_out} validation; {len(test.y)} test as the source has it" + (
        f"; averaged down to {side}x{side}" if side else ""
    )
    return Dataset(_name(images), Path(images.source).name, rule, images.sha256, train, validation, test)


def image_card(images: Images) -> dict[str, str | int]:
    """The images as results.json lists a data set; their place on this machine is left out."""
    rows = len(images.train_y), len(images.test_y)
    return {
        "name": _name(images),
        "source": Path(images.source).name,
        "rows": sum(rows),
        "features": math.prod(images.train_x.shape[1:]),
        "split": f"{rows[0]} train and validation, {rows[1]} test, as the source has them",
        "sha256": images.sha256,
    }


def _name(images: Images) -> str:
    return Path(images.source).name.partition(".")[0] or "images"


def _averaged(pixels: NDArray[np.uint8], side: int, images: Images) -> NDArray[np.float32]:
    """(rows, channels, side, side): means of squares of pixels, from 0 to 255."""
    rows, height, width, channels = pixels.shape
    if side and (height % side or width % side or height != width):
        raise ArgumentError(f"{images.source}: {height}x{width} pixels cannot be averaged down to {side}x{side}")
    step = height // side if side else 1
    found = np.empty((rows, channels, height // step, width // step), np.float32)
    for start in range(0, rows, 4096):  # a part at a time: the whole in float32 would be large
        part = pixels[start : start + 4096].astype(np.float32).transpose(0, 3, 1, 2)
        found[start : start + 4096] = part.reshape(len(part), channels, height // step, step, width // step, step).mean(
            axis=(3, 5)
        )
    return found


def _preparation(train: NDArray[np.float32], inputs: Inputs) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """What is done to the pixels of every part; what it needs is fitted on the training rows."""
    if inputs == "raw":
        return lambda x: x
    if inputs == "unit":
        return lambda x: x / _SCALE
    if inputs == "binarised":
        return lambda x: (x >= _SCALE / 2).astype(np.float32)
    if inputs == "standardised":
        moments = Moments.of(train, axes=(0, 2, 3))
        mean = moments.mean.astype(np.float32).reshape(-1, 1, 1)
        std = np.sqrt(np.where(moments.var > 0, moments.var, 1.0)).astype(np.float32).reshape(-1, 1, 1)
        return lambda x: (x - mean) / std
    raise ArgumentError(f"expected inputs raw, unit, binarised or standardised, got {inputs!r}")
