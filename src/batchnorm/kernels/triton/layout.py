"""How the work is cut, from shape, strides and dtype alone: the same cut, and so the same bits, in every run.

Activations (N, C, L) are seen as a matrix whose columns know their channels, or as planes, one channel a group:

    columns  channels-last and (M, C): rows are N * L, columns C; as many rows are one (`fold`) as fill a tile.
             Small planes (NCHW of 7x7 and 14x14): rows are N, columns C * L, each channel L of them (`length`).
    planes   everything else, any strides: for each channel rows are N, columns L.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

Strides = tuple[int, int, int]
"""Of a row, of a group (a channel's plane; 0 in columns), of a column; in elements."""

_THREADS = 128
_VECTOR = 16
"""Bytes of the widest load."""
_PROGRAMS = 660
"""Programs for which reductions are split: five on each of 132 multiprocessors, as many as the registers allow. No
property of the device is asked for: results would depend on it."""
_ACROSS = 64
"""Columns of a tile of many rows: with 64, and not with 128 or 256, Triton lets values stay in the registers into which
they were loaded; with more they take a turn through shared memory, to where a channel's coefficients are."""
_SMALL_PLANE = 1024
"""Positions below which a plane is no group of its own: its rows would start off the boundaries of wide loads."""
_TALL = 128
"""Bytes of a column of small planes at least: its partial results take 16 a split."""


class Layout(NamedTuple):
    """How a tensor is seen; see the module."""

    is_planar: bool
    rows: int
    columns: int
    channels: int
    length: int
    """Columns in a row that belong to one channel; 1 in planes."""
    fold: int
    """Rows of the tensor that make a row here."""
    is_turned: bool
    """Planes of one column (L = 1): N is taken for L."""
    itemsize: int

    @property
    def groups(self) -> int:
        """Groups of which each program takes one: channels, or tiles side by side."""
        return self.channels if self.is_planar else -(-self.columns // self._widest)

    @property
    def width(self) -> int:
        """Partial results of a split."""
        return self.channels if self.is_planar else self.columns

    @property
    def inner(self) -> int:
        """Partial results of a channel in a split."""
        return self.width // self.channels

    @property
    def packs(self) -> bool:
        """Whether eight neighbours make a byte."""
        return self.columns % 8 == 0

    def tiling(self, vectors: int) -> Tiling:
        """The tiles in which each thread has so many vectors of 16 bytes."""
        return _tiling(self, vectors)

    @property
    def _widest(self) -> int:
        return max(8, min(_power_above(self.columns), _ACROSS))


class Tiling(NamedTuple):
    """The tiles of a group."""

    height: int
    width: int
    across: int
    """Tiles side by side."""
    number: int
    full: int
    """How many of them, the first ones, need no look at where the tensor ends."""
    is_even: bool
    """Whether tiles end where the columns end."""

    def splits(self, layout: Layout, blocks: int) -> int:
        """Programs that share a group's blocks of tiles."""
        return max(1, min(-(-_PROGRAMS // layout.groups), blocks))


@lru_cache(maxsize=4096)
def _tiling(layout: Layout, vectors: int) -> Tiling:
    rows, columns = layout.rows, layout.columns
    values = vectors * _THREADS * _VECTOR // layout.itemsize
    width = layout._widest
    if layout.is_planar:  # planes come in all sizes: the tile that leaves least idle, then one that needs no bounds

        def cost(width: int) -> tuple[float, bool, int]:
            height = max(values // width, 1)
            covered = -(-rows // height) * height * (-(-columns // width) * width)
            return round(covered / (rows * columns), 1), columns % width != 0, -width

        width = min((64 << i for i in range(7) if 64 << i <= values), key=cost)
    height = max(values // width, 1)
    across = -(-columns // width) if layout.is_planar else 1
    is_even = columns % width == 0
    return Tiling(
        height, width, across, -(-rows // height) * across, rows // height * across if is_even else 0, is_even
    )


def layout_of(x: torch.Tensor, *, is_masked: bool) -> Layout:
    """How (N, C, L) x is seen; not empty."""
    return _layout(tuple(x.shape), x.stride(), x.itemsize, is_masked)


@lru_cache(maxsize=4096)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, is_masked: bool) -> Layout:
    n, channels, length = shape
    row_stride = _row_stride(shape, strides)
    if channels > 1 and row_stride is not None:
        # So many rows that their columns fill tiles, and begin on the boundaries of wide loads.
        is_foldable = row_stride == channels and not is_masked
        fold = math.gcd(_ACROSS // math.gcd(channels, _ACROSS), n * length) if is_foldable else 1
        return Layout(False, n * length // fold, fold * channels, channels, 1, fold, False, itemsize)
    is_dense = strides[2] == 1 and strides[1] == length
    if is_dense and not is_masked and channels > 1 and length < _SMALL_PLANE and n * itemsize >= _TALL:
        return Layout(False, n, channels * length, channels, length, 1, False, itemsize)
    if length == 1:
        return Layout(True, 1, n, channels, 1, 1, True, itemsize)
    return Layout(True, n, length, channels, 1, 1, False, itemsize)


def strides_in(layout: Layout, x: torch.Tensor) -> Strides | None:
    """The strides of (N, C, L) x where it is seen so; None where it lies otherwise."""
    if layout.is_planar:
        row, group, column = x.stride()
        return (0, group, row) if layout.is_turned else (row, group, column)
    if layout.length > 1:
        return (x.stride(0), 0, 1) if x.stride(2) == 1 and x.stride(1) == layout.length else None
    row_stride = _row_stride(tuple(x.shape), x.stride())
    if row_stride is None or (layout.fold > 1 and row_stride != layout.channels):
        return None
    return row_stride * layout.fold, 0, 1


def mask_strides(layout: Layout, mask: torch.Tensor) -> tuple[int, int]:
    """The strides of a contiguous mask (N, 1, L) by row and column."""
    if not layout.is_planar:
        return 1, 0
    return (0, 1) if layout.is_turned else (mask.shape[2], 1)


def _row_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The distance of one (n, l) from the next where channels are neighbours; None where it is not one number."""
    n, _, length = shape
    if strides[1] != 1:
        return None
    if length == 1:
        return strides[0]
    return strides[2] if n == 1 or strides[0] == length * strides[2] else None


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()
