"""The closed form of backward: two sums a channel, then dx; what the activation let through is computed again from x.

Where the residual's values would be needed for that and the activation is ReLU, one bit an element stands in for them.
"""

import triton
import triton.language as tl

from batchnorm.kernels.triton.arithmetic import (
    affine_of,
    channel_of,
    place,
    statistics_of,
    through_activation,
    unpacked,
    where_valid,
)


@triton.jit
def _before_activation(
    dy, centred, residual, signs, row, column, valid, tile, group, groups, across, rows, columns, scale, shift,
    dy_row, dy_group, dy_column, r_row, r_group, r_column, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    PLANAR: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dz of a tile, 0 where there is nothing; `centred` is x - high."""
    start = group.to(tl.int64)
    gradient = tl.load(dy + start * dy_group + row * dy_row + column * dy_column, mask=valid, other=0.0).to(WIDE)
    if signs is not None:
        if PLANAR:
            eighth = (tile % across) * (BK // 8) + tl.arange(0, BK // 8)[None, :]
            place_of = signs + (row * groups + start) * (columns // 8) + eighth
        else:
            eighth = group * (BK // 8) + tl.arange(0, BK // 8)[None, :]
            place_of = signs + row * (columns // 8) + eighth
        packs = tl.load(place_of, mask=(row < rows) & (eighth < columns // 8), other=0)
        return tl.where(unpacked(packs, BR, BK) != 0, gradient, 0.0)
    elif ACTIVATION == 0:
        return gradient
    else:
        z = centred * scale + shift
        if residual is not None:
            at = residual + start * r_group + row * r_row + column * r_column
            z += tl.load(at, mask=valid, other=0.0).to(WIDE)
        return through_activation(gradient, z, ACTIVATION)


@triton.jit
def partial_sums(
    dy, x, residual, signs, mean, var, weight, bias, sums,
    groups, across, rows, columns, channels, blocks, splits, stride,
    dy_row, dy_group, dy_column, x_row, x_group, x_column, r_row, r_group, r_column,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, PLANAR: tl.constexpr, EVEN: tl.constexpr,
    LENGTH: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz * (x - high) over a program's blocks of tiles: (2, splits, K), K = C in planes."""
    pid = tl.program_id(0)
    group, split = pid % groups, pid // groups
    start = group.to(tl.int64)
    _, column = place(0, group, across, BR, BK, PLANAR)
    channel = channel_of(column, group, channels, LENGTH, PLANAR)
    high, rest, inv_std = statistics_of(mean, var, channel, EPS, WIDE)
    scale, shift = affine_of(weight, bias, channel, inv_std, rest, WIDE)
    sum_dz, sum_product = tl.zeros([BR, BK], WIDE), tl.zeros([BR, BK], WIDE)
    for block in range(split, blocks, splits):
        for i in tl.static_range(UNROLLED):
            tile = block * UNROLLED + i
            row, column = place(tile, group, across, BR, BK, PLANAR)
            valid = where_valid(row, column, rows, columns, EVEN)
            at = x + start * x_group + row * x_row + column * x_column
            centred = tl.load(at, mask=valid, other=0.0).to(WIDE) - high
            dz = _before_activation(
                dy, centred, residual, signs, row, column, valid, tile, group, groups, across, rows, columns, scale,
                shift, dy_row, dy_group, dy_column, r_row, r_group, r_column, ACTIVATION, WIDE, PLANAR, BR, BK,
            )  # fmt: skip
            sum_dz += dz
            sum_product += dz * centred
    if PLANAR:
        at = sums + split * groups + group
        tl.store(at, tl.sum(tl.sum(sum_dz.to(tl.float64), 1), 0))
        tl.store(at + stride, tl.sum(tl.sum(sum_product.to(tl.float64), 1), 0))
    else:
        column = group * BK + tl.arange(0, BK)
        at = sums + split.to(tl.int64) * columns + column
        tl.store(at, tl.sum(sum_dz.to(tl.float64), 0), mask=column < columns)
        tl.store(at + stride, tl.sum(sum_product.to(tl.float64), 0), mask=column < columns)


@triton.jit
def merged_sums(
    sums, mean, var, dz, dz_xhat, channels, parts, inner, width, stride, EPS: tl.constexpr, WIDE: tl.constexpr,
    LENGTH: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """The sums of dz and dz * x_hat, (C,): the parts of each channel added up in a fixed order, in float64."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    exists = channel < channels
    first, second = tl.zeros([BQ, BC], tl.float64), tl.zeros([BQ, BC], tl.float64)
    for begin in range(0, parts, BQ):
        part = begin + tl.arange(0, BQ)[:, None]
        split, within = part // inner, part % inner
        at = split.to(tl.int64) * width + ((within // LENGTH) * channels + channel) * LENGTH + within % LENGTH
        is_part = (part < parts) & exists
        first += tl.load(sums + at, mask=is_part, other=0.0)
        second += tl.load(sums + stride + at, mask=is_part, other=0.0)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    is_channel = channel < channels
    exact = tl.load(mean + channel, mask=is_channel, other=0.0).to(tl.float64)
    rest = exact - exact.to(WIDE).to(tl.float64)
    spread = tl.load(var + channel, mask=is_channel, other=1.0).to(tl.float64) + EPS
    total = tl.sum(first, 0)
    tl.store(dz + channel, total.to(dz.dtype.element_ty), mask=is_channel)
    product = (tl.sum(second, 0) - rest * total) / tl.sqrt(spread)
    tl.store(dz_xhat + channel, product.to(dz_xhat.dtype.element_ty), mask=is_channel)


@triton.jit(do_not_specialize=["count"])
def differentiated(
    dy, x, residual, signs, mask, dx, dresidual, mean, var, weight, bias, sum_dz, sum_dz_xhat, counts, count,
    groups, across, rows, columns, channels, tiles,
    dy_row, dy_group, dy_column, x_row, x_group, x_column, r_row, r_group, r_column,
    dx_row, dx_group, dx_column, dr_row, dr_group, dr_column, mask_row, mask_column,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, PLANAR: tl.constexpr, EVEN: tl.constexpr,
    LENGTH: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of one tile a program, the last one first, as `partial_sums` ended there.

    Without sums (None) the statistics are constants. `counts`, (C,), is None where all channels have `count` values.
    """
    pid = tl.program_id(0)
    group, tile = pid % groups, tiles - 1 - pid // groups
    start = group.to(tl.int64)
    row, column = place(tile, group, across, BR, BK, PLANAR)
    valid = where_valid(row, column, rows, columns, EVEN)
    centred = tl.load(x + start * x_group + row * x_row + column * x_column, mask=valid, other=0.0).to(WIDE)
    channel = channel_of(column, group, channels, LENGTH, PLANAR)
    high, rest, inv_std = statistics_of(mean, var, channel, EPS, WIDE)
    scale, shift = affine_of(weight, bias, channel, inv_std, rest, WIDE)
    centred -= high
    dz = _before_activation(
        dy, centred, residual, signs, row, column, valid, tile, group, groups, across, rows, columns, scale, shift,
        dy_row, dy_group, dy_column, r_row, r_group, r_column, ACTIVATION, WIDE, PLANAR, BR, BK,
    )  # fmt: skip
    if dresidual is not None:
        at = dresidual + start * dr_group + row * dr_row + column * dr_column
        tl.store(at, dz.to(dresidual.dtype.element_ty), mask=valid)
    if dx is not None:
        gradient = dz * scale
        if sum_dz is not None:
            if counts is None:
                number = tl.full([], count, WIDE)
            else:
                number = tl.maximum(tl.load(counts + channel), 1).to(WIDE)
            through_var = tl.load(sum_dz_xhat + channel).to(WIDE) / number * inv_std
            through_mean = tl.load(sum_dz + channel).to(WIDE) / number - rest * through_var
            answer = (through_mean + centred * through_var) * scale
            if mask is not None:
                kept = tl.load(mask + row * mask_row + column * mask_column, mask=valid, other=0) != 0
                answer = tl.where(kept, answer, 0.0)
            gradient -= answer
        at = dx + start * dx_group + row * dx_row + column * dx_column
        tl.store(at, gradient.to(dx.dtype.element_ty), mask=valid)
