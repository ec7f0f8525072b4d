"""The contract's functions on a GPU: outputs are allocated and kernels launched here, and nothing is read back.

No function waits for the device, so that CUDA graphs can capture every one. Importing the module imports Triton. Under
TRITON_INTERPRET=1, set before that, the kernels run on tensors of the CPU, slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton

from batchnorm.kernels.contract import ACTIVATION_CODES, Affine, BackwardSums, Gradients, Statistics
from batchnorm.kernels.triton.apply_kernels import applied
from batchnorm.kernels.triton.backward_kernels import differentiated, merged_sums, partial_sums
from batchnorm.kernels.triton.dual import apply_both as apply_both
from batchnorm.kernels.triton.dual import backward_both as backward_both
from batchnorm.kernels.triton.launch import (
    WIDE,
    laid,
    limits,
    merging,
    on_device_of,
    parameters,
    strides_of,
    sums_dtype,
    wide_of,
)
from batchnorm.kernels.triton.layout import layout_of, mask_strides
from batchnorm.kernels.triton.running_kernel import updated
from batchnorm.kernels.triton.stats_kernels import merged_moments, partial_moments
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running

folds = False
packs = True
pairs = True

IS_INTERPRETED = not isinstance(applied, triton.JITFunction)

_BLOCK = 4
"""Tiles that `partial_moments` takes at once, as it is written."""
_UNROLLED = 4
"""Tiles of x and of dy that a program of `partial_sums` has under way."""


def forward(
    x: torch.Tensor, affine: Affine, residual: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, Moments]:
    """See `contract.Backend.forward`."""
    moments = stats(x, mask)
    return apply(x, moments, affine, residual), moments


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    affine: Affine,
    residual: torch.Tensor | None = None,
    *,
    is_estimated: bool,
    mask: torch.Tensor | None = None,
) -> Gradients:
    """See `contract.Backend.backward`; the sums have the dtype of the weight where that is float32 or float64."""
    dy = laid(dy, x)
    sums = _reduce(dy, x, statistics, affine, residual, sums_dtype(affine.weight))
    dx, dresidual = backward_apply(dy, x, statistics, affine, residual, sums=sums if is_estimated else None, mask=mask)
    return Gradients(dx, dresidual, sums)


def stats(x: torch.Tensor, mask: torch.Tensor | None = None) -> Moments:
    """See `contract.Backend.stats`."""
    n, channels, length = x.shape
    mean, var = (x.new_empty(channels, dtype=torch.float64) for _ in range(2))
    count = None if mask is None else x.new_empty(channels, dtype=torch.int64)
    if x.numel() == 0:
        return Moments(mean.zero_(), var.zero_(), n * length if count is None else count.zero_())
    layout = layout_of(x, is_masked=mask is not None)
    strides = strides_of(layout, x)
    tiling = layout.tiling(1)
    mask = None if mask is None else mask.contiguous()
    blocks = triton.cdiv(tiling.number, _BLOCK)
    splits = tiling.splits(layout, blocks)
    parts = x.new_empty(2, splits, layout.width, dtype=torch.float64)
    counts = x.new_empty(splits, dtype=torch.float64)
    with on_device_of(x):
        partial_moments[(layout.groups * splits,)](
            x, mask, parts[0], parts[1], counts, layout.groups, tiling.across, layout.rows, layout.columns,
            tiling.full // _BLOCK if mask is None else 0, blocks, splits, *strides,
            *((0, 0) if mask is None else mask_strides(layout, mask)),
            HAS_MASK=mask is not None, WIDE=wide_of(x), PLANAR=layout.is_planar, BR=tiling.height, BK=tiling.width,
            num_warps=4, **limits(layout.groups * splits, x),
        )  # fmt: skip
        lanes, together = merging(layout)
        merged_moments[(triton.cdiv(channels, together),)](
            parts[0], parts[1], counts, mean, var, count, channels, splits * layout.inner, layout.inner, layout.width,
            LENGTH=layout.length, BC=together, BQ=lanes, num_warps=4,
        )  # fmt: skip
    return Moments(mean, var, n * length if count is None else count)


def apply(
    x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """See `contract.Backend.apply`."""
    return _apply(x, statistics, affine, residual, None)


def apply_packing(
    x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """See `contract.PackingBackend.apply_packing`; None without ReLU, and where a row's neighbours make no bytes."""
    layout = None if x.numel() == 0 else layout_of(x, is_masked=False)
    if affine.activation != "relu" or layout is None or not layout.packs:
        return None
    signs = x.new_empty(x.numel() // 8, dtype=torch.uint8)
    return _apply(x, statistics, affine, residual, signs), signs


def unpacked(signs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """See `contract.PackingBackend.unpacked`."""
    layout = layout_of(x, is_masked=False)
    bits = (signs[:, None] >> torch.arange(8, dtype=torch.uint8, device=signs.device)) & 1
    n, channels, length = x.shape
    if layout.is_turned:
        return bits.view(channels, n).t()[:, :, None].bool()
    if layout.is_planar or layout.length > 1:
        return bits.view(n, channels, length).bool()
    return bits.view(n, length, channels).transpose(1, 2).bool()


def _apply(
    x: torch.Tensor,
    statistics: Statistics,
    affine: Affine,
    residual: torch.Tensor | None,
    signs: torch.Tensor | None,
) -> torch.Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    layout = layout_of(x, is_masked=False)
    residual = None if residual is None else laid(residual, x)
    tiling = layout.tiling(4)
    with on_device_of(x):
        applied[(layout.groups * tiling.number,)](
            x, residual, y, signs, *parameters(statistics, affine), layout.groups, tiling.across, layout.rows,
            layout.columns, x.shape[1], tiling.number, *strides_of(layout, x), *strides_of(layout, residual),
            *strides_of(layout, y),
            EPS=affine.eps, ACTIVATION=ACTIVATION_CODES[affine.activation], WIDE=wide_of(x), PLANAR=layout.is_planar,
            EVEN=tiling.is_even, LENGTH=layout.length, BR=tiling.height, BK=tiling.width, num_warps=4,
        )  # fmt: skip
    return y


def backward_reduce(
    dy: torch.Tensor, x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor | None = None
) -> BackwardSums:
    """See `contract.Backend.backward_reduce`; the sums are float64."""
    return _reduce(laid(dy, x), x, statistics, affine, residual, torch.float64)


def _reduce(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    affine: Affine,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> BackwardSums:
    channels = x.shape[1]
    sums = BackwardSums(x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype))
    if x.numel() == 0:
        return BackwardSums(sums.dz.zero_(), sums.dz_xhat.zero_())
    layout = layout_of(x, is_masked=False)
    residual, signs = _kept(residual, affine, x)
    tiling = layout.tiling(1)
    blocks = triton.cdiv(tiling.number, _UNROLLED)
    splits = tiling.splits(layout, blocks)
    parts = x.new_empty(2, splits, layout.width, dtype=torch.float64)
    values = parameters(statistics, affine)
    stride = splits * layout.width
    with on_device_of(x):
        partial_sums[(layout.groups * splits,)](
            dy, x, residual, signs, *values, parts, layout.groups, tiling.across, layout.rows, layout.columns,
            channels, blocks, splits, stride,
            *strides_of(layout, dy), *strides_of(layout, x), *strides_of(layout, residual),
            EPS=affine.eps, ACTIVATION=ACTIVATION_CODES[affine.activation], WIDE=wide_of(x), PLANAR=layout.is_planar,
            EVEN=tiling.is_even, LENGTH=layout.length, BR=tiling.height, BK=tiling.width, UNROLLED=_UNROLLED,
            num_warps=4,
        )  # fmt: skip
        lanes, together = merging(layout)
        merged_sums[(triton.cdiv(channels, together),)](
            parts, *values[:2], *sums, channels, splits * layout.inner, layout.inner, layout.width, stride,
            EPS=affine.eps, WIDE=wide_of(x), LENGTH=layout.length, BC=together, BQ=lanes, num_warps=4,
        )  # fmt: skip
    return sums


def backward_apply(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    affine: Affine,
    residual: torch.Tensor | None = None,
    *,
    sums: BackwardSums | None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `contract.Backend.backward_apply`."""
    dx = torch.empty_like(x)
    # Without an activation dresidual is dy.
    dresidual = None if residual is None or affine.activation is None else torch.empty_like(x)
    given = dy
    if x.numel() > 0:
        layout = layout_of(x, is_masked=mask is not None)
        dy = laid(dy, x)
        residual_values, signs = _kept(residual, affine, x)
        mask = None if mask is None or sums is None else mask.contiguous()
        tiling = layout.tiling(2)
        count: Any = statistics.count if isinstance(statistics, Moments) else 0
        is_tensor = isinstance(count, torch.Tensor)
        with on_device_of(x):
            differentiated[(layout.groups * tiling.number,)](
                dy, x, residual_values, signs, mask, dx, dresidual, *parameters(statistics, affine),
                *((None, None) if sums is None else sums),
                count.expand(x.shape[1]).contiguous() if is_tensor else None, 0 if is_tensor else count,
                layout.groups, tiling.across, layout.rows, layout.columns, x.shape[1], tiling.number,
                *strides_of(layout, dy), *strides_of(layout, x), *strides_of(layout, residual_values),
                *strides_of(layout, dx), *strides_of(layout, dresidual),
                *((0, 0) if mask is None else mask_strides(layout, mask)),
                EPS=affine.eps, ACTIVATION=ACTIVATION_CODES[affine.activation], WIDE=wide_of(x),
                PLANAR=layout.is_planar, EVEN=tiling.is_even, LENGTH=layout.length, BR=tiling.height, BK=tiling.width,
                num_warps=4,
            )  # fmt: skip
    return dx, given if dresidual is None and residual is not None else dresidual


def update_running(
    running: Running, tracked: torch.Tensor | None, batch: Moments, momentum: float | None
) -> bool | None:
    """Takes a batch into running statistics in place, in one launch; arguments as of `kernels.cpu.update_running`.

    Returns:
        True, or None, and nothing changed, where this is not the way. Whether the batch was finite is not read.
    """
    mean, var = running
    count: Any = batch.count
    is_tensor = isinstance(count, torch.Tensor)
    if (mean.ndim != 1 or mean.dtype not in WIDE or (momentum is None and tracked is None)) or (
        not is_tensor and count < 2
    ):
        return None
    state = (mean, var) if tracked is None else (mean, var, tracked)
    read = (batch.mean, batch.var, count) if is_tensor else (batch.mean, batch.var)
    if any(type(t) not in _PLAIN or t.device != mean.device or not t.is_contiguous() for t in (*state, *read[:2])):
        return None
    channels = mean.shape[0]
    weight = 0.0 if momentum is None else momentum
    high = float(np.float32(weight))
    with on_device_of(mean), torch.no_grad():
        updated[(1,)](
            mean, var, tracked, batch.mean, batch.var, count.expand(channels).contiguous() if is_tensor else None,
            0 if is_tensor else count, high, weight - high, channels,
            IS_CUMULATIVE=momentum is None, BC=min(1024, triton.next_power_of_2(channels)), num_warps=4,
        )  # fmt: skip
    # Autograd finds out by this that a tensor it saved has changed.
    torch.autograd.graph.increment_version(state)
    return True


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _kept(
    residual: torch.Tensor | None, affine: Affine, x: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The residual's values, or the bits that stand in for them: what the activation's derivative needs."""
    if residual is None or affine.activation is None:
        return None, None
    return (None, residual) if residual.dtype == torch.uint8 else (laid(residual, x), None)
