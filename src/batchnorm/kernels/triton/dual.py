"""`contract.DualBackend` on a GPU: the two branches that meet in a residual block, each read once a pass."""

from __future__ import annotations

from typing import Any

import torch
import triton

from batchnorm.kernels.contract import ACTIVATION_CODES, BackwardSums, Branch, BranchGradients
from batchnorm.kernels.triton.dual_kernels import (
    applied_both,
    coefficients_of_both,
    differentiated_both,
    merged_sums_of_both,
    partial_sums_of_both,
)
from batchnorm.kernels.triton.launch import (
    laid,
    limits,
    merging,
    on_device_of,
    parameters,
    strides_of,
    sums_dtype,
    wide_of,
)
from batchnorm.kernels.triton.layout import Layout, Tiling, layout_of

_UNROLLED = 2
"""Tiles of dy and of each branch that a program of `partial_sums_of_both` has under way."""


def apply_both(first: Branch, second: Branch) -> torch.Tensor:
    """See `contract.DualBackend.apply_both`."""
    a = first.x
    y = torch.empty_like(a)
    if a.numel() == 0:
        return y
    layout, b = layout_of(a, is_masked=False), laid(second.x, a)
    tiling = layout.tiling(4)
    programs = layout.groups * tiling.number
    with on_device_of(a):
        coefficients = _coefficients(first, second, layout)
        applied_both[(programs,)](
            a, b, y, coefficients, layout.groups, tiling.across, layout.rows, layout.columns, a.shape[1],
            tiling.number, *coefficients.stride(),
            *strides_of(layout, a), *strides_of(layout, b), *strides_of(layout, y),
            **_constants(first, layout, tiling, programs),
        )  # fmt: skip
    return y


def backward_both(
    dy: torch.Tensor, first: Branch, second: Branch, *, is_estimated: tuple[bool, bool], wants_sums: bool
) -> tuple[BranchGradients, BranchGradients]:
    """See `contract.DualBackend.backward_both`; the sums have the dtypes that `backend.backward` gives."""
    a = first.x
    da, db = torch.empty_like(a), torch.empty_like(a)
    a_sums, b_sums = (_new_sums(one) if wants_sums else None for one in (first, second))
    if a.numel() > 0:
        layout = layout_of(a, is_masked=False)
        second, dy = second._replace(x=laid(second.x, a)), laid(dy, a)
        with on_device_of(a):
            coefficients = _coefficients(first, second, layout)
            if a_sums is not None and b_sums is not None:
                _reduce(dy, first, second, layout, coefficients, (*a_sums, *b_sums))
            _differentiate(dy, first, second, layout, coefficients, (da, db), is_estimated)
    return BranchGradients(da, a_sums), BranchGradients(db, b_sums)


def _reduce(
    dy: torch.Tensor,
    first: Branch,
    second: Branch,
    layout: Layout,
    coefficients: torch.Tensor,
    sums: tuple[torch.Tensor, ...],
) -> None:
    """Writes the sums, and those rows of the coefficients that hang on them."""
    a, b = first.x, second.x
    channels = a.shape[1]
    tiling = layout.tiling(1)
    blocks = triton.cdiv(tiling.number, _UNROLLED)
    splits = tiling.splits(layout, blocks)
    stride = splits * layout.width
    parts = a.new_empty(3, stride, dtype=torch.float64)
    partial_sums_of_both[(layout.groups * splits,)](
        dy, a, b, coefficients, parts, layout.groups, tiling.across, layout.rows, layout.columns, channels, blocks,
        splits, stride, *coefficients.stride(),
        *strides_of(layout, dy), *strides_of(layout, a), *strides_of(layout, b),
        UNROLLED=_UNROLLED, **_constants(first, layout, tiling, layout.groups * splits),
    )  # fmt: skip
    lanes, together = merging(layout)
    merged_sums_of_both[(triton.cdiv(channels, together),)](
        parts, *parameters(*first[1:])[:3], *parameters(*second[1:])[:3], *sums, coefficients, a.numel() // channels,
        channels, splits * layout.inner, layout.inner, layout.width, stride, *coefficients.stride(),
        A_EPS=first.affine.eps, B_EPS=second.affine.eps, WIDE=wide_of(a), LENGTH=layout.length, BC=together, BQ=lanes,
        num_warps=4,
    )  # fmt: skip


def _differentiate(
    dy: torch.Tensor,
    first: Branch,
    second: Branch,
    layout: Layout,
    coefficients: torch.Tensor,
    gradients: tuple[torch.Tensor, torch.Tensor],
    is_estimated: tuple[bool, bool],
) -> None:
    """Writes the gradients of both x."""
    a, b = first.x, second.x
    tiling = layout.tiling(2)
    programs = layout.groups * tiling.number
    differentiated_both[(programs,)](
        dy, a, b, *gradients, coefficients, layout.groups, tiling.across, layout.rows, layout.columns, a.shape[1],
        tiling.number, *coefficients.stride(),
        *(stride for one in (dy, a, b, *gradients) for stride in strides_of(layout, one)),
        A_ESTIMATED=is_estimated[0], B_ESTIMATED=is_estimated[1], **_constants(first, layout, tiling, programs),
    )  # fmt: skip


def _coefficients(first: Branch, second: Branch, layout: Layout) -> torch.Tensor:
    """See `dual_kernels`: its rows, (9, C) or more, of which the first five are written.

    Those of a channel lie together where a tile's columns have channels of their own each: many addresses, each with
    a register pair, otherwise.
    """
    x = first.x
    channels, dtype = x.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32
    made = x.new_empty(channels, 16, dtype=dtype).t() if layout.length > 1 else x.new_empty(9, channels, dtype=dtype)
    coefficients_of_both[(triton.cdiv(channels, 128),)](
        *parameters(*first[1:]), *parameters(*second[1:]), made, channels, *made.stride(),
        A_EPS=first.affine.eps, B_EPS=second.affine.eps, WIDE=wide_of(x), BC=128, num_warps=4,
    )  # fmt: skip
    return made


def _new_sums(branch: Branch) -> BackwardSums:
    x, dtype = branch.x, sums_dtype(branch.affine.weight)
    new = x.new_empty if x.numel() > 0 else x.new_zeros
    return BackwardSums(new(x.shape[1], dtype=dtype), new(x.shape[1], dtype=dtype))


def _constants(first: Branch, layout: Layout, tiling: Tiling, programs: int) -> dict[str, Any]:
    """What a kernel that reads tiles is compiled for."""
    activation = first.affine.activation
    return {
        "ACTIVATION": ACTIVATION_CODES[activation], "WIDE": wide_of(first.x), "PLANAR": layout.is_planar,
        "EVEN": tiling.is_even, "LENGTH": layout.length, "BR": tiling.height, "BK": tiling.width, "num_warps": 4,
        # Activations of exponentials take registers of their own.
        **limits(programs, first.x, 96 if activation in (None, "relu", "leaky_relu") else 128),
    }  # fmt: skip
