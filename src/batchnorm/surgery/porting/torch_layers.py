"""Batch normalization in PyTorch: torch.nn's layers and this library's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.modules.batchnorm import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d, _BatchNorm
from torch.nn.utils import parametrize

from batchnorm.layers.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.layers.inventory import is_frozen
from batchnorm.layers.sync import SyncBatchNorm
from batchnorm.surgery.porting.layer import Array, Numbers, PortableLayer, Rule, others_counted
from batchnorm.surgery.replace import places

_RANKS = {torch.nn.BatchNorm1d: (2, 3), torch.nn.BatchNorm2d: (4,), torch.nn.BatchNorm3d: (5,)}
_LAZY = (LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d)
_SYNCHRONIZED = (torch.nn.SyncBatchNorm, SyncBatchNorm)
_KNOWN = (*_RANKS, torch.nn.SyncBatchNorm, BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class TorchLayer:
    """A `_BatchNorm`."""

    rule: Rule = "unbiased"

    def __init__(self, name: str, layer: _BatchNorm) -> None:
        self.name, self.layer = name, layer
        # freeze() puts a class of the same name over the layer's own.
        self._class = type(layer).__bases__[1] if is_frozen(layer) else type(layer)
        self.kind = f"torch {self._class.__name__}"
        axis = getattr(layer, "channel_axis", 1)
        self.axis: tuple[int, ...] = axis if isinstance(axis, tuple) else (axis,)
        self.ranks = next((ranks for known, ranks in _RANKS.items() if isinstance(layer, known)), None)
        self.only_inference = ""
        if is_frozen(layer):
            self.only_inference = "frozen"
        elif isinstance(layer, _SYNCHRONIZED):
            self.only_inference = "synchronized: training needs the other processes"

    def obstacle(self) -> str:
        """Why it has no counterpart elsewhere, or ""."""
        layer = self.layer
        if isinstance(layer, _LAZY):
            return "it has no shape yet: call the model once"
        if parametrize.is_parametrized(layer):
            return "its parameters are parametrized: torch.nn.utils.parametrize.remove_parametrizations first"
        if self._class not in _KNOWN:
            return "its training is not plain batch normalization, which the other frameworks have"
        if layer.running_mean is None or layer.running_var is None:
            return "it keeps no running statistics (track_running_stats=False)"
        if getattr(layer, "activation", None) is not None:
            return f"the activation that is fused into it, {layer.activation}, would be lost: take it out first"
        return ""

    def numbers(self) -> Numbers:
        """What it holds now."""
        layer = self.layer
        mean, var = _array(layer.running_mean), _array(layer.running_var)
        gamma = None if layer.weight is None else _array(layer.weight)
        beta = None if layer.bias is None else _array(layer.bias)
        return Numbers(mean, var, gamma, beta, layer.eps, layer.momentum)

    def write(self, numbers: Numbers) -> None:
        """Puts the numbers there."""
        layer = self.layer
        with torch.no_grad():
            for tensor, values in (
                (layer.running_mean, numbers.mean),
                (layer.running_var, numbers.var),
                (layer.weight, np.ones_like(numbers.mean) if numbers.gamma is None else numbers.gamma),
                (layer.bias, np.zeros_like(numbers.mean) if numbers.beta is None else numbers.beta),
            ):
                if tensor is not None:
                    tensor.copy_(torch.from_numpy(values))
        layer.eps, layer.momentum = numbers.eps, numbers.momentum

    def twin(self, rank: int) -> PortableLayer:
        """A copy in float32 to try things on."""
        layer = copy.deepcopy(self.layer).float().cpu()
        for hooks in _HOOKS:
            getattr(layer, hooks).clear()
        if isinstance(layer, BatchNorm):
            layer._stage = None  # a transaction waits for batches, and this one is a trial
        return TorchLayer(self.name, layer)

    def run(self, x: npt.NDArray[np.float32], *, training: bool) -> Array:
        """Output for `x`."""
        if not is_frozen(self.layer):
            self.layer.train(training)
        with torch.no_grad():
            return _array(self.layer(torch.from_numpy(x)))


def owns(model: Any) -> bool:
    """Whether it is a torch.nn.Module. On the torch backend a Keras model is one, too: Keras is asked first."""
    return isinstance(model, torch.nn.Module)


def layers(model: torch.nn.Module) -> list[PortableLayer]:
    """The batch normalization layers in the order of definition, a shared one once."""
    found = places(model, lambda module: isinstance(module, _BatchNorm))
    return [TorchLayer(place.name, place.module) for place in found]  # type: ignore[arg-type]


def others(model: torch.nn.Module) -> dict[str, int]:
    """Modules with parameters of their own that are no batch normalization."""
    kinds = [m for m in model.modules() if not isinstance(m, _BatchNorm) and list(m.parameters(recurse=False))]
    return others_counted([type(module).__name__ for module in kinds])


def refresh(model: torch.nn.Module) -> None:
    """Nothing: torch.compile looks at a layer's numbers itself."""


def _array(tensor: torch.Tensor | None) -> Array:
    assert tensor is not None
    values: Array = tensor.detach().to("cpu", torch.float64).numpy().copy()
    return values
