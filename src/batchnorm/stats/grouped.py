"""GroupMoments: Moments of groups of channels, with the covariances inside of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchnorm.errors import ShapeError
from batchnorm.stats.moments import Moments


@dataclass(frozen=True, eq=False)
class GroupMoments(Moments):
    """Mean and biased covariance matrix of each group of d channels, torch tensors.

    They enter running statistics as Moments do, entry by entry; only merging needs the products of the means.

    Attributes:
        mean: (G, d, 1), float64.
        var: (G, d, d), float64: covariances, biased; variances on the diagonal.
        count: number of values behind them: an int, or a scalar integer tensor.
    """

    def merge(self, *others: Moments) -> GroupMoments:
        """Those of all the values together, by the law of total covariance.

        n = sum(n_i);  mean = sum(n_i * mean_i) / n;
        cov = sum(n_i * (cov_i + (mean_i - mean) (mean_i - mean)^T)) / n, in float64.

        Raises:
            ShapeError: the groups differ.

        Example:
            >>> import torch
            >>> x = torch.tensor([[[0.0, 2.0], [0.0, 4.0]]])  # one group of two channels with two values
            >>> parts = [GroupMoments(x[..., i : i + 1], torch.zeros(1, 2, 2), 1) for i in range(2)]
            >>> parts[0].merge(parts[1]).var.tolist()
            [[[1.0, 2.0], [2.0, 4.0]]]
        """
        parts = (self, *others)
        for part in others:
            if part.var.shape != self.var.shape:
                raise ShapeError(
                    f"covariances of shape {tuple(self.var.shape)} and {tuple(part.var.shape)} cannot be merged: "
                    "merge statistics of the same groups of channels."
                )
        count: Any = sum(part.count for part in parts)
        # An empty whole divides by 1 instead of 0: it stays neutral.
        divisor = max(count, 1) if isinstance(count, int) else count.clamp(min=1).double()
        shares = [part.count / divisor for part in parts]
        mean: Any = sum(share * part.mean for share, part in zip(shares, parts, strict=True))
        matrix: Any = 0
        for share, part in zip(shares, parts, strict=True):
            gap = part.mean - mean
            matrix = matrix + share * (part.var + gap @ gap.mT)
        return GroupMoments(mean, matrix, count)
