"""What the kernels share: where a tile lies, the channels of its columns, coefficients, activations."""

import triton
import triton.language as tl


@triton.jit
def place(t, group, across, BR: tl.constexpr, BK: tl.constexpr, PLANAR: tl.constexpr):
    """Rows (BR, 1) and columns (1, BK) of tile t of a group, int64; a plane has `across` tiles side by side."""
    if PLANAR:
        down = t // across
        column = (t % across) * BK
    else:
        down = t
        column = group * BK
    rows = down.to(tl.int64) * BR + tl.arange(0, BR)
    columns = column.to(tl.int64) + tl.arange(0, BK)
    return rows[:, None], columns[None, :]


@triton.jit
def where_valid(rows, columns, number_of_rows, number_of_columns, EVEN: tl.constexpr):
    """Which positions of a tile exist; EVEN: the columns are a multiple of the tile's."""
    if EVEN:
        return rows < number_of_rows
    else:  # Triton compiles what follows a return, too
        return (rows < number_of_rows) & (columns < number_of_columns)


@triton.jit
def channel_of(columns, group, channels, LENGTH: tl.constexpr, PLANAR: tl.constexpr):
    """The channel of each column, (1, BK); or the one of the whole group."""
    if PLANAR:
        return group
    else:
        return (columns // LENGTH) % channels


@triton.jit
def statistics_of(mean, var, channel, eps, WIDE: tl.constexpr):
    """The mean as a rounded part and a rest, and inv_std."""
    exact = tl.load(mean + channel).to(tl.float64)
    high = exact.to(WIDE)
    rest = (exact - high.to(tl.float64)).to(WIDE)
    spread = (tl.load(var + channel).to(tl.float64) + eps).to(WIDE)
    return high, rest, 1.0 / tl.sqrt(spread)


@triton.jit
def affine_of(weight, bias, channel, inv_std, rest, WIDE: tl.constexpr):
    """The factor and the summand in (x - high) * scale + shift; weight and bias may be None."""
    scale = inv_std
    if weight is not None:
        scale = inv_std * tl.load(weight + channel).to(WIDE)
    shift = -rest * scale
    if bias is not None:
        shift += tl.load(bias + channel).to(WIDE)
    return scale, shift


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def tanh(z):
    """Exact for small z too, where 1 - exp(-2z) would cancel."""
    decay = tl.exp(-2.0 * tl.abs(z))
    large = (1.0 - decay) / (1.0 + decay)
    square = z * z
    return tl.where(
        square < 1e-4,
        z * (1.0 - square * (0.3333333333333333 - square * (0.13333333333333333 - square * 0.05396825396825397))),
        tl.where(z < 0, -large, large),
    )


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """The activation with a code of contract.ACTIVATION_CODES; NaN passes every one of them."""
    if ACTIVATION == 1:
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == 2:
        return tl.where(z > 0, z, z * 0.01)
    elif ACTIVATION == 3:
        return z * sigmoid(z)
    elif ACTIVATION == 4:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 5:
        return sigmoid(z)
    elif ACTIVATION == 6:
        return tanh(z)
    else:
        return z


@triton.jit
def through_activation(dy, z, ACTIVATION: tl.constexpr):
    """dy * activation'(z), as torch differentiates."""
    if ACTIVATION == 1:
        return tl.where(z <= 0, 0.0, dy)
    elif ACTIVATION == 2:
        return tl.where(z > 0, dy, dy * 0.01)
    elif ACTIVATION == 3:
        s = sigmoid(z)
        return dy * (s * (1.0 + z * (1.0 - s)))
    elif ACTIVATION == 4:
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return dy * (below + z * (0.3989422804014327 * tl.exp(-0.5 * z * z)))
    elif ACTIVATION == 5:
        s = sigmoid(z)
        return dy * (s * (1.0 - s))
    elif ACTIVATION == 6:
        t = tanh(z)
        return dy * (1.0 - t * t)
    else:
        return dy


@triton.jit
def packed(signs, BR: tl.constexpr, BK: tl.constexpr):
    """Eight neighbours of a row of (BR, BK) truths as the bits of one byte, (BR, BK // 8)."""
    bits = tl.reshape(signs.to(tl.int32), [BR, BK // 8, 8]) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, 2).to(tl.uint8)


@triton.jit
def unpacked(packs, BR: tl.constexpr, BK: tl.constexpr):
    """What `packed` packed: 0 or 1, (BR, BK)."""
    bits = (packs.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [BR, BK])
