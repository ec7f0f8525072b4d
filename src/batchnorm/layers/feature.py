"""FeatureNormalization: standardises or whitens a network's inputs with the statistics of a whole data set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchnorm.errors import BatchNormError, DtypeError, ShapeError
from batchnorm.stats.covariance import Covariance
from batchnorm.stats.moments import Moments

_ROUNDING = float(16 * np.finfo(np.float64).eps)


class FeatureNormalization(torch.nn.Module):
    """Inputs with mean 0 and variance 1 in every feature, and uncorrelated if asked; the input-side twin of BatchNorm.

    y = (x - mean) / std, or y = W (x - mean) with W = P^(-1/2) V^(-1/2) for whitening (P the correlation matrix, V
    the variances): of all whitenings the one whose outputs stay closest to the standardised features. The statistics
    come from `adapt`, one streaming pass over a data set in which batches merge exactly, in float64; nothing is
    learned, and nothing depends on the batch at hand. A constant feature gives 0. Whitening gives 0 variance to
    directions in which the data do not vary.

    Args:
        num_features: number of features, C, on the last axis.
        whiten: also make the features uncorrelated.

    Attributes:
        mean: (C,), float64 buffer.
        var: (C,), float64 buffer, biased.
        whitening: (C, C), float64 buffer; None unless `whiten`.
        count: scalar int64 buffer, rows seen by `adapt`; 0 before it.

    Example:
        >>> rows = torch.tensor([[1.0, 100.0], [3.0, 300.0]])
        >>> FeatureNormalization(2).adapt(rows)(rows).tolist()
        [[-1.0, -1.0], [1.0, 1.0]]

    Source: LeCun et al. 1998, "Efficient BackProp", section 4.3; Kessy, Lewin & Strimmer 2018, "Optimal Whitening and
    Decorrelation", ZCA-cor.
    """

    mean: Tensor
    var: Tensor
    whitening: Tensor | None
    count: Tensor

    def __init__(self, num_features: int, *, whiten: bool = False) -> None:
        super().__init__()
        self.num_features = num_features
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float64))
        self.register_buffer("var", torch.ones(num_features, dtype=torch.float64))
        self.register_buffer("whitening", torch.eye(num_features, dtype=torch.float64) if whiten else None)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def adapt(self, data: Any) -> FeatureNormalization:
        """Takes the statistics of `data`, in one pass; whatever was there before is replaced.

        Args:
            data: a tensor or array (..., C), or an iterable of those, or a DataLoader whose batches are a tensor or
                begin with one. Float.

        Returns:
            self.

        Raises:
            ShapeError: another number of features, or fewer than 2 rows in all.
            DtypeError: not float.
            BatchNormError: a value is not finite.
        """
        moments = Moments(np.zeros(self.num_features), np.zeros(self.num_features), 0)
        covariance = Covariance(np.zeros(self.num_features), np.zeros((self.num_features,) * 2), 0)
        for batch in _batches(data):
            rows = self._rows(batch)
            moments = moments.merge(Moments.of(rows, axes=0))
            if self.whitening is not None:
                covariance = covariance.merge(Covariance.of(rows))
        if int(moments.count) < 2:
            raise ShapeError(f"adapt needs at least 2 rows, got {moments.count}: pass the training set, (..., C).")
        self._take(moments, covariance)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """The normalised features.

        Args:
            input: features, (..., C), float.

        Returns:
            Shape and dtype of the input; computed in float64, as raw features may differ by many powers of ten.

        Raises:
            BatchNormError: `adapt` has not run and no statistics were loaded.
            ShapeError: another number of features.
            DtypeError: the input is no float tensor.
        """
        if not input.is_floating_point():
            raise DtypeError(f"input must be a float tensor, got {input.dtype}: pass x.float().")
        self._check_features(tuple(input.shape))
        if not torch.compiler.is_compiling() and int(self.count) == 0:
            raise BatchNormError("FeatureNormalization has no statistics yet: call adapt(training_set), or load them.")
        centred = input.double() - self.mean
        if self.whitening is not None:
            return (centred @ self.whitening).to(input.dtype)
        return (centred * _inverse_std(self.mean, self.var)).to(input.dtype)

    def _take(self, moments: Moments, covariance: Covariance) -> None:
        """Writes statistics into the buffers: the one place in which the layer's state changes."""
        with torch.no_grad():
            self.mean.copy_(torch.as_tensor(moments.mean))
            self.var.copy_(torch.as_tensor(moments.var))
            self.count.fill_(int(moments.count))
            if self.whitening is not None:
                self.whitening.copy_(torch.as_tensor(_zca_cor(covariance)))

    def _rows(self, batch: Any) -> npt.NDArray[np.float64]:
        values = batch.detach().cpu() if isinstance(batch, Tensor) else np.asarray(batch)
        dtype = str(values.dtype)
        if "float" not in dtype or (isinstance(values, Tensor) and values.is_complex()):
            raise DtypeError(f"adapt expects float data, got {dtype}: convert it first (x.float(), x.astype(float)).")
        wide = values.double().numpy() if isinstance(values, Tensor) else values.astype(np.float64)
        self._check_features(wide.shape)
        rows = wide.reshape(-1, self.num_features)
        if not np.isfinite(rows).all():
            where = np.flatnonzero(~np.isfinite(rows).all(axis=0)).tolist()
            raise BatchNormError(
                f"adapt met NaN or infinity in the features {where}: fill or drop such rows first; nothing was changed."
            )
        return rows

    def _check_features(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 1 or shape[-1] != self.num_features:
            raise ShapeError(f"FeatureNormalization expected (..., {self.num_features}), got {shape}.")

    def _apply(self, fn: Any, recurse: bool = True) -> FeatureNormalization:
        # .half() or .float() on the whole model must not round these statistics: only their device follows.
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            now = getattr(self, name)
            if now.dtype != old.dtype:
                setattr(self, name, old.to(now.device))
        return self

    def extra_repr(self) -> str:
        """What repr() shows between the parentheses."""
        return f"{self.num_features}, whiten={self.whitening is not None}"


def _batches(data: Any) -> Iterable[Any]:
    """The arrays in `data`: itself, or those of an iterable, or the first entry of each batch of a loader."""
    if isinstance(data, Tensor | np.ndarray):
        return [data]
    if hasattr(data, "__array__"):
        return [np.asarray(data)]
    return (batch[0] if isinstance(batch, list | tuple) else batch for batch in data)


def _inverse_std(mean: Tensor, var: Tensor) -> Tensor:
    """1 / std; 0 for a constant feature, whose variance is 0 or the rounding of its mean."""
    is_constant = var.sqrt() <= _ROUNDING * mean.abs()
    return var.masked_fill(is_constant, 1).rsqrt().masked_fill(is_constant, 0)


def _zca_cor(covariance: Covariance) -> npt.NDArray[np.float64]:
    """V^(-1/2) P^(-1/2), (C, C), for row vectors: x_white = (x - mean) @ it.

    Through the correlation matrix, so that features of any scale are treated alike. Eigenvalues that are rounding
    beside the largest are directions in which the data do not vary: they get 0, as in a pseudo-inverse.
    """
    variances = torch.from_numpy(np.diag(covariance.matrix).copy())
    inverse_std = _inverse_std(torch.from_numpy(covariance.mean), variances).numpy()
    correlation = covariance.matrix * np.outer(inverse_std, inverse_std)
    values, vectors = np.linalg.eigh(correlation)
    is_flat = values <= values.max(initial=0) * len(values) * np.finfo(np.float64).eps
    roots = np.where(is_flat, 0, 1 / np.sqrt(np.where(is_flat, 1, values)))
    whitening: npt.NDArray[np.float64] = inverse_std[:, None] * ((vectors * roots) @ vectors.T)
    return whitening
