"""Normalisation by this library's own kernels, where Keras runs on torch."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist

from batchnorm.functional import batch_moments, batch_norm
from batchnorm.keras.batch import Batch, Correction
from batchnorm.keras.layout import number_of_values
from batchnorm.kernels.transforms import can_read as can_read
from batchnorm.layers.commit import is_recomputed as is_recomputed
from batchnorm.stats.distributed import Ranks
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running


def by_batch(
    x: Any,
    gamma: Any,
    beta: Any,
    *,
    epsilon: float,
    axes: tuple[int, ...],
    mask: Any,
    correction: Correction | None,
    ranks: Ranks | None,
) -> tuple[Any, Batch]:
    """As in by_ops; `ranks` are those whose batches are one batch, None is this process alone. Statistics: float64."""
    if mask is None and ranks is None:
        number_of_values(x, axes)  # an error in Keras' words
    if correction is not None:
        found = batch_moments(x, channel_axis=_axis(axes), mask=mask)
        if ranks is not None:
            with torch.no_grad():
                found = ranks.merge(found)
        gamma, beta = (value.to(_parameter_dtype(x)) for value in correction(_batch(found)))
    y, moments = batch_norm(
        x,
        _for(x, gamma),
        _for(x, beta),
        eps=epsilon,
        channel_axis=_axis(axes),
        mask=mask,
        ranks=ranks,
    )
    return y, _batch(cast(Moments, moments))


def by_statistics(
    x: Any, mean: Any, variance: Any, gamma: Any, beta: Any, *, epsilon: float, axes: tuple[int, ...], mask: Any
) -> Any:
    """As in by_ops; y has the dtype of x."""
    return batch_norm(
        x,
        _for(x, gamma),
        _for(x, beta),
        # What the kernels take as running statistics is used as it is; that Keras' variance is biased changes nothing.
        moments=Running(mean, variance),
        eps=epsilon,
        channel_axis=_axis(axes),
        mask=mask,
    )[0]


def ranks_for(name: str) -> Ranks | None:
    """All processes of torch.distributed; None without a process group, or in a group of one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD
    return Ranks(group, lambda: f"BatchNormalization {name!r}") if dist.get_world_size(group) > 1 else None


def _axis(axes: tuple[int, ...]) -> int | tuple[int, ...]:
    return axes if len(axes) > 1 else axes[0]


def _parameter_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _for(x: torch.Tensor, parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(_parameter_dtype(x))


def _batch(moments: Moments) -> Batch:
    count = moments.count
    if isinstance(count, torch.Tensor) and count.ndim:
        # A mask has no channel axis: all channels have the same count.
        count = count.reshape(-1)[0]
    return Batch(moments.mean, moments.var, count)
