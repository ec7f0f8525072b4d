"""Axes, shapes and masks, before any number is computed."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

from batchnorm.errors import ArgumentError, ShapeError
from batchnorm.keras.framework import keras

Axis: TypeAlias = "int | tuple[int, ...]"


def as_axis(axis: int | Sequence[int]) -> Axis:
    """The `axis` argument as an int or a tuple of them; a list comes from JSON, and one axis in a list is that axis.

    Raises:
        ArgumentError: it is neither, or names no axis.
    """
    try:
        axes = tuple(operator.index(one) for one in axis) if isinstance(axis, Sequence) else (operator.index(axis),)
    except TypeError:
        axes = ()
    if not axes or isinstance(axis, str):
        raise ArgumentError(f"axis must be an int or a tuple of ints, got {axis!r}.")
    return axes if len(axes) > 1 else axes[0]


def channel_axes(axis: Axis, shape: Sequence[int | None]) -> tuple[int, ...]:
    """The channel axes of an input of that shape: ascending, none negative.

    Raises:
        ShapeError: the input has no such axis.
        ArgumentError: one axis is named twice.
    """
    given = axis if isinstance(axis, tuple) else (axis,)
    for one in given:
        if not -len(shape) <= one < len(shape):
            raise ShapeError(f"axis {one} is out of bounds for an input of shape {tuple(shape)} (axis={axis}).")
    axes = tuple(sorted({one % len(shape) for one in given}))
    if len(axes) != len(given):
        raise ArgumentError(f"axis={axis} names one axis twice, for an input of shape {tuple(shape)}.")
    return axes


def other_axes(rank: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that statistics are taken over."""
    return tuple(one for one in range(rank) if one not in axes)


def number_of_values(x: Any, axes: tuple[int, ...], *, is_whole: bool = True) -> Any:
    """How many values a channel has: an int, or a scalar tensor where the backend traces an unknown size.

    Raises:
        ShapeError: it is one, which has no variance, and the batch is the whole one: no other process has a part of it.
    """
    shape = keras.ops.shape(x)
    sizes = [shape[one] for one in other_axes(len(shape), axes)]
    if not all(isinstance(size, int) for size in sizes):
        return keras.ops.prod(keras.ops.stack(sizes))
    if is_whole and math.prod(sizes) == 1:
        raise ShapeError(
            f"Expected more than 1 value per channel when training, got 1 in an input of shape {tuple(shape)}: the "
            "variance of one value is 0. Choose batch_size so that no single example remains at the end of an epoch "
            "(or drop it: drop_remainder=True in tf.data, drop_last=True in a DataLoader), or set layer.trainable = "
            "False to normalise with the moving statistics."
        )
    return math.prod(sizes)


def mask_for(mask: Any, x: Any, axes: tuple[int, ...]) -> Any:
    """`mask` as bool, with one axis for each axis of x that is no channel axis.

    Args:
        mask: anything that can be cast to bool; its axes are the first of those of x without channel axes, as Keras'
            masks are (batch, time); each of the size of x or 1. The missing ones are added, of size 1.
        x: the input.
        axes: its channel axes.

    Raises:
        ShapeError: it does not fit.
    """
    mask = keras.ops.cast(keras.ops.convert_to_tensor(mask), "bool")
    expected = tuple(x.shape[one] for one in other_axes(len(x.shape), axes))
    got = tuple(mask.shape)
    fits = all(size == 1 or full is None or size is None or size == full for size, full in zip(got, expected))  # noqa: B905
    if len(got) > len(expected) or not got or not fits:
        raise ShapeError(
            f"mask of shape {got} does not fit an input of shape {tuple(x.shape)} with channels on axis {axes}: it "
            f"must have the input's shape without its channel axis, {expected}, or the first axes of that; size 1 "
            "broadcasts."
        )
    return keras.ops.reshape(mask, (*keras.ops.shape(mask), *(1 for _ in expected[len(got) :])))
