"""Layer: what a Reference holds of one layer of a network: Moments of what enters it, or running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.errors import ArgumentError, ShapeError
from batchnorm.stats.moments import Moments


@dataclass(frozen=True, eq=False)
class Layer:
    """Mean and biased variance of each channel of a layer's input.

    Attributes:
        mean: (C,), float64; unit of the activations.
        var: (C,), float64, biased.
        count: values behind each channel; None for running statistics, which do not know it.
        eps: the layer's, which keeps constant channels from dividing by 0.
    """

    mean: npt.NDArray[np.float64]
    var: npt.NDArray[np.float64]
    count: int | None
    eps: float

    def merge(self, *others: Layer) -> Layer:
        """The layer over all rows together.

        Raises:
            ArgumentError: one holds running statistics, which have no count and cannot be weighted.
            ShapeError: the channels differ.
        """
        parts = (self, *others)
        if not others:
            return self
        moments = [Moments(part.mean, part.var, part.count) for part in parts if part.count is not None]
        if len(moments) < len(parts):
            raise ArgumentError("running statistics know no count and cannot be merged: measure the layers on data")
        whole = moments[0].merge(*moments[1:])
        return Layer(whole.mean, whole.var, int(whole.count), self.eps)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"mean": self.mean.tolist(), "var": self.var.tolist(), "count": self.count, "eps": self.eps}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Layer:
        """The reverse of `as_dict`.

        Raises:
            ShapeError: mean and variance differ in shape.
            ArgumentError: a mean is not finite or a variance negative.
        """
        mean, var = np.asarray(data["mean"], dtype=np.float64), np.asarray(data["var"], dtype=np.float64)
        if mean.shape != var.shape or mean.ndim != 1:
            raise ShapeError(f"mean and var of a layer must be (C,), got {mean.shape} and {var.shape}")
        if not (np.isfinite(mean).all() and (var >= 0).all()):
            raise ArgumentError("a layer needs finite means and variances >= 0")
        count = data["count"]
        return Layer(mean, var, None if count is None else int(count), float(data["eps"]))
