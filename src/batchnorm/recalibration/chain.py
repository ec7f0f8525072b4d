"""A model that is a chain of modules: its forward can wait between two of them, and no stack has to wait with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.nn.modules.module import _has_any_global_hook

from batchnorm.layers.inventory import BatchNormalization
from batchnorm.recalibration.interception import Before
from batchnorm.recalibration.statefulness import is_known


class Stretch(NamedTuple):
    """What runs without a stop: a layer and all modules up to the next one; the first begins with the model's input."""

    name: str
    """Of the layer; "" for the first stretch."""
    modules: list[torch.nn.Module]


def stretches_of(model: torch.nn.Module, layers: Mapping[str, BatchNormalization]) -> list[Stretch] | None:
    """The stretches of a torch.nn.Sequential, those within it resolved; None where the model is more than a chain.

    That is so where `layers` are in other modules, and where code of somebody else's runs: who knows what it keeps or
    switches on between two modules.

    Args:
        model: any module.
        layers: name -> layer.
    """
    if _has_any_global_hook() or not all(map(_runs_by_itself, model.modules())):  # type: ignore[no-untyped-call]
        return None
    names = {layer: name for name, layer in layers.items()}
    found = [Stretch("", [])]
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in names:
            found.append(Stretch(names[module], [module]))
        elif not any(inner in names for inner in module.modules()):
            found[-1].modules.append(module)
        elif type(module) is torch.nn.Sequential:
            waiting += reversed(module)
        else:
            return None
    return found


class Steps:
    """A forward through the stretches, from layer to layer; to be used as `Held` is.

    Args:
        stretches: of the model.
        x: the model's input.
        before: called ahead of each layer, where the forward then waits.
    """

    has_left_modes = False

    def __init__(self, stretches: Sequence[Stretch], x: Any, before: Before) -> None:
        self._stretches = stretches
        self._x = x
        self._before = before
        self._next = 0

    def resume(self) -> None:
        """Runs to the next layer, or to the end; raises what the modules raise."""
        x, self._x = self._x, None
        for module in self._stretches[self._next].modules:
            x = module(x)
        self._next += 1
        if self._next < len(self._stretches):
            self._x = x
            name, modules = self._stretches[self._next]
            self._before(name, cast(BatchNormalization, modules[0]), (x,), {})

    def stop(self) -> None:
        """Nothing: `resume` comes to its end."""

    def is_running(self) -> bool:
        """Whether the caller is the forward itself: always, as it has no threads."""
        return True

    def drop(self) -> None:
        """Forgets where it stands."""
        self._x = None


def _runs_by_itself(module: torch.nn.Module) -> bool:
    """Whether a call of the module is what its class, one of torch's or ours, does."""
    return (
        is_known(module) and "forward" not in vars(module) and not (module._forward_hooks or module._forward_pre_hooks)
    )
