"""y = activation((x - mean) * inv_std * weight + bias + residual), x and residual read once, y written once."""

import triton
import triton.language as tl

from batchnorm.kernels.triton.arithmetic import (
    activated,
    affine_of,
    channel_of,
    packed,
    place,
    statistics_of,
    where_valid,
)


@triton.jit
def applied(
    x, residual, y, signs, mean, var, weight, bias,
    groups, across, rows, columns, channels, tiles, x_row, x_group, x_column, r_row, r_group, r_column,
    y_row, y_group, y_column, EPS: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    PLANAR: tl.constexpr, EVEN: tl.constexpr, LENGTH: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile a program, the last one first: what `partial_moments` read last is still in the cache.

    `residual` may be None; into `signs`, if not None, goes one bit an element: whether ReLU lets it through.
    """
    pid = tl.program_id(0)
    group, tile = pid % groups, tiles - 1 - pid // groups
    row, column = place(tile, group, across, BR, BK, PLANAR)
    valid = where_valid(row, column, rows, columns, EVEN)
    start = group.to(tl.int64)
    values = tl.load(x + start * x_group + row * x_row + column * x_column, mask=valid, other=0.0).to(WIDE)
    if residual is not None:
        added = tl.load(residual + start * r_group + row * r_row + column * r_column, mask=valid, other=0.0).to(WIDE)
    channel = channel_of(column, group, channels, LENGTH, PLANAR)
    high, rest, inv_std = statistics_of(mean, var, channel, EPS, WIDE)
    scale, shift = affine_of(weight, bias, channel, inv_std, rest, WIDE)
    z = (values - high) * scale + shift
    if residual is not None:
        z += added
    result = activated(z, ACTIVATION)
    tl.store(y + start * y_group + row * y_row + column * y_column, result.to(y.dtype.element_ty), mask=valid)
    if signs is not None:
        if PLANAR:
            eighth = (tile % across) * (BK // 8) + tl.arange(0, BK // 8)[None, :]
            place_of = signs + (row * groups + start) * (columns // 8) + eighth
        else:
            eighth = group * (BK // 8) + tl.arange(0, BK // 8)[None, :]
            place_of = signs + row * (columns // 8) + eighth
        tl.store(place_of, packed((z <= 0) == 0, BR, BK), mask=(row < rows) & (eighth < columns // 8))
