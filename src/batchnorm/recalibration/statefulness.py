"""Whether a model keeps something from one forward to the next: such a one must not run two forwards in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class Watch:
    """Looks for what a forward leaves behind in the modules: attributes that it sets, lists and dicts that it fills.

    Modules of torch itself and of this library are taken for stateless in evaluation, but for their parameters and
    buffers, which torch.func.functional_call exchanges for the length of a forward. What a model keeps elsewhere, in
    global variables or deep inside of objects, is not seen.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._all = list(model.modules())
        self._modules = [one for one in self._all if not is_known(one)]
        self._before: list[Any] = []

    def begin(self) -> None:
        """Remembers how the modules are now."""
        self._before = list(self._contents())

    def has_changed(self) -> bool:
        """Whether they are otherwise than at `begin`."""
        now = list(self._contents())
        return len(now) != len(self._before) or any(
            a is not b and not (type(a) is type(b) is int and a == b) for a, b in zip(now, self._before, strict=True)
        )

    def _contents(self) -> Iterator[Any]:
        for module in self._all:
            yield from module._parameters.values()
            yield from module._buffers.values()
        for module in self._modules:
            for value in vars(module).values():
                yield value
                if isinstance(value, dict):
                    for inner in value.values():
                        yield from _itself(inner)
                elif isinstance(value, list | tuple | set):
                    for inner in value:
                        yield from _itself(inner)
                elif isinstance(value, torch.Tensor):
                    yield version_of(value)


def is_known(module: torch.nn.Module) -> bool:
    """Whether the module's class is torch's or this library's."""
    return type(module).__module__.startswith(("torch.", "batchnorm."))


def version_of(tensor: torch.Tensor) -> int | None:
    """How often the tensor was written to; None for those of inference mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


def _itself(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, torch.Tensor):
        yield version_of(value)
    elif hasattr(value, "__len__"):
        yield len(value)
