"""Normalisation by keras.ops, for JAX, TensorFlow and NumPy; differentiated by the backend.

The mean is subtracted before anything is squared or scaled, so that nothing cancels: not E[x^2] - E[x]^2, and not
x * scale + (beta - mean * scale).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from batchnorm.keras.batch import Batch, Correction
from batchnorm.keras.framework import keras
from batchnorm.keras.layout import number_of_values, other_axes

Sum: TypeAlias = Callable[[Any], Any]
"""The sum of the replicas' tensors."""


def by_batch(
    x: Any,
    gamma: Any,
    beta: Any,
    *,
    epsilon: float,
    axes: tuple[int, ...],
    mask: Any,
    correction: Correction | None,
    ranks: Sum | None,
) -> tuple[Any, Batch]:
    """Normalises with the batch's own statistics.

    Args:
        x: float, any shape.
        gamma: shape of the channel axes, or None, which is 1.
        beta: likewise; None is 0.
        epsilon: added to the variance.
        axes: the channel axes, ascending.
        mask: as from `layout.mask_for`; None counts everything. What it leaves out may hold anything.
        correction: gives gamma and beta from the statistics, in place of those given.
        ranks: adds up over those whose batches are one batch; None is this one alone, and JAX, where a batch on all
            devices of a keras.distribution is one array.

    Returns:
        y, shape of x, float32 at least; and the statistics.

    Raises:
        ShapeError: one value a channel.
    """
    ops = keras.ops
    values = _wide(x)
    others = other_axes(len(x.shape), axes)
    if mask is None:
        keep, count = None, number_of_values(x, axes, is_whole=ranks is None)
    else:
        keep = ops.broadcast_to(ops.expand_dims(mask, axes), ops.shape(x))
        count = ops.sum(ops.cast(ops.broadcast_to(mask, [ops.shape(x)[one] for one in others]), "int32"))
        values = ops.where(ops.logical_or(keep, ops.abs(values) < _LARGEST), values, 0.0)
    if ranks is not None:
        count = ranks(ops.convert_to_tensor(count, "int32"))
    divisor = max(count, 1) if isinstance(count, int) else ops.cast(ops.maximum(count, 1), values.dtype)

    def mean_of(what: Any) -> Any:
        total = ops.sum(what if keep is None else ops.where(keep, what, 0.0), axis=others, keepdims=True)
        return (total if ranks is None else ranks(total)) / divisor

    # Shifted by a rough mean first, subtraction is exact to the rounding of the difference. The shift is a constant to
    # the gradient: nothing depends on it.
    shift = ops.stop_gradient(mean_of(values))
    centred = values - shift
    rest = mean_of(centred)
    centred = centred - rest
    variance = mean_of(ops.square(centred))
    sizes = [x.shape[one] for one in axes]
    mean, plain = (ops.stop_gradient(ops.reshape(part, sizes)) for part in (shift + rest, variance))
    batch = Batch(mean, plain, count)
    if correction is not None:
        gamma, beta = correction(batch)
    return _scaled(centred, variance, gamma, beta, epsilon, axes), batch


def by_statistics(
    x: Any, mean: Any, variance: Any, gamma: Any, beta: Any, *, epsilon: float, axes: tuple[int, ...], mask: Any
) -> Any:
    """Normalises with given statistics, shape of the channel axes; y has the shape of x, float32 at least."""
    values = _wide(x)
    if mask is not None:
        keep = keras.ops.expand_dims(mask, axes)
        values = keras.ops.where(keras.ops.logical_or(keep, keras.ops.abs(values) < _LARGEST), values, 0.0)
    mean, variance = (_spread(part, values, axes) for part in (mean, variance))
    return _scaled(values - mean, variance, gamma, beta, epsilon, axes)


def ranks_for(name: str) -> Sum | None:
    """The replicas of a tf.distribute strategy; None outside of one, and on JAX."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return None
    return lambda values: replica.all_reduce(tf.distribute.ReduceOp.SUM, values)


def is_recomputed() -> bool:
    """Never: a recomputed segment is a trace here, and assigns nothing twice."""
    return False


def can_read(value: Any) -> bool:
    """Never: a tracer may follow."""
    return False


_LARGEST = 1e18
"""What lies beyond, where a mask does not count it, is read as 0: its square would overflow float32."""


def _wide(x: Any) -> Any:
    return keras.ops.cast(x, keras.backend.result_type(x.dtype, "float32"))


def _spread(values: Any, x: Any, axes: tuple[int, ...]) -> Any:
    values = keras.ops.cast(values, x.dtype)
    return keras.ops.reshape(values, [x.shape[one] if one in axes else 1 for one in range(len(x.shape))])


def _scaled(centred: Any, variance: Any, gamma: Any, beta: Any, epsilon: float, axes: tuple[int, ...]) -> Any:
    scale = keras.ops.rsqrt(variance + epsilon)
    if gamma is not None:
        scale = scale * _spread(gamma, centred, axes)
    y = centred * scale
    return y if beta is None else y + _spread(beta, centred, axes)
