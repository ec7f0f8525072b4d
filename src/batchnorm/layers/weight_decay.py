"""parameter_groups(): which parameters an optimizer decays, and which it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.errors import ArgumentError
from batchnorm.layers.decorrelated import DecorrelatedBatchNorm

_NORMALIZATIONS = tuple(
    getattr(nn, name) for name in ("LayerNorm", "GroupNorm", "RMSNorm") if hasattr(nn, name)
)  # RMSNorm came with torch 2.4


def parameter_groups(model: nn.Module, weight_decay: float, *, decays_biases: bool = True) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: what decays, and gamma and beta of normalization layers, which do not.

    What comes before a normalization may decay (that sets its effective learning rate); decaying gamma instead shrinks
    the output, and decaying beta pulls activations towards 0.

    Args:
        model: its parameters, each once, also those that do not require gradients now (they may be unfrozen later).
        weight_decay: for the first group, at least 0.
        decays_biases: False keeps the biases of all other layers out of weight decay, too, as many recipes do.

    Returns:
        [{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]; a parameter that a
        normalization layer shares with another layer is in the second.

    Raises:
        ArgumentError: model is no module, or weight_decay is no number of at least 0.

    Source: Goyal et al. 2017 (arXiv 1706.02677), section 5.3; He et al. 2019 (arXiv 1812.01187), section 3.1.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
        >>> optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), lr=0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.0001), (2, 0.0)]
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(weight_decay, int | float) or not weight_decay >= 0:
        raise ArgumentError(f"weight_decay must be a number of at least 0, got {weight_decay!r}.")
    kept: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, (_NormBase, DecorrelatedBatchNorm, *_NORMALIZATIONS)):
            own = list(module.parameters(recurse=False))
        else:
            biases = [value for name, value in module.named_parameters(recurse=False) if name == "bias"]
            own = [] if decays_biases else biases
        kept.update((id(parameter), parameter) for parameter in own)
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in kept]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": list(kept.values()), "weight_decay": 0.0}]
