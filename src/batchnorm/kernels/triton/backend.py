"""The contract's functions on a GPU: outputs are allocated and kernels launched here, and nothing is read back.

No function waits for the device, so that CUDA graphs can capture every one. Importing the module imports Triton. Under
TRITON_INTERPRET=1, set before that, the kernels run on tensors of the CPU, slowly, for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from batchnorm.kernels.contract import ACTIVATION_CODES, Affine, BackwardSums, Gradients, Statistics
from batchnorm.kernels.triton.apply_kernels import applied
from batchnorm.kernels.triton.backward_kernels import differentiated, merged_sums, partial_sums
from batchnorm.kernels.triton.layout import Layout, Strides, layout_of, mask_strides, strides_in
from batchnorm.kernels.triton.running_kernel import updated
from batchnorm.kernels.triton.stats_kernels import merged_moments, partial_moments
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running

folds = False
packs = True

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
    weight = affine.weight
    dtype = weight.dtype if weight is not None and weight.dtype in _WIDE else torch.float64
    dy = _laid(dy, x)
    sums = _reduce(dy, x, statistics, affine, residual, dtype)
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
    strides = _strides(layout, x)
    tiling = layout.tiling(1)
    mask = None if mask is None else mask.contiguous()
    blocks = triton.cdiv(tiling.number, _BLOCK)
    splits = tiling.splits(layout, blocks)
    parts = x.new_empty(2, splits, layout.width, dtype=torch.float64)
    counts = x.new_empty(splits, dtype=torch.float64)
    with _on_device_of(x):
        partial_moments[(layout.groups * splits,)](
            x, mask, parts[0], parts[1], counts, layout.groups, tiling.across, layout.rows, layout.columns,
            tiling.full // _BLOCK if mask is None else 0, blocks, splits, *strides,
            *((0, 0) if mask is None else mask_strides(layout, mask)),
            HAS_MASK=mask is not None, WIDE=_wide_of(x), PLANAR=layout.is_planar, BR=tiling.height, BK=tiling.width,
            num_warps=4, **_limits(layout.groups * splits, x),
        )  # fmt: skip
        lanes, together = _merging(layout)
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
    residual = None if residual is None else _laid(residual, x)
    tiling = layout.tiling(4)
    with _on_device_of(x):
        applied[(layout.groups * tiling.number,)](
            x, residual, y, signs, *_parameters(statistics, affine), layout.groups, tiling.across, layout.rows,
            layout.columns, x.shape[1], tiling.number, *_strides(layout, x), *_strides(layout, residual),
            *_strides(layout, y),
            EPS=affine.eps, ACTIVATION=ACTIVATION_CODES[affine.activation], WIDE=_wide_of(x), PLANAR=layout.is_planar,
            EVEN=tiling.is_even, LENGTH=layout.length, BR=tiling.height, BK=tiling.width, num_warps=4,
        )  # fmt: skip
    return y


def backward_reduce(
    dy: torch.Tensor, x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor | None = None
) -> BackwardSums:
    """See `contract.Backend.backward_reduce`; the sums are float64."""
    return _reduce(_laid(dy, x), x, statistics, affine, residual, torch.float64)


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
    parameters = _parameters(statistics, affine)
    stride = splits * layout.width
    with _on_device_of(x):
        partial_sums[(layout.groups * splits,)](
            dy, x, residual, signs, *parameters, parts, layout.groups, tiling.across, layout.rows, layout.columns,
            channels, blocks, splits, stride, *_strides(layout, dy), *_strides(layout, x), *_strides(layout, residual),
            EPS=affine.eps, ACTIVATION=ACTIVATION_CODES[affine.activation], WIDE=_wide_of(x), PLANAR=layout.is_planar,
            EVEN=tiling.is_even, LENGTH=layout.length, BR=tiling.height, BK=tiling.width, UNROLLED=_UNROLLED,
            num_warps=4,
        )  # fmt: skip
        lanes, together = _merging(layout)
        merged_sums[(triton.cdiv(channels, together),)](
            parts, *parameters[:2], *sums, channels, splits * layout.inner, layout.inner, layout.width, stride,
            EPS=affine.eps, WIDE=_wide_of(x), LENGTH=layout.length, BC=together, BQ=lanes, num_warps=4,
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
        dy = _laid(dy, x)
        residual_values, signs = _kept(residual, affine, x)
        mask = None if mask is None or sums is None else mask.contiguous()
        tiling = layout.tiling(2)
        count: Any = statistics.count if isinstance(statistics, Moments) else 0
        is_tensor = isinstance(count, torch.Tensor)
        with _on_device_of(x):
            differentiated[(layout.groups * tiling.number,)](
                dy, x, residual_values, signs, mask, dx, dresidual, *_parameters(statistics, affine),
                *((None, None) if sums is None else sums),
                count.expand(x.shape[1]).contiguous() if is_tensor else None, 0 if is_tensor else count,
                layout.groups, tiling.across, layout.rows, layout.columns, x.shape[1], tiling.number,
                *_strides(layout, dy), *_strides(layout, x), *_strides(layout, residual_values),
                *_strides(layout, dx), *_strides(layout, dresidual),
                *((0, 0) if mask is None else mask_strides(layout, mask)),
                EPS=affine.eps, ACTIVATION=ACTIVATION_CODES[affine.activation], WIDE=_wide_of(x),
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
    if (mean.ndim != 1 or mean.dtype not in _WIDE or (momentum is None and tracked is None)) or (
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
    with _on_device_of(mean), torch.no_grad():
        updated[(1,)](
            mean, var, tracked, batch.mean, batch.var, count.expand(channels).contiguous() if is_tensor else None,
            0 if is_tensor else count, high, weight - high, channels,
            IS_CUMULATIVE=momentum is None, BC=min(1024, triton.next_power_of_2(channels)), num_warps=4,
        )  # fmt: skip
    # Autograd finds out by this that a tensor it saved has changed.
    torch.autograd.graph.increment_version(state)
    return True


_WIDE = (torch.float32, torch.float64)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _limits(programs: int, x: torch.Tensor) -> dict[str, int]:
    """So few registers a thread that five programs fit on a multiprocessor, if there are that many."""
    return {"maxnreg": 96} if programs > 528 and x.itemsize < 8 and torch.version.hip is None else {}


def _wide_of(x: torch.Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _strides(layout: Layout, x: torch.Tensor | None) -> Strides:
    if x is None:
        return 0, 0, 0
    found = strides_in(layout, x)
    assert found is not None, (layout, x.shape, x.stride())
    return found


def _laid(given: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`given` as it is where it lies like x, else copied: both are then read in the order of the memory."""
    layout = layout_of(x, is_masked=False)
    found = strides_in(layout, given)
    if found is None or (found[2] > 1 and _strides(layout, x)[2] == 1):
        return torch.empty_like(x).copy_(given)
    return given


def _kept(
    residual: torch.Tensor | None, affine: Affine, x: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The residual's values, or the bits that stand in for them: what the activation's derivative needs."""
    if residual is None or affine.activation is None:
        return None, None
    return (None, residual) if residual.dtype == torch.uint8 else (_laid(residual, x), None)


def _parameters(statistics: Statistics, affine: Affine) -> tuple[torch.Tensor | None, ...]:
    """Mean, var, weight and bias, contiguous."""
    given = statistics.mean, statistics.var, affine.weight, affine.bias
    return tuple(t if t is None else t.contiguous() for t in given)


def _merging(layout: Layout) -> tuple[int, int]:
    """Lanes and channels of a program that merges: neighbours in memory are read together."""
    return (32, 16) if layout.length == 1 else (512, 1)


def _on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
