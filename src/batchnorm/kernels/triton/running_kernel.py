"""Running statistics after one more batch, in place and on the device: nothing waits for a number to be read."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def updated(
    running_mean, running_var, tracked, mean, var, counts, count, high, low, channels,
    IS_CUMULATIVE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`stats.running.exponential` or `cumulative`, in float64, by one program; the rules of `layers.commit.commit`.

    The momentum is high + low, as a float argument is rounded to float32. `counts`, (C,), is None where all channels
    have `count` values.
    """
    lanes = tl.arange(0, BC)
    unusable = tl.zeros([BC], tl.int32)
    filled = tl.zeros([BC], tl.int32)
    for begin in range(0, channels, BC):
        exists = begin + lanes < channels
        total = tl.load(mean + begin + lanes, mask=exists, other=0.0).to(tl.float64)
        total += tl.load(var + begin + lanes, mask=exists, other=0.0).to(tl.float64)
        # What is not finite minus itself is not a number.
        is_bad = (total - total) != 0.0
        if counts is not None:
            number = tl.load(counts + begin + lanes, mask=exists, other=2)
            is_bad = is_bad | (number <= 1)
            filled += (exists & (number != 0)).to(tl.int32)
        else:
            filled += exists.to(tl.int32)
        unusable += (exists & is_bad).to(tl.int32)
    is_usable = tl.sum(unusable, 0) == 0
    if tracked is not None:
        before = tl.load(tracked)
    if IS_CUMULATIVE:
        share = 1.0 / (before + 1).to(tl.float64)
    else:
        share = tl.full([], high, tl.float64) + tl.full([], low, tl.float64)
    for begin in range(0, channels, BC):
        at = begin + lanes
        writes = (at < channels) & is_usable
        if counts is not None:
            number = tl.load(counts + at, mask=writes, other=2).to(tl.float64)
        else:
            number = tl.zeros([BC], tl.float64) + tl.full([], count, tl.float64)
        old = tl.load(running_mean + at, mask=writes, other=0.0).to(tl.float64)
        new = old + share * (tl.load(mean + at, mask=writes, other=0.0).to(tl.float64) - old)
        tl.store(running_mean + at, new.to(running_mean.dtype.element_ty), mask=writes)
        old = tl.load(running_var + at, mask=writes, other=0.0).to(tl.float64)
        unbiased = tl.load(var + at, mask=writes, other=0.0).to(tl.float64) * number / (number - 1.0)
        tl.store(running_var + at, (old + share * (unbiased - old)).to(running_var.dtype.element_ty), mask=writes)
    if tracked is not None:
        # A batch without a value is counted, as torch does.
        is_counted = is_usable | (tl.sum(filled, 0) == 0)
        tl.store(tracked, before + is_counted.to(before.dtype))
