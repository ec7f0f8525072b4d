"""Layers that ask somebody before each forward of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

from batchnorm.layers.inventory import BatchNormalization

Before: TypeAlias = Callable[[str, BatchNormalization, tuple[Any, ...], dict[str, Any]], None]
"""Gets the layer's name, the layer, and the arguments of the call."""


@contextmanager
def intercepted(layers: Mapping[str, BatchNormalization], before: Before) -> Iterator[None]:
    """`before` comes ahead of each forward of `layers` inside, after all hooks, also where somebody calls `forward`.

    Not a hook: with one, torch takes another 5 to 10 us for each call, more than a small layer itself.
    """
    own = {name: vars(layer).get("forward") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            vars(layer)["forward"] = partial(_forward, before, name, layer, layer.forward)
        yield
    finally:
        for name, layer in layers.items():
            vars(layer).pop("forward", None)
            if own[name] is not None:
                vars(layer)["forward"] = own[name]


def _forward(
    before: Before, name: str, layer: BatchNormalization, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    before(name, layer, args, kwargs)
    return forward(*args, **kwargs)
