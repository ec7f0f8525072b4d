"""Moments: mean, biased variance and count, the one noun of this library, and the one rule that merges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from batchnorm.errors import ArgumentError, DtypeError, ShapeError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

Array: TypeAlias = Any
"""A torch.Tensor or a numpy.ndarray: the caller knows which, and a union would make him prove it at every use."""

_NUMPY = (np.ndarray, np.generic)
_FEW = 4  # parts; for more, a tensor for each count would take longer than the merge


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean, biased variance and number of values of each channel.

    Immutable. A batch, a ghost batch, a rank, a client, a column of a table or a whole data set yields Moments, and
    `merge` unites any of them exactly.

    Attributes:
        mean: (C,) or any shape, float64 (float32 where the device has no float64); unit of the values.
        var: shape of `mean`, biased (divided by count, not count - 1); unit of the values, squared.
        count: number of values behind each mean: an int, or an integer tensor where a mask decides.

    Example:
        >>> import numpy as np
        >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
        >>> m = Moments.of(x, axes=0)
        >>> m.mean.tolist(), m.var.tolist(), m.count
        ([2.0, 20.0], [1.0, 100.0], 2)
    """

    mean: Array
    var: Array
    count: Array | int

    @staticmethod
    def of(x: Array, axes: int | Sequence[int] | None = None, mask: Array | None = None) -> Moments:
        """Moments of `x` over `axes`.

        Two passes, the second about the first one's mean, so that nothing cancels: at mean 1e4 and standard deviation 1
        the variance of float32 values agrees with float64 to 1e-6. Differentiable where `x` is a torch tensor.

        Args:
            x: values, any shape, float (NumPy arrays may hold integers).
            axes: the axes to reduce; None reduces all of them. The others are the channels.
            mask: bool, broadcastable to the shape of `x`; True = counts. What it leaves out may hold anything, NaN too.

        Returns:
            Moments with the shape of the axes that were kept. No values at all give count 0, mean 0 and var 0,
            the neutral element of `merge`.

        Raises:
            DtypeError: x is not a float (torch) or not a number (NumPy), or mask is not bool or of the other kind.
            ShapeError: mask does not broadcast to x, or an axis is out of range.
            ArgumentError: axes is empty, or names an axis twice.
        """
        is_numpy = isinstance(x, _NUMPY)
        if not is_numpy and not hasattr(x, "masked_fill"):
            raise DtypeError(f"Moments need a torch tensor or a NumPy array, got {type(x).__name__}.")
        axes = _normalised_axes(axes, x.ndim)
        if mask is not None:
            if isinstance(mask, _NUMPY) != is_numpy:
                raise DtypeError(
                    f"mask must be of the kind of the values, {type(x).__name__}; got {type(mask).__name__}."
                )
            _check_mask(mask, tuple(x.shape))
        return _of_numpy(np.asarray(x), axes, mask) if is_numpy else _of_torch(x, axes, mask)

    def merge(self, *others: Moments) -> Moments:
        """Moments of all the values together, by the law of total variance; `Moments.merge(a, b, c)` reads well too.

        n = sum(n_i);  mean = sum(n_i * mean_i) / n;  var = sum(n_i * (var_i + (mean_i - mean)^2)) / n, in float64.

        Args:
            others: Moments of the same shape and kind (all torch or all NumPy).

        Returns:
            New Moments; whatever is merged in whatever order, the result is that of one pass over all values, to
            rounding.

        Raises:
            ShapeError: the shapes differ.
            DtypeError: one is of torch and one of NumPy.
        """
        parts = (self, *others)
        for part in others:
            if isinstance(part.mean, _NUMPY) != isinstance(self.mean, _NUMPY):
                raise DtypeError(
                    f"Moments of {type(self.mean).__name__} and {type(part.mean).__name__} cannot be merged: "
                    "convert one of them."
                )
            if tuple(part.mean.shape) != tuple(self.mean.shape):
                raise ShapeError(
                    f"Moments of shape {tuple(self.mean.shape)} and {tuple(part.mean.shape)} cannot be merged: "
                    "merge statistics of the same channels."
                )
        if len(parts) == 1 and isinstance(self.count, int) and self.count:
            return Moments(_wide(self.mean), _wide(self.var), self.count)
        counts = _counts([part.count for part in parts], self.mean)
        mean, var = _merged(_stacked([m.mean for m in parts]), _stacked([m.var for m in parts]), counts)
        return Moments(mean, var, sum(part.count for part in parts))

    def merge_along(self, axis: int = 0) -> Moments:
        """Moments of the parts that lie along `axis`, merged: (R, C) of R ranks or ghosts become (C,), as in `merge`.

        Example:
            >>> import numpy as np
            >>> parts = Moments(np.array([[1.0], [20.0]]), np.array([[1.0], [0.0]]), np.array([[2], [1]]))
            >>> whole = parts.merge_along(0)
            >>> whole.mean.tolist(), whole.count.tolist()
            ([7.333333333333333], [3])
        """
        number = self.mean.shape[axis]
        count = self.count * number if isinstance(self.count, int) else _like(self.count, self.mean).sum(axis)
        parts = (_moved(_wide(a), axis) for a in (self.mean, self.var, _filled(self.count, self.mean)))
        return Moments(*_merged(*parts), count)

    @property
    def unbiased_var(self) -> Array:
        """Variance with Bessel's correction, var * count / (count - 1); shape of `var`.

        Raises:
            ShapeError: count is an int below 2. Where count is a tensor, such channels hold NaN.
        """
        if isinstance(self.count, int) and self.count < 2:
            raise ShapeError(
                f"the unbiased variance needs at least 2 values a channel, got {self.count}: "
                "use var, or merge in more values first."
            )
        if isinstance(self.count, int):
            return self.var * (self.count / (self.count - 1))
        n = _real(self.count)
        var = self.var * (n / _at_least_one(n - 1))
        return np.where(n > 1, var, np.nan) if isinstance(n, np.ndarray) else var.masked_fill(n < 2, float("nan"))


def _normalised_axes(axes: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    given = tuple(range(ndim)) if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)
    for axis in given:
        if not -ndim <= axis < ndim:
            raise ShapeError(f"axis {axis} is out of range for an array of rank {ndim}.")
    if not given and ndim:
        raise ArgumentError("axes must name at least one axis to reduce; None reduces all of them.")
    found = tuple(sorted({axis % ndim for axis in given}))
    if len(found) != len(given):
        raise ArgumentError(f"axes {given} name an axis twice.")
    return found


def _check_mask(mask: Array, shape: tuple[int, ...]) -> None:
    if str(mask.dtype).removeprefix("torch.") != "bool":
        raise DtypeError(f"mask must be bool (True = counts), got {mask.dtype}: pass mask != 0.")
    try:
        fits = np.broadcast_shapes(tuple(mask.shape), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(f"mask of shape {tuple(mask.shape)} does not broadcast to the values' shape {shape}.")


def _of_numpy(x: npt.NDArray[Any], axes: tuple[int, ...], mask: npt.NDArray[np.bool_] | None) -> Moments:
    if x.dtype.kind not in "fiu":
        raise DtypeError(f"Moments need real numbers, got an array of {x.dtype}.")
    wide = x.astype(np.float64)
    if mask is None:
        count: Any = int(np.prod([x.shape[a] for a in axes], dtype=np.int64))
        keep: Any = True
    else:
        keep = np.broadcast_to(mask, x.shape)
        count = keep.sum(axis=axes)
    divisor = np.maximum(count, 1)
    mean = np.sum(wide, axis=axes, where=keep) / divisor
    centred = np.where(keep, wide - np.expand_dims(mean, axes), 0.0)
    # The first mean is rounded; what its rounding leaves over belongs to the mean and not to the variance.
    rest = centred.sum(axis=axes) / divisor
    centred = np.where(keep, centred - np.expand_dims(rest, axes), 0.0)
    return Moments(mean + rest, (centred**2).sum(axis=axes) / divisor, count)


def _of_torch(x: torch.Tensor, axes: tuple[int, ...], mask: torch.Tensor | None) -> Moments:
    import torch

    if not x.is_floating_point():
        raise DtypeError(f"Moments need a float tensor, got {x.dtype}: pass x.float().")
    values = x if x.dtype == torch.float64 else x.float()
    if mask is None:
        count: Any = 1
        for axis in axes:
            count = count * x.shape[axis]
        if isinstance(count, int) and count == 0:
            # Zeros, as a sum over nothing: so an empty rank stays in autograd's graph and joins the others' backward.
            zero = _wide(values.sum(axes))
            return Moments(zero, zero.clone(), 0)
        # Shifted by a rough mean first, subtraction is exact to the rounding of the difference. The shift is a constant
        # to autograd: the moments do not depend on it. (torch.var_mean takes 10 to 40 times as long on a CPU.)
        shift = values.detach().mean(axes, keepdim=True)
        centred = values - shift
        rest = centred.mean(axes)
        var = (centred - _expand(rest, axes)).square().mean(axes)
    else:
        keep = mask.expand(x.shape)
        count = keep.sum(axes)
        divisor = count.clamp(min=1).to(values.dtype)
        kept_values = values.masked_fill(~keep, 0)
        shift = kept_values.detach().sum(axes, keepdim=True) / _expand(divisor, axes)
        centred = (kept_values - shift).masked_fill(~keep, 0)
        rest = centred.sum(axes) / divisor
        var = (centred - _expand(rest, axes)).masked_fill(~keep, 0).square().sum(axes) / divisor
    # shift + rest in float64 keeps what float32 would round off a large mean: the kernels take it apart again.
    return Moments(_wide(shift.reshape(rest.shape)) + _wide(rest), _wide(var), count)


def _expand(values: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    for axis in axes:
        values = values.unsqueeze(axis)
    return values


def _wide(values: Any) -> Any:
    """The values in float64, or in float32 on a device that has no float64 (Apple's MPS)."""
    if isinstance(values, _NUMPY):
        return np.asarray(values, dtype=np.float64)
    return values.float() if values.device.type == "mps" else values.double()


def _merged(mean: Any, var: Any, count: Any) -> tuple[Any, Any]:
    """The law of total variance over the first axis; all three of one shape, float64."""
    # An empty whole divides by 1 instead of 0: mean 0, var 0, count 0 stay neutral.
    share = count / _at_least_one(count.sum(0))
    whole = (share * mean).sum(0)
    return whole, (share * (var + (mean - whole) ** 2)).sum(0)


def _counts(counts: list[Any], mean: Any) -> Any:
    """The counts of parts as numbers to divide, the parts along the first axis, broadcastable to their means."""
    if len(counts) > _FEW and not isinstance(mean, _NUMPY) and all(type(count) is int for count in counts):
        import torch

        return torch.tensor(counts, dtype=_wide(mean).dtype, device=mean.device).reshape(-1, *[1] * mean.ndim)
    return _stacked([_filled(count, mean) for count in counts])


def _filled(count: Any, mean: Any) -> Any:
    """The count as numbers to divide, in the shape of `mean`."""
    if isinstance(count, int):
        return (
            np.full(mean.shape, float(count)) if isinstance(mean, _NUMPY) else _wide(mean.new_ones(mean.shape)) * count
        )
    return _wide(_like(count, mean))


def _like(count: Any, mean: Any) -> Any:
    return np.broadcast_to(count, mean.shape) if isinstance(count, _NUMPY) else count.expand(mean.shape)


def _stacked(parts: list[Any]) -> Any:
    if isinstance(parts[0], _NUMPY):
        return np.stack([_wide(part) for part in parts])
    import torch

    return torch.stack([_wide(part) for part in parts])


def _moved(values: Any, axis: int) -> Any:
    return np.moveaxis(values, axis, 0) if isinstance(values, np.ndarray) else values.movedim(axis, 0)


def _real(count: Any) -> Any:
    """A count as a number to divide: a tensor of integers would divide in float32."""
    return count if isinstance(count, int) else _wide(count)


def _at_least_one(count: Any) -> Any:
    if isinstance(count, _NUMPY):
        return np.maximum(count, 1)
    return count.clamp(min=1) if hasattr(count, "clamp") else max(count, 1)
