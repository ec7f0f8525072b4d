"""Batch renormalization as Keras has it: the correction that leads a batch towards the moving statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from batchnorm.errors import ArgumentError
from batchnorm.keras.batch import Batch
from batchnorm.keras.framework import keras


@dataclasses.dataclass(frozen=True)
class Clipping:
    """Bounds of the correction; None is no bound.

    Attributes:
        rmin: least r.
        rmax: largest r.
        dmax: largest |d|.
    """

    rmin: float | None = None
    rmax: float | None = None
    dmax: float | None = None

    @staticmethod
    def of(given: Mapping[str, float] | None) -> Clipping:
        """The bounds in `renorm_clipping`.

        Raises:
            ArgumentError: an unknown key, rmax below rmin, or a negative dmax.
        """
        given = dict(given or {})
        names = [field.name for field in dataclasses.fields(Clipping)]
        if set(given) - set(names):
            raise ArgumentError(f"renorm_clipping may have the keys {', '.join(names)}; got {', '.join(given)}.")
        found = Clipping(**given)
        if found.rmin is not None and found.rmax is not None and found.rmax < found.rmin:
            raise ArgumentError(f"renorm_clipping: rmax must not be below rmin, got {given}.")
        if found.dmax is not None and found.dmax < 0:
            raise ArgumentError(f"renorm_clipping: dmax must not be negative, got {given}.")
        return found

    def correction(self, batch: Batch, moving_mean: Any, moving_stddev: Any, epsilon: float) -> tuple[Any, Any]:
        """r and d: y = (x_hat * r + d) * gamma + beta; shape of the channels, constants to the gradient.

        Source: Ioffe 2017 (arXiv 1702.03275), Alg. 1; keras.layers.BatchNormalization, which adds epsilon under
            both roots.
        """
        ops = keras.ops
        least = epsilon**0.5  # early in training the moving deviation may be 0
        moving_stddev = ops.maximum(moving_stddev, least)
        r = ops.sqrt(batch.variance + epsilon) / moving_stddev
        d = (batch.mean - moving_mean) / moving_stddev
        if self.rmin is not None:
            r = ops.maximum(r, self.rmin)
        if self.rmax is not None:
            r = ops.minimum(r, self.rmax)
        if self.dmax is not None:
            d = ops.clip(d, -self.dmax, self.dmax)
        return ops.stop_gradient(r), ops.stop_gradient(d)
