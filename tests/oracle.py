"""Batch normalization in NumPy float64, written from the paper; imports nothing of the package under test.

Ioffe & Szegedy 2015 (arXiv 1502.03167): Alg. 1 (forward), section 3 (backward), Alg. 2 (inference). Everything works on
arrays of any rank with `channels`, the tuple of channel axes; statistics have the shape of those axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import erf


@dataclass
class Result:
    """What one training step gives: output, statistics and the gradients of all that went in."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    dresidual: np.ndarray


def wide(values):
    return np.asarray(values, dtype=np.float64)


def others(ndim, channels):
    return tuple(axis for axis in range(ndim) if axis not in channels)


def spread(values, ndim, channels):
    """Statistics with the shape of the channel axes, broadcastable against the activations."""
    return np.expand_dims(wide(values), others(ndim, channels))


def whole_mask(mask, shape, channels):
    """A mask over the non-channel axes as a mask of the activations' shape."""
    if mask is None:
        return np.ones(shape, dtype=bool)
    rest = tuple(shape[axis] for axis in others(len(shape), channels))
    return np.broadcast_to(np.expand_dims(np.broadcast_to(mask, rest), channels), shape)


def moments(x, channels=(1,), mask=None):
    """Mean, biased variance and count of each channel over the positions where the mask is True."""
    x = wide(x)
    keep = whole_mask(mask, x.shape, channels)
    axes = others(x.ndim, channels)
    count = keep.sum(axis=axes)
    divisor = np.maximum(count, 1)
    mean = np.where(keep, x, 0).sum(axis=axes) / divisor
    var = np.where(keep, x - spread(mean, x.ndim, channels), 0)
    return mean, (var**2).sum(axis=axes) / divisor, count


ACTIVATIONS = {
    None: (lambda z: z, lambda z: np.ones_like(z)),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda z: np.where(z > 0, 1.0, 0.01)),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "silu": (
        lambda z: z / (1 + np.exp(-z)),
        lambda z: (1 + np.exp(-z) * (1 + z)) / (1 + np.exp(-z)) ** 2,
    ),
    "gelu": (
        lambda z: z * (1 + erf(z / np.sqrt(2))) / 2,
        lambda z: (1 + erf(z / np.sqrt(2))) / 2 + z * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi),
    ),
}
"""Name -> (function, derivative)."""


def normalise(x, mean, var, weight=None, bias=None, *, eps=1e-5, channels=(1,), activation=None, residual=None):
    """Inference, Alg. 2 line 11: with given statistics; the variance is taken as it is."""
    x = wide(x)

    def on(values):
        return spread(values, x.ndim, channels)

    z = (x - on(mean)) / np.sqrt(on(var) + eps)
    z = z if weight is None else z * on(weight)
    z = z if bias is None else z + on(bias)
    z = z if residual is None else z + wide(residual)
    return ACTIVATIONS[activation][0](z)


def train(
    x, dy, weight=None, bias=None, *, eps=1e-5, channels=(1,), mask=None, activation=None, residual=None, given=None
):
    """Alg. 1 and its backward. With `given` = (mean, var) those are constants instead, as at inference.

    Through mean and variance, with s = sqrt(var + eps) and m values behind a channel:
    dx = gamma / (m s) * (m dz - sum(dz) - x_hat sum(dz x_hat)), the two sums only where the mask is True: mean and
    variance do not depend on what it leaves out, whose own output depends on them all the same.
    """
    x, dy = wide(x), wide(dy)
    axes = others(x.ndim, channels)

    def on(values):
        return spread(values, x.ndim, channels)

    keep = whole_mask(mask, x.shape, channels)
    mean, var, count = moments(x, channels, mask)
    if given is not None:
        mean, var = (wide(g) for g in given)
    gamma = np.ones_like(mean) if weight is None else wide(weight)
    s = np.sqrt(var + eps)
    x_hat = (x - on(mean)) / on(s)
    z = on(gamma) * x_hat
    z = z if bias is None else z + on(bias)
    z = z if residual is None else z + wide(residual)
    function, derivative = ACTIVATIONS[activation]
    dz = dy * derivative(z)
    dbias, dweight = dz.sum(axis=axes), (dz * x_hat).sum(axis=axes)
    dx = on(gamma / s) * dz
    if given is None:
        m = on(np.maximum(count, 1))
        dx = dx - np.where(keep, on(gamma / s) / m * (on(dbias) + x_hat * on(dweight)), 0)
    return Result(function(z), mean, var, count, dx, dweight, dbias, dz)


def unbiased(var, count):
    return var * count / (count - 1)


def running(batches, momentum=0.1):
    """Running mean and variance as PyTorch defines them, after the batches' (mean, biased var, count), from 0 and 1."""
    mean, var = np.zeros_like(batches[0][0]), np.ones_like(batches[0][1])
    for step, (mu, v, count) in enumerate(batches, start=1):
        rate = 1 / step if momentum is None else momentum
        mean = (1 - rate) * mean + rate * mu
        var = (1 - rate) * var + rate * unbiased(v, count)
    return mean, var


def algorithm_2(batches):
    """E[x] = mean of mu_B, Var[x] = m / (m - 1) * mean of var_B (all batches of one size m)."""
    mean = np.mean([mu for mu, _, _ in batches], axis=0)
    m = batches[0][2]
    return mean, m / (m - 1) * np.mean([v for _, v, _ in batches], axis=0)
