"""Batch normalization in Keras 3: keras.layers.BatchNormalization, and this library's, which is a subclass of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.surgery.porting.layer import Array, Numbers, PortableLayer, Rule, others_counted, turned

_OURS = "batchnorm.keras.batch_normalization"


class KerasLayer:
    """A BatchNormalization."""

    rule: Rule = "biased"

    def __init__(self, name: str, layer: Any) -> None:
        self.name, self.layer = name, layer
        package = "batchnorm" if type(layer).__module__ == _OURS else "Keras"
        self.kind = f"{package} {type(layer).__name__}"
        self.axis: tuple[int, ...] = layer.axis if isinstance(layer.axis, tuple) else (int(layer.axis),)
        self.ranks: tuple[int, ...] | None = (layer.input_spec.ndim,) if layer.built else None
        self.only_inference = "" if layer.trainable else "trainable=False"
        if layer.synchronized:
            self.only_inference = "synchronized: training needs the other processes"

    def obstacle(self) -> str:
        """Why it has no counterpart elsewhere, or ""."""
        layer = self.layer
        if not layer.built:
            return "it has no weights yet: build the model, or call it once"
        if type(layer) is not _keras().layers.BatchNormalization and type(layer).__module__ != _OURS:
            return "it is a subclass, whose behaviour is not known here"
        if getattr(layer, "renorm", False):
            return "renorm=True has no counterpart in the other frameworks"
        return ""

    def numbers(self) -> Numbers:
        """What it holds now."""
        layer = self.layer
        gamma = _array(layer.gamma) if layer.scale else None
        beta = _array(layer.beta) if layer.center else None
        moving = _array(layer.moving_mean), _array(layer.moving_variance)
        return Numbers(*moving, gamma, beta, layer.epsilon, turned(layer.momentum))

    def write(self, numbers: Numbers) -> None:
        """Puts the numbers there."""
        layer = self.layer
        layer.moving_mean.assign(numbers.mean)
        layer.moving_variance.assign(numbers.var)
        if layer.scale:
            layer.gamma.assign(np.ones_like(numbers.mean) if numbers.gamma is None else numbers.gamma)
        if layer.center:
            layer.beta.assign(np.zeros_like(numbers.mean) if numbers.beta is None else numbers.beta)
        assert numbers.momentum is not None
        layer.epsilon, layer.momentum = numbers.eps, turned(numbers.momentum)

    def twin(self, rank: int) -> PortableLayer:
        """A copy in float32 to try things on."""
        layer = self.layer
        new = type(layer).from_config({**layer.get_config(), "dtype": "float32", "trainable": True})
        shape: list[int | None] = [None] * rank
        for axis, size in zip(sorted(axis % rank for axis in self.axis), layer.moving_mean.shape, strict=True):
            shape[axis] = size
        new.build(tuple(shape))
        new.set_weights(layer.get_weights())
        return KerasLayer(self.name, new)

    def run(self, x: npt.NDArray[np.float32], *, training: bool) -> Array:
        """Output for `x`."""
        return _array(self.layer(x, training=training))


def owns(model: Any) -> bool:
    """Whether it is a layer or a model of Keras; nobody has one who has not imported Keras."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(model, keras.layers.Layer)


def layers(model: Any) -> list[PortableLayer]:
    """The batch normalization layers in the order of the model's layers, nested ones included, a shared one once."""
    normalization = _keras().layers.BatchNormalization
    return [KerasLayer(name, layer) for name, layer in _walk(model, "", set()) if isinstance(layer, normalization)]


def others(model: Any) -> dict[str, int]:
    """Layers with weights of their own that are no batch normalization."""
    normalization = _keras().layers.BatchNormalization
    own = [layer for _, layer in _walk(model, "", set()) if layer._trainable_variables]
    return others_counted([type(layer).__name__ for layer in own if not isinstance(layer, normalization)])


def refresh(model: Any) -> None:
    """The functions of fit(), evaluate() and predict() have the old epsilon and momentum compiled in."""
    for function in ("train_function", "test_function", "predict_function"):
        if getattr(model, function, None) is not None:
            setattr(model, function, None)


def _keras() -> Any:
    return sys.modules["keras"]


def _walk(layer: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Name and layer, parents first; Keras' own recursion turns the order of nested layers round."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield name, layer
    for child in layer._flatten_layers(include_self=False, recursive=False):
        yield from _walk(child, f"{name}/{child.name}" if name else child.name, seen)


def _array(value: Any) -> Array:
    values: Array = _keras().ops.convert_to_numpy(_keras().ops.convert_to_tensor(value)).astype(np.float64)
    return values
