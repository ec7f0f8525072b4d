"""The one view that kernels see: activations of any rank and channel axis as (N, C, L), copied if it must be."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from batchnorm.errors import ArgumentError, ShapeError
from batchnorm.stats.moments import Moments


class View(NamedTuple):
    """How activations of one shape become (N, C, L) and back.

    N is the first axis that is no channel axis, L the others together.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    """The channel axes, ascending, none negative."""

    @classmethod
    def of(cls, x: torch.Tensor, channel_axis: int | tuple[int, ...]) -> View:
        """The view of `x` with its channels on `channel_axis`.

        Raises:
            ShapeError: x has no such axis.
            ArgumentError: an axis is named twice, or none is named.
        """
        given = (channel_axis,) if isinstance(channel_axis, int) else tuple(channel_axis)
        for axis in given:
            if not -x.ndim <= axis < x.ndim:
                raise ShapeError(f"channel axis {axis} is out of range for an input of shape {tuple(x.shape)}.")
        axes = tuple(sorted({axis % x.ndim for axis in given}))
        if len(axes) != len(given) or not axes:
            raise ArgumentError(f"channel_axis must name at least one axis and none twice, got {channel_axis}.")
        return cls(tuple(x.shape), axes)

    @property
    def channels(self) -> tuple[int, ...]:
        """Sizes of the channel axes: the shape of weight, bias and moments."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.axes)

    @property
    def _order(self) -> tuple[int, ...]:
        return self._others[:1] + self.axes + self._others[1:]

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, of this view's shape, as (N, C, L)."""
        n, length = self._n_and_length()
        if self.axes == (1,):
            return x if x.ndim == 3 else x.reshape(n, self.shape[1], length)
        return x.permute(self._order).reshape(n, math.prod(self.channels), length)

    def fold_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """`mask`, broadcastable to the shape without channel axes, as (N, 1, L).

        Raises:
            ShapeError: it does not broadcast.
        """
        others = tuple(self.shape[axis] for axis in self._others)
        try:
            whole = mask.expand(others)
        except RuntimeError:
            raise ShapeError(
                f"mask of shape {tuple(mask.shape)} does not fit an input of shape {self.shape}: "
                f"it must have the input's shape without its channel axis, {others}, or broadcast to it."
            ) from None
        n, length = self._n_and_length()
        return whole.reshape(n, 1, length)

    def unfold(self, y: torch.Tensor) -> torch.Tensor:
        """(N, C, L) back to this view's shape."""
        if self.axes == (1,):
            return y if len(self.shape) == 3 else y.reshape(self.shape)
        order = self._order
        inverse = [order.index(axis) for axis in range(len(order))]
        return y.reshape([self.shape[axis] for axis in order]).permute(inverse)

    def _n_and_length(self) -> tuple[int, int]:
        others = self._others
        n = self.shape[others[0]] if others else 1
        return n, math.prod([self.shape[axis] for axis in others[1:]])


def flat(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """weight or bias, shape of the channel axes, as (C,)."""
    return parameter if parameter is None or parameter.ndim == 1 else parameter.reshape(-1)


def reshaped(statistics: Any, shape: tuple[int, ...]) -> Any:
    """Moments or Running in the shape of the channel axes, or (-1,): (C,)."""
    if len(shape) == statistics.mean.ndim:
        return statistics
    parts = {"mean": statistics.mean.reshape(shape), "var": statistics.var.reshape(shape)}
    if isinstance(statistics, Moments):
        count: Any = statistics.count
        return Moments(**parts, count=count.reshape(shape) if isinstance(count, torch.Tensor) and count.ndim else count)
    return type(statistics)(**parts)


def in_memory_format(y: torch.Tensor, view: View) -> torch.Tensor:
    """`y` as torch's own layers return it, contiguous or channels-last, so that y.view(...) goes on working.

    Kernels keep the strides of x, which may be a transpose's. With channels on another axis there is no such custom.
    """
    if view.axes != (1,) or y.is_contiguous() or torch._C._are_functorch_transforms_active():
        return y
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.ndim)
    return y if last is not None and y.is_contiguous(memory_format=last) else y.contiguous()
