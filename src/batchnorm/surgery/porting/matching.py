"""Which layer of the one model becomes which of the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.errors import ArgumentError
from batchnorm.surgery.porting import flax_layers, keras_layers, torch_layers
from batchnorm.surgery.porting.layer import Framework, PortableLayer

# Keras first: on the torch backend its layers are torch modules, too.
_FRAMEWORKS: tuple[Framework, ...] = (keras_layers, flax_layers, torch_layers)


def framework_of(model: Any, what: str) -> Framework:
    """The framework of `model`, which is the `what` of the call.

    Raises:
        ArgumentError: it is of none of them.
    """
    for framework in _FRAMEWORKS:
        if framework.owns(model):
            return framework
    raise ArgumentError(
        f"{what} must be a layer or a model of PyTorch, Keras 3 or Flax NNX, got {type(model).__name__}."
    )


def pairs(
    source: Sequence[PortableLayer], target: Sequence[PortableLayer], names: Mapping[str, str] | None
) -> list[tuple[PortableLayer, PortableLayer]]:
    """The layers that belong together: as `names` says, by equal names, or else in order.

    Raises:
        ArgumentError: a name is unknown or meant twice, or the numbers of layers differ and no names are given.
    """
    if names is None:
        if len(source) != len(target):
            raise ArgumentError(
                f"source has {len(source)} batch normalization layers and target {len(target)}: say which belong "
                f"together, layers={{source name: target name}}. Source: {_listed(source)}. Target: {_listed(target)}."
            )
        there = {layer.name: layer for layer in target}
        if set(there) == {layer.name for layer in source}:
            return [(layer, there[layer.name]) for layer in source]
        return list(zip(source, target, strict=True))
    if len(set(names.values())) != len(names):
        raise ArgumentError(f"layers names a layer of the target twice: {', '.join(names.values())}.")
    return [(_named(one, source, "source"), _named(other, target, "target")) for one, other in names.items()]


def ambiguous(matched: Sequence[tuple[PortableLayer, PortableLayer]]) -> int:
    """How many of the layers have the shape of another one, so that shapes cannot show a wrong order."""
    shapes = [layer.numbers().mean.shape for layer, _ in matched]
    return sum(shapes.count(shape) > 1 for shape in shapes)


def _named(name: str, layers: Sequence[PortableLayer], what: str) -> PortableLayer:
    for layer in layers:
        if layer.name == name:
            return layer
    raise ArgumentError(f"layers: {what} has no batch normalization layer {name!r}; it has {_listed(layers)}.")


def _listed(layers: Sequence[PortableLayer]) -> str:
    shown = [layer.name or "(itself)" for layer in layers[:8]]
    return ", ".join(shown) + (", ..." if len(layers) > 8 else "") if shown else "none"
