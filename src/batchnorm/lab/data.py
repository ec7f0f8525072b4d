"""The data sets that come with scikit-learn, split for tuning and testing. No download, no torch."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import ArgumentError
from batchnorm.lab.config import Data, Inputs
from batchnorm.stats import Moments

_WINE_SHUFFLE_SEED = 0
_DIGITS_TRAIN, _DIGITS_VALIDATION = 1000, 300


@dataclass(frozen=True)
class Split:
    """Rows of a data set.

    Attributes:
        x: Features, (rows, features), float32; images (rows, channels, height, width).
        y: Class numbers, (rows,), int64.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """A data set in three parts that share no row.

    Attributes:
        name: Its name.
        source: Where it comes from.
        rule: How it was split, in words.
        sha256: Hash of the features (float64) and classes (int64) as they came, before any split or preparation.
        train: What gradients are taken on, and what any preparation of the features is fitted on.
        validation: What learning rates are chosen on.
        test: What is reported.
    """

    name: str
    source: str
    rule: str
    sha256: str
    train: Split
    validation: Split
    test: Split

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train.y.max()) + 1

    @property
    def card(self) -> dict[str, str | int]:
        """The data set as results.json lists it."""
        parts = (self.train, self.validation, self.test)
        return {
            "name": self.name,
            "source": self.source,
            "rows": sum(len(part.y) for part in parts),
            "features": math.prod(self.train.x.shape[1:]),
            "split": self.rule,
            "sha256": self.sha256,
        }


@lru_cache(maxsize=16)
def load(name: Data, inputs: Inputs = "raw") -> Dataset:
    """A data set with prepared features.

    Args:
        name: "digits" (1797 images of 8x8 pixels from 0 to 16) or "wine" (178 wines, 13 measurements).
        inputs: "raw" as it came; "unit" divided by the largest value of the training rows; "binarised" 1 where at
            least half of that value; "standardised" each feature with mean 0 and variance 1 over the training rows
            (a constant feature becomes 0).

    Returns:
        The splits. What the preparation needs is fitted on the training rows alone.

    Raises:
        ArgumentError: There is no such data set or preparation.

    >>> load("digits").train.x.shape, load("digits").test.x.shape
    ((1000, 64), (497, 64))
    """
    if name == "digits":
        x, y, order, bounds, rule = _digits()
    elif name == "wine":
        x, y, order, bounds, rule = _wine()
    else:
        raise ArgumentError(f"expected the data set 'digits' or 'wine', got {name!r}")
    digest = hashlib.sha256(x.astype("<f8").tobytes() + y.astype("<i8").tobytes()).hexdigest()
    train, validation, test = np.split(order, bounds)
    x = _prepare(x, x[train], inputs)
    parts = [Split(np.ascontiguousarray(x[rows], dtype=np.float32), y[rows]) for rows in (train, validation, test)]
    return Dataset(name, f"scikit-learn, load_{name}", rule, digest, *parts)


_Loaded = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], tuple[int, int], str]


def _digits() -> _Loaded:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    # The file lists one writer after the other: splitting it in its order puts other writers into the test rows.
    bounds = (_DIGITS_TRAIN, _DIGITS_TRAIN + _DIGITS_VALIDATION)
    rule = (
        f"in file order: {bounds[0]} train, {_DIGITS_VALIDATION} validation, {len(y) - bounds[1]} test (other writers)"
    )
    return x.astype(np.float64), y.astype(np.int64), np.arange(len(y)), bounds, rule


def _wine() -> _Loaded:
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    order = np.random.default_rng(_WINE_SHUFFLE_SEED).permutation(len(y))  # the file is sorted by class
    rule = f"shuffled once: 100 train, 38 validation, {len(y) - 138} test"
    return x.astype(np.float64), y.astype(np.int64), order, (100, 138), rule


def _prepare(x: NDArray[np.float64], train: NDArray[np.float64], inputs: Inputs) -> NDArray[np.float64]:
    if inputs == "raw":
        return x
    if inputs == "unit":
        return np.asarray(x / train.max())
    if inputs == "binarised":
        return np.asarray(x >= train.max() / 2, dtype=np.float64)
    if inputs == "standardised":
        # By hand and not by FeatureNormalization, which would import torch before the first verdict.
        moments = Moments.of(train, axes=0)
        return np.asarray((x - moments.mean) / np.sqrt(np.where(moments.var > 0, moments.var, 1.0)))
    raise ArgumentError(f"expected inputs raw, unit, binarised or standardised, got {inputs!r}")
