"""One training step of a Keras layer on the backend that runs, with gradients, as NumPy arrays."""

from __future__ import annotations

from typing import NamedTuple

import keras
import numpy as np

BACKEND = keras.backend.backend()


class Step(NamedTuple):
    y: np.ndarray
    dx: np.ndarray
    gradients: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]


def array(value) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.stop_gradient(keras.ops.convert_to_tensor(value))).astype(np.float64)


def weights(layer) -> dict[str, np.ndarray]:
    return {weight.name: array(weight) for weight in layer.weights}


def step(layer, x, dy, mask=None, training=True) -> Step:
    """Calls `layer` once and takes the gradient of sum(y * dy); the layer's statistics are then those after it."""
    if not layer.built:
        layer.build(x.shape)
    y, dx, gradients = (_on_torch if BACKEND == "torch" else _on_jax)(layer, x, dy, mask, training)
    trained = {weight.name: array(g) for weight, g in zip(layer.trainable_variables, gradients, strict=True)}
    return Step(array(y), array(dx), trained, weights(layer))


def _on_torch(layer, x, dy, mask, training):
    import torch

    leaf = keras.ops.convert_to_tensor(x).clone().requires_grad_()
    y = layer(leaf, training=training, mask=mask)
    variables = [variable.value for variable in layer.trainable_variables]
    dx, *gradients = torch.autograd.grad((y * keras.ops.convert_to_tensor(dy)).sum(), [leaf, *variables])
    return y.detach(), dx, gradients


def _on_jax(layer, x, dy, mask, training):
    import jax

    def loss(trainable, x):
        y, state = layer.stateless_call(
            trainable, [v.value for v in layer.non_trainable_variables], x, training=training, mask=mask
        )
        return (y * dy).sum(), (y, state)

    trainable = [variable.value for variable in layer.trainable_variables]
    (gradients, dx), (y, state) = jax.grad(loss, argnums=(0, 1), has_aux=True)(trainable, jax.numpy.asarray(x))
    for variable, value in zip(layer.non_trainable_variables, state, strict=True):
        variable.assign(value)
    return y, dx, gradients
