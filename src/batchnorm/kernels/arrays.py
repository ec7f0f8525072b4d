"""NumPy arrays as tensors that share their memory, and back: how batch_norm takes arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from batchnorm.errors import DtypeError
from batchnorm.kernels.contract import Statistics
from batchnorm.stats.moments import Moments


def to_tensor(values: Any) -> Any:
    """An array as a tensor on its memory; None and tensors as they are.

    An array with negative strides, or one that must not be written to, is copied: torch has no such tensors.

    Raises:
        DtypeError: not an array of float16, float32, float64 or bool.
    """
    if values is None or isinstance(values, torch.Tensor):
        return values
    array = np.asarray(values)
    if array.dtype not in (np.float16, np.float32, np.float64, np.bool_) or not array.dtype.isnative:
        raise DtypeError(
            f"arrays must hold float16, float32 or float64 (a mask: bool), got {array.dtype}: "
            "pass x.astype(np.float32)."
        )
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def statistics_to_tensors(statistics: Statistics | None) -> Statistics | None:
    """Statistics whose mean and variance are tensors."""
    if statistics is None:
        return None
    mean, var = to_tensor(statistics.mean), to_tensor(statistics.var)
    if isinstance(statistics, Moments):
        return Moments(mean, var, statistics.count)
    return type(statistics)(mean, var)


def moments_to_arrays(moments: Moments) -> Moments:
    """Moments of tensors as Moments of arrays."""
    count = moments.count
    return Moments(
        moments.mean.numpy(), moments.var.numpy(), count.numpy() if isinstance(count, torch.Tensor) else count
    )
