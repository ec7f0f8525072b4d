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


def step(layer, x, dy, mask=None, training=True, *, compiled=False) -> Step:
    """Calls `layer` once and takes the gradient of sum(y * dy); the layer's statistics are then those after it.

    Args:
        layer: of Keras, or ours.
        x: input.
        dy: shape of the output.
        mask: of the call.
        training: of the call.
        compiled: JAX compiles the step as one, which is quicker for a shape that comes once: else each operation.
    """
    if not layer.built:
        layer.build(x.shape)
    if BACKEND == "torch":
        y, dx, gradients = _on_torch(layer, x, dy, mask, training)
    else:
        y, dx, gradients = _on_jax(layer, x, dy, mask, training, compiled)
    trained = {weight.name: array(g) for weight, g in zip(layer.trainable_variables, gradients, strict=True)}
    return Step(array(y), array(dx), trained, weights(layer))


def _on_torch(layer, x, dy, mask, training):
    import torch

    leaf = keras.ops.convert_to_tensor(x).clone().requires_grad_()
    y = layer(leaf, training=training, mask=mask)
    variables = [variable.value for variable in layer.trainable_variables]
    dx, *gradients = torch.autograd.grad((y * keras.ops.convert_to_tensor(dy)).sum(), [leaf, *variables])
    return y.detach(), dx, gradients


def _on_jax(layer, x, dy, mask, training, compiled):
    import jax

    def loss(trainable, x, others, dy, mask):
        y, state = layer.stateless_call(trainable, others, x, training=training, mask=mask)
        return (y * dy).sum(), (y, state)

    trainable, others = ([v.value for v in ones] for ones in (layer.trainable_variables, layer.non_trainable_variables))
    run = jax.grad(loss, argnums=(0, 1), has_aux=True)
    if compiled:
        run = jax.jit(run)
    (gradients, dx), (y, state) = run(trainable, jax.numpy.asarray(x), others, dy, mask)
    for variable, value in zip(layer.non_trainable_variables, state, strict=True):
        variable.assign(value)
    return y, dx, gradients
