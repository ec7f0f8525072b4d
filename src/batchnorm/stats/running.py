"""How running statistics follow the batches: the exponential rule, the cumulative rule, and Bessel's correction.

The only place in the library where Bessel's correction stands: variances are biased everywhere else, and running
variances are unbiased, as in PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from batchnorm.stats.moments import Array, Moments

if TYPE_CHECKING:
    import torch


class Running(NamedTuple):
    """Running statistics as PyTorch keeps them: mean and UNBIASED variance, each (C,)."""

    mean: Array
    var: Array


def exponential(running: Running, batch: Moments, momentum: float | torch.Tensor) -> Running:
    """Running statistics after one more batch: running + momentum * (batch - running).

    Args:
        running: mean and unbiased variance so far, each (C,), float.
        batch: the batch's Moments, (C,); its variance is taken with Bessel's correction.
        momentum: weight of the NEW value, in [0, 1]; PyTorch's meaning, Keras' is 1 - momentum.

    Returns:
        New Running, (C,) each, in the wider dtype of the two (float64 as a rule); nothing is changed in place.

    Source: Ioffe & Szegedy 2015, section 3.1 (moving averages); torch.nn.BatchNorm1d (the convention).

    Example:
        >>> import numpy as np
        >>> batch = Moments(np.array([1.0]), np.array([1.0]), 2)
        >>> after = exponential(Running(np.array([0.0]), np.array([1.0])), batch, 0.1)
        >>> float(after.mean[0]), float(after.var[0])
        (0.1, 1.1)
    """
    mean = running.mean + momentum * (batch.mean - running.mean)
    var = running.var + momentum * (batch.unbiased_var - running.var)
    return Running(mean, var)


def cumulative(running: Running, batch: Moments, batches: int | torch.Tensor) -> Running:
    """The plain average over all batches so far, momentum=None in PyTorch: exponential with momentum 1 / batches.

    Args:
        running: mean and unbiased variance over the batches before this one, each (C,).
        batch: the new batch's Moments, (C,).
        batches: number of batches, this one counted: at least 1.

    Returns:
        New Running; after the first batch it is that batch's.
    """
    # An integer tensor would divide in float32.
    whole = batches if isinstance(batches, int) else batches.to(batch.mean.dtype)
    return exponential(running, batch, 1.0 / whole)


def moments_behind(running: Running, count: Array | int) -> Moments:
    """The Moments that running statistics stand for, if they are of `count` values: Bessel's correction undone.

    Args:
        running: mean and UNBIASED variance, (C,) each.
        count: values behind them; 0 gives the neutral element of `merge`.
    """
    if count == 0:
        return Moments(running.mean * 0, running.var * 0, 0)
    return Moments(running.mean, running.var * ((count - 1) / count), count)
