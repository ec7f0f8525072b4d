"""Two normalised tensors added up, and backward: each tensor read once a pass, and neither's result ever written.

What the activation let through is computed again from both, so that forward keeps nothing but them. The coefficients of
two branches would be too many for each program to work out from float64 statistics, as those of one are: a small kernel
writes them first, in the precision of the arithmetic, C numbers a row:

    0 to 4  both means, both scales, and the shift of the sum: z = (a - mean) * scale + (b - mean) * scale + shift
    5 to 8  of each branch what mean and variance answer: dx = dz * scale + (x - mean) * factor + summand
"""

import triton
import triton.language as tl

from batchnorm.kernels.triton.arithmetic import (
    activated,
    affine_of,
    channel_of,
    place,
    statistics_of,
    through_activation,
    where_valid,
)


@triton.jit
def coefficients_of_both(
    a_mean, a_var, a_weight, a_bias, b_mean, b_var, b_weight, b_bias, coefficients, channels, c_row, c_channel,
    A_EPS: tl.constexpr, B_EPS: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Rows 0 to 4."""
    each = tl.program_id(0) * BC + tl.arange(0, BC)
    channel = tl.minimum(each, channels - 1)
    a_high, a_rest, a_inv_std = statistics_of(a_mean, a_var, channel, A_EPS, WIDE)
    a_scale, a_shift = affine_of(a_weight, a_bias, channel, a_inv_std, a_rest, WIDE)
    b_high, b_rest, b_inv_std = statistics_of(b_mean, b_var, channel, B_EPS, WIDE)
    b_scale, b_shift = affine_of(b_weight, b_bias, channel, b_inv_std, b_rest, WIDE)
    at, exists = coefficients + channel * c_channel, each < channels
    tl.store(at, a_high, mask=exists)
    tl.store(at + c_row, b_high, mask=exists)
    tl.store(at + 2 * c_row, a_scale, mask=exists)
    tl.store(at + 3 * c_row, b_scale, mask=exists)
    tl.store(at + 4 * c_row, a_shift + b_shift, mask=exists)


@triton.jit
def _of_forward(at, c_row):
    """Rows 0 to 4 of the channels at `at`."""
    return tl.load(at), tl.load(at + c_row), tl.load(at + 2 * c_row), tl.load(at + 3 * c_row), tl.load(at + 4 * c_row)


@triton.jit
def _before_activation(a_centred, b_centred, a_scale, b_scale, shift):
    """z, by one expression wherever it is wanted: what ReLU let through is then what it let through before."""
    return a_centred * a_scale + (b_centred * b_scale + shift)


@triton.jit
def applied_both(
    a, b, y, coefficients, groups, across, rows, columns, channels, tiles, c_row, c_channel,
    a_row, a_group, a_column, b_row, b_group, b_column, y_row, y_group, y_column,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, PLANAR: tl.constexpr, EVEN: tl.constexpr, LENGTH: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = activation(BN(a) + BN(b)): one tile a program, the last one first, as in `applied`."""
    pid = tl.program_id(0)
    group, tile = pid % groups, tiles - 1 - pid // groups
    start = group.to(tl.int64)
    row, column = place(tile, group, across, BR, BK, PLANAR)
    valid = where_valid(row, column, rows, columns, EVEN)
    a_values = tl.load(a + start * a_group + row * a_row + column * a_column, mask=valid, other=0.0).to(WIDE)
    b_values = tl.load(b + start * b_group + row * b_row + column * b_column, mask=valid, other=0.0).to(WIDE)
    at = coefficients + channel_of(column, group, channels, LENGTH, PLANAR) * c_channel
    a_high, b_high, a_scale, b_scale, shift = _of_forward(at, c_row)
    a_centred, b_centred = a_values - a_high, b_values - b_high
    z = _before_activation(a_centred, b_centred, a_scale, b_scale, shift)
    at = y + start * y_group + row * y_row + column * y_column
    tl.store(at, activated(z, ACTIVATION).to(y.dtype.element_ty), mask=valid)


@triton.jit
def partial_sums_of_both(
    dy, a, b, coefficients, sums, groups, across, rows, columns, channels, blocks, splits, stride, c_row, c_channel,
    dy_row, dy_group, dy_column, a_row, a_group, a_column, b_row, b_group, b_column,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, PLANAR: tl.constexpr, EVEN: tl.constexpr, LENGTH: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """Sums of dz, dz * (a - high) and dz * (b - high) over a program's blocks: (3, splits, K), as `partial_sums`."""
    pid = tl.program_id(0)
    group, split = pid % groups, pid // groups
    start = group.to(tl.int64)
    _, column = place(0, group, across, BR, BK, PLANAR)
    at = coefficients + channel_of(column, group, channels, LENGTH, PLANAR) * c_channel
    a_high, b_high, a_scale, b_scale, shift = _of_forward(at, c_row)
    sum_dz = tl.zeros([BR, BK], WIDE)
    a_product, b_product = tl.zeros([BR, BK], WIDE), tl.zeros([BR, BK], WIDE)
    for block in range(split, blocks, splits):
        for i in tl.static_range(UNROLLED):
            row, column = place(block * UNROLLED + i, group, across, BR, BK, PLANAR)
            valid = where_valid(row, column, rows, columns, EVEN)
            a_at = a + start * a_group + row * a_row + column * a_column
            b_at = b + start * b_group + row * b_row + column * b_column
            dy_at = dy + start * dy_group + row * dy_row + column * dy_column
            a_centred = tl.load(a_at, mask=valid, other=0.0).to(WIDE) - a_high
            b_centred = tl.load(b_at, mask=valid, other=0.0).to(WIDE) - b_high
            dz = tl.load(dy_at, mask=valid, other=0.0).to(WIDE)
            z = _before_activation(a_centred, b_centred, a_scale, b_scale, shift)
            dz = through_activation(dz, z, ACTIVATION)
            sum_dz += dz
            a_product += dz * a_centred
            b_product += dz * b_centred
    if PLANAR:
        at = sums + split * groups + group
        tl.store(at, tl.sum(tl.sum(sum_dz.to(tl.float64), 1), 0))
        tl.store(at + stride, tl.sum(tl.sum(a_product.to(tl.float64), 1), 0))
        tl.store(at + 2 * stride, tl.sum(tl.sum(b_product.to(tl.float64), 1), 0))
    else:
        column = group * BK + tl.arange(0, BK)
        at = sums + split.to(tl.int64) * columns + column
        tl.store(at, tl.sum(sum_dz.to(tl.float64), 0), mask=column < columns)
        tl.store(at + stride, tl.sum(a_product.to(tl.float64), 0), mask=column < columns)
        tl.store(at + 2 * stride, tl.sum(b_product.to(tl.float64), 0), mask=column < columns)


@triton.jit
def _summed_up(
    total, product, mean, var, weight, dz, dz_xhat, coefficients, count, channel, exists, c_row,
    EPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sums of dz and dz * x_hat of a branch, and its two coefficients of what mean and variance answer."""
    exact = tl.load(mean + channel, mask=exists, other=0.0).to(tl.float64)
    rest = exact - exact.to(WIDE).to(tl.float64)
    inv_std = 1.0 / tl.sqrt(tl.load(var + channel, mask=exists, other=1.0).to(tl.float64) + EPS)
    product = (product - rest * total) * inv_std
    tl.store(dz + channel, total.to(dz.dtype.element_ty), mask=exists)
    tl.store(dz_xhat + channel, product.to(dz_xhat.dtype.element_ty), mask=exists)
    scale = -inv_std / tl.full([], count, tl.float64)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=exists, other=0.0).to(tl.float64)
    tl.store(coefficients, (product * inv_std * scale).to(WIDE), mask=exists)
    tl.store(coefficients + c_row, ((total - rest * product * inv_std) * scale).to(WIDE), mask=exists)


@triton.jit(do_not_specialize=["count"])
def merged_sums_of_both(
    sums, a_mean, a_var, a_weight, b_mean, b_var, b_weight, a_dz, a_dz_xhat, b_dz, b_dz_xhat, coefficients, count,
    channels, parts, inner, width, stride, c_row, c_channel, A_EPS: tl.constexpr, B_EPS: tl.constexpr,
    WIDE: tl.constexpr, LENGTH: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """The sums of each branch, (C,), merged as by `merged_sums`, and rows 5 to 8 of the coefficients."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    exists = channel < channels
    first, second = tl.zeros([BQ, BC], tl.float64), tl.zeros([BQ, BC], tl.float64)
    third = tl.zeros([BQ, BC], tl.float64)
    for begin in range(0, parts, BQ):
        part = begin + tl.arange(0, BQ)[:, None]
        split, within = part // inner, part % inner
        at = sums + split.to(tl.int64) * width + ((within // LENGTH) * channels + channel) * LENGTH + within % LENGTH
        is_part = (part < parts) & exists
        first += tl.load(at, mask=is_part, other=0.0)
        second += tl.load(at + stride, mask=is_part, other=0.0)
        third += tl.load(at + 2 * stride, mask=is_part, other=0.0)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    exists = channel < channels
    total, at = tl.sum(first, 0), coefficients + channel * c_channel + 5 * c_row
    _summed_up(
        total, tl.sum(second, 0), a_mean, a_var, a_weight, a_dz, a_dz_xhat, at, count, channel, exists, c_row, A_EPS,
        WIDE,
    )  # fmt: skip
    _summed_up(
        total, tl.sum(third, 0), b_mean, b_var, b_weight, b_dz, b_dz_xhat, at + 2 * c_row, count, channel, exists,
        c_row, B_EPS, WIDE,
    )  # fmt: skip


@triton.jit
def differentiated_both(
    dy, a, b, da, db, coefficients, groups, across, rows, columns, channels, tiles, c_row, c_channel,
    dy_row, dy_group, dy_column, a_row, a_group, a_column, b_row, b_group, b_column,
    da_row, da_group, da_column, db_row, db_group, db_column,
    A_ESTIMATED: tl.constexpr, B_ESTIMATED: tl.constexpr,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, PLANAR: tl.constexpr, EVEN: tl.constexpr, LENGTH: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradients of a and of b: one tile a program, the last one first, as in `differentiated`."""
    pid = tl.program_id(0)
    group, tile = pid % groups, tiles - 1 - pid // groups
    start = group.to(tl.int64)
    row, column = place(tile, group, across, BR, BK, PLANAR)
    valid = where_valid(row, column, rows, columns, EVEN)
    a_values = tl.load(a + start * a_group + row * a_row + column * a_column, mask=valid, other=0.0).to(WIDE)
    b_values = tl.load(b + start * b_group + row * b_row + column * b_column, mask=valid, other=0.0).to(WIDE)
    dz = tl.load(dy + start * dy_group + row * dy_row + column * dy_column, mask=valid, other=0.0).to(WIDE)
    at = coefficients + channel_of(column, group, channels, LENGTH, PLANAR) * c_channel
    a_high, b_high, a_scale, b_scale, shift = _of_forward(at, c_row)
    a_centred, b_centred = a_values - a_high, b_values - b_high
    dz = through_activation(dz, _before_activation(a_centred, b_centred, a_scale, b_scale, shift), ACTIVATION)
    gradient = dz * a_scale
    if A_ESTIMATED:
        gradient += a_centred * tl.load(at + 5 * c_row) + tl.load(at + 6 * c_row)
    a_at = da + start * da_group + row * da_row + column * da_column
    tl.store(a_at, gradient.to(da.dtype.element_ty), mask=valid)
    gradient = dz * b_scale
    if B_ESTIMATED:
        gradient += b_centred * tl.load(at + 7 * c_row) + tl.load(at + 8 * c_row)
    b_at = db + start * db_group + row * db_row + column * db_column
    tl.store(b_at, gradient.to(db.dtype.element_ty), mask=valid)
