"""Which batch normalization layers a model has, which of them are meant, and which are frozen."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeAlias, TypeVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError
from batchnorm.layers.decorrelated import DecorrelatedBatchNorm

BatchNormalization: TypeAlias = _BatchNorm | DecorrelatedBatchNorm
"""A layer that keeps running statistics of its batches."""

Layers: TypeAlias = "Iterable[str | torch.nn.Module] | str | torch.nn.Module | None"
"""Layers, or modules that contain layers, by name or as they are; None means all."""


def batch_norm_layers(model: torch.nn.Module) -> dict[str, BatchNormalization]:
    """The batch normalization layers of `model`, torch.nn's and ours: name -> layer, each once even where it is reused.

    Raises:
        ArgumentError: model is no torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    return {name: module for name, module in model.named_modules() if isinstance(module, BatchNormalization)}


def select(model: torch.nn.Module, layers: Layers = None) -> dict[str, BatchNormalization]:
    """The batch normalization layers that `layers` means, in the model's order; each in it must mean at least one.

    Raises:
        ArgumentError: the model has no such layer at all, or a name or a module of `layers` means none.
    """
    found = batch_norm_layers(model)
    if not found:
        raise ArgumentError(f"{type(model).__name__} has no batch normalization layer (torch.nn's or batchnorm's).")
    return chosen_of(found, layers)


_Module = TypeVar("_Module", bound=torch.nn.Module)


def chosen_of(found: dict[str, _Module], layers: Layers) -> dict[str, _Module]:
    """Those of `found`, name -> layer of the model, that `layers` means, in their order; each must mean at least one.

    Raises:
        ArgumentError: a name or a module of `layers` means none.
    """
    if layers is None:
        return found
    if not isinstance(layers, Iterable | torch.nn.Module):
        raise ArgumentError(f"layers must be names or modules, or None for all; got {layers!r}.")
    chosen: set[str] = set()
    for one in [layers] if isinstance(layers, str | torch.nn.Module) else layers:
        meant = _names(one, found)
        if not meant:
            what = f"{one!r}" if isinstance(one, str) else f"the given {type(one).__name__}"
            close = difflib.get_close_matches(one, found, n=3) if isinstance(one, str) else []
            hint = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(list(found)[:8])}, ..."
            raise ArgumentError(f"layers: {what} is or contains no batch normalization layer of the model; {hint}")
        chosen |= meant
    return {name: layer for name, layer in found.items() if name in chosen}


def is_frozen(layer: torch.nn.Module) -> bool:
    """Whether `freeze` holds this layer."""
    return bool(getattr(layer, "is_frozen", False))


def has_statistics(layer: BatchNormalization) -> bool:
    """Whether the layer keeps running statistics."""
    if isinstance(layer, DecorrelatedBatchNorm):
        return layer.running_mean is not None
    return layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None


def _names(one: str | torch.nn.Module, found: dict[str, Any]) -> set[str]:
    if isinstance(one, str):
        return {name for name in found if one in ("", name) or name.startswith(f"{one}.")}
    inside = set(one.modules())
    return {name for name, layer in found.items() if layer in inside}
