"""The one walker over a model: where modules are, how another one takes a place, and how a module becomes another."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from batchnorm.errors import ArgumentError


class Place(NamedTuple):
    """A module of a model and every name that leads to it."""

    names: tuple[str, ...]
    """Qualified names as in `named_modules`, in its order; "" is the model itself. More than one: it is shared."""
    module: torch.nn.Module

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]


def places(model: torch.nn.Module, is_meant: Callable[[torch.nn.Module], bool]) -> list[Place]:
    """The modules of `model` for which `is_meant` says yes, the model itself included; a shared one once.

    Args:
        model: the network.
        is_meant: asked once for each module.

    Returns:
        Places in the order of `named_modules`. What lies inside of a module that is meant is looked at, too.

    Raises:
        ArgumentError: model is no torch.nn.Module.

    Example:
        >>> shared = torch.nn.ReLU()
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), shared, shared)
        >>> [place.names for place in places(model, lambda module: isinstance(module, torch.nn.ReLU))]
        [('1', '2')]
    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    names: dict[torch.nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return [Place(tuple(names[module]), module) for module in names if is_meant(module)]


def put(model: torch.nn.Module, place: Place, new: torch.nn.Module) -> torch.nn.Module:
    """Puts `new` wherever the module of `place` stands, in place.

    Returns:
        The model; `new` itself where the place is the model.
    """
    for name in place.names:
        if name:
            parent, _, own = name.rpartition(".")
            holder = model.get_submodule(parent)
            # Straight into the table: setattr would run what a parent's own __setattr__ does to new members.
            holder._modules[own] = new
    return new if "" in place.names else model


def become(module: torch.nn.Module, new: torch.nn.Module) -> None:
    """Makes `module` what `new` is, class and state, while it stays the same object; `new` must not be used afterwards.

    So whoever holds on to the module (lists beside the tree, wrappers, a compiler) holds the new one, and there is no
    name under which it has to be put.
    """
    state = new.__dict__
    object.__setattr__(module, "__class__", type(new))
    object.__setattr__(module, "__dict__", state)
