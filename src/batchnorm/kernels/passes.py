"""Whole passes of the CPU core, one call each, for the common case: plain tensors (N, C, ...), no mask, no ranks.

Small inputs are why: there, each look at a tensor from Python costs as much as the arithmetic. Everything that could be
wrong or rare is found out in the core (csrc/pass.hpp); the answer is then None, nothing was done, and the general way
says what is wrong or computes it.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from batchnorm.kernels import _cpu
from batchnorm.kernels.contract import Activation
from batchnorm.kernels.cpu import ACTIVATIONS, PLAIN_TENSORS, WIDE, new_like, new_statistics
from batchnorm.stats.moments import Moments

Buffers: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Running mean and variance, (C,), and the scalar that counts batches."""


def train(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: Activation | None,
    features: int,
    buffers: Buffers,
    momentum: float | None,
) -> tuple[torch.Tensor, _cpu.Pass] | None:
    """The output, and what backward needs; the batch has then entered the running statistics, unless `is_taken` denies.

    Args:
        x: activations, (N, C, ...).
        weight: (C,) or None.
        bias: (C,) or None.
        residual: like x, or None.
        eps: added to the variance.
        activation: its name.
        features: C.
        buffers: written in place, where they are not None.
        momentum: weight of the new batch, or None for the plain average.
    """
    code = ACTIVATIONS.get(activation)
    if code is None or not _are_plain(x, weight, bias, residual):
        return None
    mean, var, tracked = buffers
    for buffer in buffers:
        if buffer is not None and (type(buffer) is not torch.Tensor or buffer.is_inference()):
            return None
    y = new_like(x)
    done = _cpu.train(
        x,
        y,
        residual,
        weight,
        bias,
        None,
        None,
        mean,
        var,
        tracked,
        -1.0 if momentum is None else momentum,
        eps,
        code,
        features,
        torch.get_num_threads(),
    )
    if done is None:
        return None
    if mean is not None:
        # Autograd finds out by this that a tensor it saved has changed.
        torch.autograd.graph.increment_version([buffer for buffer in buffers if buffer is not None])
    return y, done


def normalise(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: Activation | None,
) -> tuple[torch.Tensor, _cpu.Pass, Moments] | None:
    """`train` without buffers, and the Moments of the batch."""
    code = ACTIVATIONS.get(activation)
    if code is None or not _are_plain(x, weight, bias, residual) or x.ndim < 2:
        return None
    y = new_like(x)
    mean, var = new_statistics(x)
    threads = torch.get_num_threads()
    done = _cpu.train(x, y, residual, weight, bias, mean, var, None, None, None, 0.0, eps, code, -1, threads)
    return None if done is None else (y, done, Moments(mean, var, done.count))


def infer(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: Activation | None,
    features: int,
    mean: torch.Tensor,
    var: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, _cpu.Pass] | None:
    """The output with given statistics, (C,), and what backward needs; written to `out` where that is given."""
    code = ACTIVATIONS.get(activation)
    if code is None or not _are_plain(x, weight, bias, residual):
        return None
    if type(mean) is not torch.Tensor or type(var) is not torch.Tensor:
        return None
    y = new_like(x) if out is None else out
    done = _cpu.infer(x, y, residual, weight, bias, mean, var, eps, code, features, torch.get_num_threads())
    return None if done is None else (y, done)


def differentiate(
    done: _cpu.Pass,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...] | None:
    """The gradients of x, weight, bias and residual, those that are wanted."""
    if not (_is_plain(dy) and _is_plain(x)):
        return None
    for_x, for_weight, for_bias, for_residual = wanted
    dx = new_like(x) if for_x else None
    # Without an activation the residual was not kept, and its gradient is that of the output.
    dresidual = None if not for_residual else dy if residual is None else new_like(x)
    dweight = _sum_like(weight) if for_weight and weight is not None else None
    dbias = _sum_like(bias) if for_bias and bias is not None else None
    written = dresidual if residual is not None else None
    if dx is not None or dweight is not None or dbias is not None or written is not None:
        threads = torch.get_num_threads()
        if not _cpu.differentiate(done, dy, x, residual, weight, bias, dx, written, dweight, dbias, threads):
            return None
    if dweight is not None and weight is not None and dweight.dtype is not weight.dtype:
        dweight = dweight.to(weight.dtype)
    if dbias is not None and bias is not None and dbias.dtype is not bias.dtype:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias, dresidual


def _sum_like(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.dtype in WIDE:
        return torch.empty_like(parameter)
    return torch.empty_like(parameter, dtype=torch.float32)


def _are_plain(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> bool:
    return (
        _is_plain(x)
        and (weight is None or type(weight) in PLAIN_TENSORS)
        and (bias is None or type(bias) in PLAIN_TENSORS)
        and (residual is None or _is_plain(residual))
    )


def _is_plain(x: torch.Tensor) -> bool:
    """Whether its memory holds what x is: no subclass, nobody follows, no lazy sign, no batch behind it."""
    return (
        type(x) in PLAIN_TENSORS
        and x.is_cpu
        and torch._C._len_torch_dispatch_stack() == 0
        and not x.is_neg()
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # autograd.grad(is_grads_batched=True)
    )
