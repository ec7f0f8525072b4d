"""Mean and variance of each channel: lanes of Welford's recurrence, then the law of total variance in float64.

A program takes every so many blocks of four tiles. Each lane of a tile keeps mean and M2 of the values it met, about a
shift that is one of them, so that float32 loses nothing at a large mean; a block's four values enter together, by
Chan's rule. The lanes merge in float64, the programs' parts in a second kernel, all in an order that the shape alone
decides: no atomic addition, and the same bits in every run.
"""

import triton
import triton.language as tl

from batchnorm.kernels.triton.arithmetic import place


@triton.jit
def _values(
    x, t, group, across, x_row, x_group, x_column, WIDE: tl.constexpr, PLANAR: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """A tile of x that lies within it."""
    row, column = place(t, group, across, BR, BK, PLANAR)
    return tl.load(x + group.to(tl.int64) * x_group + row * x_row + column * x_column).to(WIDE)


@triton.jit
def _valid_values(
    x, mask, t, group, across, rows, columns, x_row, x_group, x_column, mask_row, mask_column,
    HAS_MASK: tl.constexpr, WIDE: tl.constexpr, PLANAR: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of x, and which of its positions count."""
    row, column = place(t, group, across, BR, BK, PLANAR)
    valid = (row < rows) & (column < columns)
    if HAS_MASK:
        valid = valid & (tl.load(mask + row * mask_row + column * mask_column, mask=valid, other=0) != 0)
    at = x + group.to(tl.int64) * x_group + row * x_row + column * x_column
    return tl.load(at, mask=valid, other=0.0).to(WIDE), valid


@triton.jit
def partial_moments(
    x, mask, means, squares, counts,
    groups, across, rows, columns, full_blocks, blocks, splits, x_row, x_group, x_column, mask_row, mask_column,
    HAS_MASK: tl.constexpr, WIDE: tl.constexpr, PLANAR: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Mean, M2 and count of a program's blocks: (splits, K), (splits, K), (splits,), float64; K = C in planes."""
    pid = tl.program_id(0)
    group, split = pid % groups, pid // groups
    mean, square = tl.zeros([BR, BK], WIDE), tl.zeros([BR, BK], WIDE)
    if HAS_MASK:
        shift = tl.zeros([BR, BK], WIDE)
    else:  # the first tile, or what of x is nearest to it
        row, column = place(split * 4, group, across, BR, BK, PLANAR)
        row, column = tl.minimum(row, rows - 1), tl.minimum(column, columns - 1)
        shift = tl.load(x + group.to(tl.int64) * x_group + row * x_row + column * x_column).to(WIDE)
    met = tl.full([], 0.0, WIDE)
    for block in range(split, full_blocks, splits):
        a = _values(x, block * 4, group, across, x_row, x_group, x_column, WIDE, PLANAR, BR, BK)
        b = _values(x, block * 4 + 1, group, across, x_row, x_group, x_column, WIDE, PLANAR, BR, BK)
        c = _values(x, block * 4 + 2, group, across, x_row, x_group, x_column, WIDE, PLANAR, BR, BK)
        d = _values(x, block * 4 + 3, group, across, x_row, x_group, x_column, WIDE, PLANAR, BR, BK)
        a, b, c, d = a - shift, b - shift, c - shift, d - shift
        centre = (a + b + c + d) * 0.25
        a, b, c, d = a - centre, b - centre, c - centre, d - centre
        share = 4.0 / (met + 4.0)
        delta = centre - mean
        mean += delta * share
        square += a * a + b * b + c * c + d * d + delta * delta * (met * share)
        met += 4.0
    number = tl.zeros([BR, BK], WIDE) + met
    # The first block of this program at or after full_blocks.
    missing = tl.maximum(full_blocks - split, 0)
    for block in range(split + (missing + splits - 1) // splits * splits, blocks, splits):
        a, a_valid = _valid_values(
            x, mask, block * 4, group, across, rows, columns, x_row, x_group, x_column, mask_row, mask_column,
            HAS_MASK, WIDE, PLANAR, BR, BK,
        )  # fmt: skip
        b, b_valid = _valid_values(
            x, mask, block * 4 + 1, group, across, rows, columns, x_row, x_group, x_column, mask_row, mask_column,
            HAS_MASK, WIDE, PLANAR, BR, BK,
        )  # fmt: skip
        c, c_valid = _valid_values(
            x, mask, block * 4 + 2, group, across, rows, columns, x_row, x_group, x_column, mask_row, mask_column,
            HAS_MASK, WIDE, PLANAR, BR, BK,
        )  # fmt: skip
        d, d_valid = _valid_values(
            x, mask, block * 4 + 3, group, across, rows, columns, x_row, x_group, x_column, mask_row, mask_column,
            HAS_MASK, WIDE, PLANAR, BR, BK,
        )  # fmt: skip
        fresh = a_valid.to(WIDE) + b_valid.to(WIDE) + c_valid.to(WIDE) + d_valid.to(WIDE)
        divisor = tl.maximum(fresh, 1.0)
        if HAS_MASK:  # padding may hold anything: the shift is a mean of values that count
            shift = tl.where(number == 0, (a + b + c + d) / divisor, shift)
        a, b = tl.where(a_valid, a - shift, 0.0), tl.where(b_valid, b - shift, 0.0)
        c, d = tl.where(c_valid, c - shift, 0.0), tl.where(d_valid, d - shift, 0.0)
        centre = (a + b + c + d) / divisor
        a, b = tl.where(a_valid, a - centre, 0.0), tl.where(b_valid, b - centre, 0.0)
        c, d = tl.where(c_valid, c - centre, 0.0), tl.where(d_valid, d - centre, 0.0)
        share = fresh / tl.maximum(number + fresh, 1.0)
        delta = centre - mean
        mean += delta * share
        square += a * a + b * b + c * c + d * d + delta * delta * (number * share)
        number += fresh
    weight = number.to(tl.float64)
    exact = shift.to(tl.float64) + mean.to(tl.float64)
    # A lane without a value weighs nothing, whatever its shift was.
    exact = tl.where(weight > 0, exact, 0.0)
    if PLANAR:
        total = tl.sum(tl.sum(weight, 1), 0)
        whole = tl.sum(tl.sum(weight * exact, 1), 0) / tl.maximum(total, 1.0)
        spread = square.to(tl.float64) + weight * (exact - whole) * (exact - whole)
        tl.store(means + split * groups + group, whole)
        tl.store(squares + split * groups + group, tl.sum(tl.sum(spread, 1), 0))
        if group == 0:
            tl.store(counts + split, total)
    else:
        total = tl.sum(weight, 0)
        whole = tl.sum(weight * exact, 0) / tl.maximum(total, 1.0)
        spread = square.to(tl.float64) + weight * (exact - whole[None, :]) * (exact - whole[None, :])
        column = group * BK + tl.arange(0, BK)
        at = split.to(tl.int64) * columns + column
        tl.store(means + at, whole, mask=column < columns)
        tl.store(squares + at, tl.sum(spread, 0), mask=column < columns)
        if group == 0:  # all columns have as many
            tl.store(counts + split, tl.max(total, 0))


@triton.jit
def merged_moments(
    means, squares, counts, mean, var, count, channels, parts, inner, width, LENGTH: tl.constexpr,
    BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """The parts of each channel merged: mean and var, (C,) float64, and count, (C,) int64.

    There are `parts` a channel, `inner` of them a split; `width` is K.
    """
    channel = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    exists = channel < channels
    total, whole = tl.zeros([BQ, BC], tl.float64), tl.zeros([BQ, BC], tl.float64)
    for start in range(0, parts, BQ):
        part = start + tl.arange(0, BQ)[:, None]
        split, within = part // inner, part % inner
        at = split.to(tl.int64) * width + ((within // LENGTH) * channels + channel) * LENGTH + within % LENGTH
        number = tl.load(counts + split, mask=part < parts, other=0.0)
        total += number
        whole += number * tl.load(means + at, mask=(part < parts) & exists, other=0.0)
    all_values = tl.sum(total, 0)
    centre = tl.sum(whole, 0) / tl.maximum(all_values, 1.0)
    square = tl.zeros([BQ, BC], tl.float64)
    for start in range(0, parts, BQ):
        part = start + tl.arange(0, BQ)[:, None]
        split, within = part // inner, part % inner
        at = split.to(tl.int64) * width + ((within // LENGTH) * channels + channel) * LENGTH + within % LENGTH
        is_part = (part < parts) & exists
        number = tl.load(counts + split, mask=part < parts, other=0.0)
        away = tl.where(is_part, tl.load(means + at, mask=is_part, other=0.0) - centre[None, :], 0.0)
        square += tl.load(squares + at, mask=is_part, other=0.0) + number * away * away
    spread = tl.sum(square, 0) / tl.maximum(all_values, 1.0)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    tl.store(mean + channel, centre, mask=channel < channels)
    tl.store(var + channel, spread, mask=channel < channels)
    if count is not None:
        tl.store(count + channel, all_values.to(tl.int64), mask=channel < channels)
