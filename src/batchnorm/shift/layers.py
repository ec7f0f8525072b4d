"""Layers of a network as part of a Reference: running statistics, or what enters each layer when data go through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.layers.decorrelated import DecorrelatedBatchNorm
from batchnorm.layers.inventory import BatchNormalization, batch_norm_layers, has_statistics
from batchnorm.layers.observe import input_moments
from batchnorm.shift.layer import Layer
from batchnorm.stats.moments import Moments

Forward: TypeAlias = Callable[[torch.nn.Module, Any], object]
"""forward(model, batch) runs the model on a batch."""


def running(model: torch.nn.Module) -> dict[str, Layer]:
    """The running statistics of the model's batch normalization layers, as a checkpoint has them; they have no count.

    Raises:
        ArgumentError: there are none.

    Example:
        >>> import torch
        >>> layer = running(torch.nn.Sequential(torch.nn.BatchNorm1d(2)))["0"]
        >>> layer.mean.tolist(), layer.var.tolist(), layer.count
        ([0.0, 0.0], [1.0, 1.0], None)
    """
    found = {
        name: Layer(_numpy(layer.running_mean), _variances(layer), None, layer.eps)
        for name, layer in batch_norm_layers(model).items()
        if has_statistics(layer)
    }
    if not found:
        raise ArgumentError(f"{type(model).__name__} has no batch normalization layer with running statistics")
    return found


def measured(model: torch.nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> dict[str, Layer]:
    """Moments of what enters each batch normalization layer in evaluation mode, over all batches, exactly.

    The model's modes are put back, and its statistics are not touched.

    Args:
        model: with layers of torch.nn or ours.
        batches: what `forward` takes, each.
        forward: None calls model(batch).

    Raises:
        ArgumentError: the model has no such layer, or no batch came.
        BatchNormError: a value that enters a layer is not finite.
    """
    layers = {name: layer for name, layer in batch_norm_layers(model).items() if hasattr(layer, "running_mean")}
    if not layers:
        raise ArgumentError(f"{type(model).__name__} has no batch normalization layer")
    found: dict[str, Moments] = {}
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with ExitStack() as hooks, torch.no_grad():
            for name, layer in layers.items():
                handle = layer.register_forward_pre_hook(partial(_take, found, name), with_kwargs=True)
                hooks.callback(handle.remove)
            for batch in batches:
                forward(model, batch) if forward else model(batch)
    finally:
        for module, training in modes.items():
            module.training = training
    if not found:
        raise ArgumentError("no batch went through a batch normalization layer: give at least one")
    return {name: _layer(name, layers[name], moments) for name, moments in found.items()}


def _take(found: dict[str, Moments], name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    part = input_moments(layer, args, kwargs)
    found[name] = found[name].merge(part) if name in found else part


def _layer(name: str, layer: BatchNormalization, moments: Moments) -> Layer:
    mean, var = _numpy(moments.mean), _numpy(moments.var)
    if not (np.isfinite(mean).all() and np.isfinite(var).all()):
        raise BatchNormError(
            f"a value that enters layer {name} is not finite: clean the data, or look at the layers before"
        )
    count = moments.count if isinstance(moments.count, int) else int(moments.count.min())
    return Layer(mean, var, count, layer.eps)


def _variances(layer: BatchNormalization) -> Any:
    if isinstance(layer, DecorrelatedBatchNorm):  # keeps a covariance matrix, whose diagonal is the channels' variance
        assert layer.running_covariance is not None
        return _numpy(torch.diagonal(layer.running_covariance, dim1=-2, dim2=-1))
    return _numpy(layer.running_var)


def _numpy(values: Any) -> Any:
    return values.detach().double().cpu().numpy().reshape(-1)
