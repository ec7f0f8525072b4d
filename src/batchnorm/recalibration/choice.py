"""Which layers recalibrate() takes, and why it leaves the others alone."""

from __future__ import annotations

import torch

from batchnorm.errors import ArgumentError
from batchnorm.layers.inventory import BatchNormalization, Layers, has_statistics, is_frozen, select
from batchnorm.recalibration.report import Skipped


def choose(model: torch.nn.Module, layers: Layers) -> tuple[dict[str, BatchNormalization], list[Skipped]]:
    """The layers to recalibrate, and those that are left alone.

    Raises:
        ArgumentError: there are no layers, `layers` names none of them or one that `freeze` holds, a layer is lazy and
            not initialised, or the model is a DataParallel with replicas.
    """
    selected = select(model, layers)
    _refuse_data_parallel(model)
    is_training = any(module.training for module in model.modules())
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    chosen: dict[str, BatchNormalization] = {}
    skipped: list[Skipped] = []
    for name, layer in selected.items():
        parameters = list(layer.parameters(recurse=False))
        if any(torch.nn.parameter.is_lazy(value) for value in (*parameters, *layer.buffers(recurse=False))):
            raise ArgumentError(f"{name} is not initialised yet: run the model once, then recalibrate.")
        if layers is not None and is_frozen(layer):
            raise ArgumentError(f"layers: {name} is frozen; unfreeze it first, or leave it out.")
        why = None
        if not has_statistics(layer):
            why = "it keeps no running statistics"
        elif is_frozen(layer):
            why = "frozen"
        elif layers is None and is_training and not layer.training:
            why = "frozen: in evaluation mode while the model trains"
        elif layers is None and is_trained and parameters and not any(one.requires_grad for one in parameters):
            why = "frozen: its parameters have requires_grad=False"
        if why is None:
            chosen[name] = layer
        else:
            skipped.append(Skipped(name, why))
    return chosen, skipped


def _refuse_data_parallel(model: torch.nn.Module) -> None:
    if any(isinstance(module, torch.nn.DataParallel) and len(module.device_ids) > 1 for module in model.modules()):
        raise ArgumentError("recalibrate cannot follow the replicas of DataParallel: pass model.module.")
