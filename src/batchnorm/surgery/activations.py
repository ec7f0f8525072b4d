"""Which modules are activations that a layer can fuse, and which module a fused activation is."""

from __future__ import annotations

import torch

from batchnorm.kernels.contract import Activation

_MODULES: dict[Activation, type[torch.nn.Module]] = {
    "relu": torch.nn.ReLU,
    "leaky_relu": torch.nn.LeakyReLU,
    "silu": torch.nn.SiLU,
    "gelu": torch.nn.GELU,
    "sigmoid": torch.nn.Sigmoid,
    "tanh": torch.nn.Tanh,
}

# timm's own classes for the same functions, for old versions of torch and for saving memory; known by name, as timm
# need not be there.
_OF_TIMM: dict[str, Activation] = {
    "Swish": "silu",
    "SwishMe": "silu",
    "GELU": "gelu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
}


def fusable(module: torch.nn.Module) -> Activation | None:
    """The name under which a layer of ours has this very function, or None.

    Only exact classes: a subclass may do something else. LeakyReLU with its default slope, GELU without approximation.

    Example:
        >>> fusable(torch.nn.ReLU(inplace=True)), fusable(torch.nn.LeakyReLU(0.2)), fusable(torch.nn.GELU())
        ('relu', None, 'gelu')
    """
    kind = type(module)
    if kind.__module__.startswith("timm."):
        return _OF_TIMM.get(kind.__name__)
    if isinstance(module, torch.nn.LeakyReLU) and module.negative_slope != 0.01:
        return None
    if isinstance(module, torch.nn.GELU) and module.approximate != "none":
        return None
    return next((name for name, known in _MODULES.items() if kind is known), None)


def activation_module(name: Activation) -> torch.nn.Module:
    """torch.nn's module for a fused activation.

    Example:
        >>> activation_module("silu")
        SiLU()
    """
    return _MODULES[name]()


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody listens to the module's calls: to leave it out would silence him."""
    return any(
        getattr(module, name)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
