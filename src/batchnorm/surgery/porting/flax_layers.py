"""Batch normalization in Flax NNX: nnx.BatchNorm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.surgery.porting.layer import Array, Numbers, PortableLayer, Rule, others_counted, turned


class FlaxLayer:
    """An nnx.BatchNorm."""

    rule: Rule = "biased"
    ranks: tuple[int, ...] | None = None

    def __init__(self, name: str, layer: Any) -> None:
        self.name, self.layer = name, layer
        self.kind = f"Flax {type(layer).__name__}"
        self.axis: tuple[int, ...] = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
        self.only_inference = ""
        if layer.axis_name is not None:
            self.only_inference = f"synchronized: training needs the axis {layer.axis_name!r} of devices"

    def obstacle(self) -> str:
        """Why it has no counterpart elsewhere, or ""."""
        return "" if type(self.layer) is _nnx().BatchNorm else "it is a subclass, whose behaviour is not known here"

    def numbers(self) -> Numbers:
        """What it holds now."""
        layer = self.layer
        gamma, beta = (None if one is None else _array(one[...]) for one in (layer.scale, layer.bias))
        moving = _array(layer.mean[...]), _array(layer.var[...])
        return Numbers(*moving, gamma, beta, float(layer.epsilon), turned(float(layer.momentum)))

    def write(self, numbers: Numbers) -> None:
        """Puts the numbers there."""
        layer = self.layer
        for variable, values in (
            (layer.mean, numbers.mean),
            (layer.var, numbers.var),
            (layer.scale, np.ones_like(numbers.mean) if numbers.gamma is None else numbers.gamma),
            (layer.bias, np.zeros_like(numbers.mean) if numbers.beta is None else numbers.beta),
        ):
            if variable is not None:
                variable[...] = values.astype(variable[...].dtype)
        assert numbers.momentum is not None
        layer.epsilon, layer.momentum = numbers.eps, turned(numbers.momentum)

    def twin(self, rank: int) -> PortableLayer:
        """A copy in float32 to try things on."""
        layer = _nnx().clone(self.layer)
        layer.dtype = np.dtype(np.float32)
        return FlaxLayer(self.name, layer)

    def run(self, x: npt.NDArray[np.float32], *, training: bool) -> Array:
        """Output for `x`."""
        return _array(self.layer(x, use_running_average=not training))


def owns(model: Any) -> bool:
    """Whether it is a module of Flax NNX; nobody has one who has not imported it."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def layers(model: Any) -> list[PortableLayer]:
    """The batch normalization layers in the order of definition, a shared one once."""
    return [FlaxLayer(name, node) for name, node in _walk(model, "", set()) if isinstance(node, _nnx().BatchNorm)]


def others(model: Any) -> dict[str, int]:
    """Modules with parameters of their own that are no batch normalization."""
    nnx = _nnx()
    kinds = [node for _, node in _walk(model, "", set()) if any(isinstance(v, nnx.Param) for v in vars(node).values())]
    return others_counted([type(node).__name__ for node in kinds if not isinstance(node, nnx.BatchNorm)])


def refresh(model: Any) -> None:
    """Nothing: nnx.jit looks at a module's settings itself."""


def _nnx() -> Any:
    return sys.modules["flax.nnx"]


def _walk(node: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Name and module, parents first; nnx.iter_modules goes by the alphabet, where bn10 stands before bn2."""
    if id(node) in seen:
        return
    seen.add(id(node))
    yield name, node
    children = dict(_nnx().iter_children(node))
    order = [*(key for key in vars(node) if key in children), *(key for key in children if key not in vars(node))]
    for key in order:
        if not isinstance(children[key], _nnx().Variable):
            yield from _walk(children[key], f"{name}.{key}" if name else str(key), seen)


def _array(value: Any) -> Array:
    values: Array = np.asarray(value).astype(np.float64)
    return values
