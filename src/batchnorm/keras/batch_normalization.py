"""BatchNormalization: stands in for keras.layers.BatchNormalization, on every backend of Keras 3."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.errors import ArgumentError, ShapeError, StatisticsWarning
from batchnorm.keras.batch import Batch
from batchnorm.keras.framework import keras
from batchnorm.keras.layout import as_axis, channel_axes, mask_for, other_axes
from batchnorm.keras.renorm import Clipping

if keras.backend.backend() == "torch":
    from batchnorm.keras import by_torch as engine
else:
    from batchnorm.keras import by_ops as engine  # type: ignore[no-redef]

_SYNCHRONIZED = ("torch", "jax", "tensorflow")


@keras.saving.register_keras_serializable(package="batchnorm")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Batch normalization of activations of any rank, with the channels on any axis or on several.

    Training: y = (x - mean) / sqrt(variance + epsilon) * gamma + beta with the batch's mean and biased variance, which
        also move the moving statistics: moving * momentum + batch * (1 - momentum).
    Inference: with the moving statistics. With trainable=False always, as in Keras: nothing moves then.

    Arguments, weights and their order, config and defaults are those of keras.layers.BatchNormalization, of which it is
    a subclass. Where it differs on purpose: docs/keras.md. On the torch backend it runs on this library's kernels.

    Args:
        axis: the axis of the channels, or a tuple of axes: each combination of their positions is then a channel of its
            own, and the weights have the shape of those axes in ascending order.
        momentum: weight of the OLD value in the moving statistics, in [0, 1]: Keras' meaning.
        epsilon: added to the variance; unit of the input, squared.
        center: whether there is a beta.
        scale: whether there is a gamma.
        beta_initializer: of beta.
        gamma_initializer: of gamma.
        moving_mean_initializer: of the moving mean.
        moving_variance_initializer: of the moving variance.
        beta_regularizer: penalty on beta, or None.
        gamma_regularizer: penalty on gamma, or None.
        beta_constraint: on beta, or None.
        gamma_constraint: on gamma, or None.
        renorm: batch renormalization; adds the weights moving_stddev, renorm_mean and renorm_stddev.
        renorm_clipping: bounds of its correction, any of "rmin", "rmax", "dmax".
        renorm_momentum: weight of the OLD value in the statistics that the correction uses.
        synchronized: the statistics are those of all processes of torch.distributed together, or of all replicas of a
            tf.distribute strategy. On JAX they are those of all devices of a keras.distribution whether asked or not:
            there the batch is one array.
        **kwargs: of keras.layers.Layer: name, dtype, trainable, ...

    Raises:
        ArgumentError: an argument is out of its range, or synchronized=True on another backend.

    Example:
        >>> inputs = keras.Input((20,))
        >>> x = keras.layers.Dense(64, activation="relu")(inputs)
        >>> x = BatchNormalization()(x)
        >>> model = keras.Model(inputs, keras.layers.Dense(3)(x))
        >>> [weight.name for weight in model.layers[2].weights]
        ['gamma', 'beta', 'moving_mean', 'moving_variance']

    Source: Ioffe & Szegedy 2015, Alg. 1; Keras 3, keras.layers.BatchNormalization (arguments and conventions).
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, weight in (("momentum", momentum), ("renorm_momentum", renorm_momentum)):
            if not 0 <= weight <= 1:
                raise ArgumentError(f"{name} weights the old value and must be in [0, 1], got {weight}.")
        if not epsilon >= 0:
            raise ArgumentError(f"epsilon must be at least 0, got {epsilon}.")
        if synchronized and keras.backend.backend() not in _SYNCHRONIZED:
            raise ArgumentError(
                f"synchronized=True works on the backends {', '.join(_SYNCHRONIZED)}, and this is "
                f"{keras.backend.backend()}: choose one with KERAS_BACKEND, or use keras.layers.BatchNormalization."
            )
        # Axis, synchronized and renormalization are ours: Keras' own know less, or came with its later versions.
        super().__init__(
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            **kwargs,
        )
        self.axis = as_axis(axis)
        self.synchronized = synchronized
        self.renorm = renorm
        self.renorm_clipping = None if renorm_clipping is None else dict(renorm_clipping)
        self.renorm_momentum = float(renorm_momentum)
        self._clipping = Clipping.of(renorm_clipping)
        self._has_warned = False

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Makes the weights, shape of the channel axes.

        Raises:
            ShapeError: there is no such axis, or its size is not known.
        """
        axes = channel_axes(self.axis, input_shape)
        shape = tuple(input_shape[one] for one in axes)
        if None in shape:
            raise ShapeError(
                f"the channels are on axis {self.axis}, whose size must be known; got an input of shape "
                f"{tuple(input_shape)}. Give keras.Input that size, or choose another axis."
            )
        if self.scale:
            self.gamma = self._parameter("gamma", shape)
        if self.center:
            self.beta = self._parameter("beta", shape)
        self.moving_mean = self._statistic("moving_mean", shape, self.moving_mean_initializer)
        self.moving_variance = self._statistic("moving_variance", shape, self.moving_variance_initializer)
        if self.renorm:
            self.moving_stddev = self._statistic("moving_stddev", shape, self._root_of_variance)
            self.renorm_mean = self._statistic("renorm_mean", shape, _again(self.moving_mean_initializer))
            self.renorm_stddev = self._statistic("renorm_stddev", shape, self._root_of_variance)
        self.input_spec = keras.InputSpec(ndim=len(input_shape), axes=dict(zip(axes, shape, strict=True)))
        self._reduction_axes = list(other_axes(len(input_shape), axes))

    def _parameter(self, name: str, shape: tuple[Any, ...]) -> Any:
        return self.add_weight(
            shape=shape,
            name=name,
            initializer=getattr(self, f"{name}_initializer"),
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=getattr(self, f"{name}_constraint"),
            trainable=True,
            autocast=False,
        )

    def _statistic(self, name: str, shape: tuple[Any, ...], initializer: Any) -> Any:
        # In half precision a moving average stalls: a step is below the precision of the value.
        dtype = "float32" if self.variable_dtype in ("float16", "bfloat16") else self.variable_dtype
        return self.add_weight(
            shape=shape, name=name, initializer=initializer, dtype=dtype, trainable=False, autocast=False
        )

    def _root_of_variance(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        return keras.ops.sqrt(_again(self.moving_variance_initializer)(shape, dtype=dtype))

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Sequence[int | None]:
        """That of the input."""
        channel_axes(self.axis, input_shape)
        return input_shape

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalises.

        Args:
            inputs: any rank, the channels on `axis`; integers are read as float32.
            training: whether with the batch's statistics; nothing is as False, unless fit() asks.
            mask: True = counts in the statistics; the input's shape without its channel axes, or the first axes of
                that, as Keras' masks are (batch, time). NaN and infinity where it is False are read as 0.

        Returns:
            Shape of the inputs, the layer's compute dtype.

        Raises:
            ShapeError: one value a channel in training, or a mask that does not fit.
        """
        x = keras.ops.convert_to_tensor(inputs)
        if not keras.backend.is_float_dtype(x.dtype):
            x = keras.ops.cast(x, "float32")
        axes = channel_axes(self.axis, x.shape)
        aligned = None if mask is None else mask_for(mask, x, axes)
        gamma, beta = (None if weight is None else keras.ops.convert_to_tensor(weight) for weight in self._affine())
        if training and self.trainable:
            y, batch = engine.by_batch(
                x,
                gamma,
                beta,
                epsilon=self.epsilon,
                axes=axes,
                mask=aligned,
                correction=self._renormalised if self.renorm else None,
                ranks=engine.ranks_for(self.name) if self.synchronized else None,
            )
            self._follow(batch)
        else:
            mean, variance = (keras.ops.convert_to_tensor(one) for one in (self.moving_mean, self.moving_variance))
            y = engine.by_statistics(x, mean, variance, gamma, beta, epsilon=self.epsilon, axes=axes, mask=aligned)
        return keras.ops.cast(y, self.compute_dtype)

    def _affine(self) -> tuple[Any, Any]:
        return (self.gamma if self.scale else None), (self.beta if self.center else None)

    def _renormalised(self, batch: Batch) -> tuple[Any, Any]:
        """gamma and beta with the correction in them."""
        mean, stddev = (keras.ops.cast(one, batch.mean.dtype) for one in (self.renorm_mean, self.renorm_stddev))
        r, d = self._clipping.correction(batch, mean, stddev, self.epsilon)
        gamma, beta = (
            None if weight is None else keras.ops.cast(weight, batch.mean.dtype) for weight in self._affine()
        )
        if gamma is not None:
            r, d = r * gamma, d * gamma
        return r, d if beta is None else d + beta

    def _follow(self, batch: Batch) -> None:
        """Takes a batch into the moving statistics: the one place in which the layer's state changes.

        They stay as they are where the batch has no value, or where its mean or variance is not finite.
        """
        if (isinstance(batch.count, int) and batch.count == 0) or engine.is_recomputed():
            return
        ops = keras.ops
        is_usable = ops.all(ops.isfinite(batch.mean + batch.variance))
        if not isinstance(batch.count, int):
            # Of one value, which a backend that traces cannot refuse, there is no variance.
            is_usable = ops.logical_and(is_usable, batch.count > 1)
        if engine.can_read(is_usable) and not bool(is_usable):
            self._warn(batch)
            return
        self._move(self.moving_mean, batch.mean, self.momentum, is_usable)
        if not self.renorm:
            self._move(self.moving_variance, batch.variance, self.momentum, is_usable)
            return
        stddev = ops.sqrt(batch.variance + self.epsilon)
        self._move(self.renorm_mean, batch.mean, self.renorm_momentum, is_usable)
        self._move(self.renorm_stddev, stddev, self.renorm_momentum, is_usable)
        moved = self._move(self.moving_stddev, stddev, self.momentum, is_usable)
        # Momentum 0 puts the new value there: what is averaged is the deviation, and the variance follows from it.
        self._move(self.moving_variance, ops.relu(moved * moved - self.epsilon), 0.0, is_usable)

    def _move(self, statistic: Any, value: Any, momentum: float, is_usable: Any) -> Any:
        """Moves a statistic towards `value`, and gives where it is then."""
        old = keras.ops.cast(statistic, value.dtype)
        new = keras.ops.where(is_usable, old + (1.0 - momentum) * (value - old), old)
        statistic.assign(new)
        return new

    def _warn(self, batch: Batch) -> None:
        """Says, once for each layer, that a batch was left out; a batch without a value needs no words."""
        if self._has_warned or not bool(batch.count > 0):
            return
        self._has_warned = True
        warnings.warn(
            f"BatchNormalization {self.name!r} met a batch whose mean or variance is not finite (NaN or infinity in "
            "its input): the moving statistics stay as they were. This is said once for each layer.",
            StatisticsWarning,
            stacklevel=3,
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments, for JSON; a tuple axis as a list."""
        config: dict[str, Any] = super().get_config()
        config["axis"] = self.axis if isinstance(self.axis, int) else list(self.axis)
        config["synchronized"] = self.synchronized
        if self.renorm or "renorm" in config:  # earlier versions of Keras, which may load this, do not know it
            config["renorm"] = self.renorm
            config["renorm_clipping"] = None if self.renorm_clipping is None else dict(self.renorm_clipping)
            config["renorm_momentum"] = self.renorm_momentum
        return config


def _again(initializer: Any) -> Any:
    """A copy, so that a random one does not give the same numbers twice."""
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    return type(initializer).from_config(initializer.get_config())
