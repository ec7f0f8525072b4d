"""clone_layer(): Keras' own BatchNormalization becomes ours when a model is cloned."""

from __future__ import annotations

from typing import Any

from batchnorm.keras.batch_normalization import BatchNormalization
from batchnorm.keras.framework import keras


def clone_layer(layer: Any) -> Any:
    """A new layer with the config of `layer`: ours for keras.layers.BatchNormalization, its own class for others.

    It is the clone_function of keras.models.clone_model, which makes new weights: set_weights brings the old ones,
    whose order is the same.

    Args:
        layer: of a functional or sequential model. Subclasses of BatchNormalization are left what they are.

    Example:
        >>> layers = keras.layers.Dense(8), keras.layers.BatchNormalization(epsilon=1e-5)
        >>> old = keras.Sequential([keras.Input((4,)), *layers])
        >>> new = keras.models.clone_model(old, clone_function=clone_layer, recursive=True)
        >>> new.set_weights(old.get_weights())
        >>> type(new.layers[1]) is BatchNormalization, new.layers[1].epsilon
        (True, 1e-05)
    """
    target = BatchNormalization if type(layer) is keras.layers.BatchNormalization else type(layer)
    return target.from_config(layer.get_config())
