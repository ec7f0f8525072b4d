"""Covariance: Moments with the products between channels, merged by the same rule; what whitening needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchnorm.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Covariance:
    """Mean, biased covariance matrix and number of rows of a table, in float64.

    Attributes:
        mean: (C,), float64; unit of the values.
        matrix: (C, C), float64, biased; unit of the values, squared. Its diagonal is the variance of Moments.
        count: number of rows.
    """

    mean: npt.NDArray[np.float64]
    matrix: npt.NDArray[np.float64]
    count: int

    @staticmethod
    def of(rows: npt.NDArray[np.floating]) -> Covariance:
        """Covariance of `rows`, (M, C), any real dtype, over M; no rows give count 0 and zeros, neutral in `merge`.

        Example:
            >>> Covariance.of(np.array([[0.0, 0.0], [2.0, 4.0]])).matrix.tolist()
            [[1.0, 2.0], [2.0, 4.0]]
        """
        wide = np.asarray(rows, dtype=np.float64)
        count = max(len(wide), 1)
        mean = wide.sum(axis=0) / count
        centred = wide - mean
        # The first mean is rounded; what its rounding leaves over belongs to the mean and not to the products.
        rest = centred.sum(axis=0) / count
        centred = centred - rest
        return Covariance(mean + rest, centred.T @ centred / count, len(wide))

    def merge(self, other: Covariance) -> Covariance:
        """Covariance of all the rows together, by the law of total covariance.

        Raises:
            ShapeError: the numbers of channels differ.
        """
        if self.mean.shape != other.mean.shape:
            raise ShapeError(
                f"covariances of {self.mean.size} and {other.mean.size} channels cannot be merged: "
                "each part of the data must have the same features."
            )
        count = self.count + other.count
        mine, theirs = self.count / max(count, 1), other.count / max(count, 1)
        gap = other.mean - self.mean
        matrix = mine * self.matrix + theirs * other.matrix + mine * theirs * np.outer(gap, gap)
        return Covariance(mine * self.mean + theirs * other.mean, matrix, count)
