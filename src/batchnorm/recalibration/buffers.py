"""The running statistics of a layer of any kind: read, written, and as a new layer has them."""

from __future__ import annotations

from typing import cast

import torch

from batchnorm.layers.decorrelated import DecorrelatedBatchNorm
from batchnorm.layers.inventory import BatchNormalization
from batchnorm.stats.running import Running


def write(layer: BatchNormalization, statistics: Running) -> None:
    """Puts statistics into the buffers of a layer, in place."""
    mean, spread = _buffers(layer)
    mean.copy_(statistics.mean.reshape(mean.shape))
    spread.copy_(statistics.var)


def initial(layer: BatchNormalization) -> Running:
    """Statistics as a new layer has them, in the shapes of what `input_moments` gives: mean 0, and variance 1."""
    mean, spread = (torch.zeros_like(one, dtype=torch.float64, device="cpu") for one in _buffers(layer))
    if isinstance(layer, DecorrelatedBatchNorm):
        return Running(mean.view(*spread.shape[:2], 1), spread + torch.eye(spread.shape[-1], dtype=spread.dtype))
    return Running(mean, spread + 1)


def by_channel(layer: BatchNormalization, statistics: Running | None = None) -> Running:
    """Mean and variance of each channel, copied: of the layer now, or of `statistics` for it."""
    mean, spread = _buffers(layer) if statistics is None else statistics
    if isinstance(layer, DecorrelatedBatchNorm):
        return Running(mean.reshape(-1).clone(), spread.diagonal(dim1=-2, dim2=-1).reshape(-1).clone())
    return Running(mean.clone(), spread.clone())


def _buffers(layer: BatchNormalization) -> tuple[torch.Tensor, torch.Tensor]:
    spread = layer.running_covariance if isinstance(layer, DecorrelatedBatchNorm) else layer.running_var
    return cast(torch.Tensor, layer.running_mean), cast(torch.Tensor, spread)
