"""What every launch of a kernel needs: tensors that lie alike, their strides, dtypes, and the current device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl

from batchnorm.kernels.contract import Affine, Statistics
from batchnorm.kernels.triton.layout import Layout, Strides, layout_of, strides_in

WIDE = (torch.float32, torch.float64)


def wide_of(x: torch.Tensor) -> Any:
    """The type in which x is computed with."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def strides_of(layout: Layout, x: torch.Tensor | None) -> Strides:
    """`strides_in` where x is known to lie so; None has none."""
    if x is None:
        return 0, 0, 0
    found = strides_in(layout, x)
    assert found is not None, (layout, x.shape, x.stride())
    return found


def laid(given: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`given` as it is where it lies like x, else copied: both are then read in the order of the memory."""
    layout = layout_of(x, is_masked=False)
    found = strides_in(layout, given)
    if found is None or (found[2] > 1 and strides_of(layout, x)[2] == 1):
        return torch.empty_like(x).copy_(given)
    return given


def parameters(statistics: Statistics, affine: Affine) -> tuple[torch.Tensor | None, ...]:
    """Mean, var, weight and bias, contiguous."""
    given = statistics.mean, statistics.var, affine.weight, affine.bias
    return tuple(t if t is None else t.contiguous() for t in given)


def sums_dtype(weight: torch.Tensor | None) -> torch.dtype:
    """Of the sums that are the gradients of weight and bias: the weight's where that is wide enough."""
    return weight.dtype if weight is not None and weight.dtype in WIDE else torch.float64


def merging(layout: Layout) -> tuple[int, int]:
    """Lanes and channels of a program that merges: neighbours in memory are read together."""
    return (32, 16) if layout.length == 1 else (512, 1)


def limits(programs: int, x: torch.Tensor, registers: int = 96) -> dict[str, int]:
    """So few registers a thread that five programs (with 128: four) fit on a multiprocessor, if there are that many."""
    return {"maxnreg": registers} if programs > 528 and x.itemsize < 8 and torch.version.hip is None else {}


def on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
