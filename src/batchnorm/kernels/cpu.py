"""The CPU backend: the contract's functions on top of the compiled core, batchnorm.kernels._cpu.

This module allocates the outputs and hands the tensors on; how the work is cut and done stands in csrc/. Importing it
raises ImportError where the package was installed without the core.
"""

from __future__ import annotations

import os
from typing import Any

import torch  # before the core, which shares the OpenMP library that torch loads

from batchnorm.kernels import _cpu
from batchnorm.kernels.contract import Activation, Affine, BackwardSums, Gradients, Statistics
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running

folds = True

_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_WIDE = (torch.float64, torch.float32)
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

_ACTIVATIONS: dict[Activation | None, int] = {
    None: 0,
    "relu": 1,
    "leaky_relu": 2,
    "silu": 3,
    "gelu": 4,
    "sigmoid": 5,
    "tanh": 6,
}

_cpu.set_exchange_api(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
if "BATCHNORM_CPU_ISA" in os.environ:
    _cpu.choose_instruction_set(os.environ["BATCHNORM_CPU_ISA"])
# A forked child has none of OpenMP's threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_cpu.forbid_threads)


def can_take(x: torch.Tensor) -> bool:
    """Whether the core can read the memory of x: a plain tensor on the CPU, and nobody follows the operations."""
    return bool(
        x.is_cpu
        and x.dtype in _DTYPES
        and type(x) in _PLAIN_TENSORS  # subclasses and fake tensors have meanings of their own
        and torch._C._len_torch_dispatch_stack() == 0
        and x.layout is torch.strided
        and not x.is_neg()
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # autograd.grad(is_grads_batched=True)
    )


def forward(
    x: torch.Tensor, affine: Affine, residual: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, Moments]:
    """See `contract.Backend.forward`; x may be (N, C, ...)."""
    y = torch.empty_like(x)
    mean, var = _new_statistics(x)
    count = _forward(x, y, residual, mask, mean, var, affine, reduces=True)
    return y, Moments(mean, var, count)


def stats(x: torch.Tensor, mask: torch.Tensor | None = None) -> Moments:
    """See `contract.Backend.stats`."""
    mean, var = _new_statistics(x)
    return Moments(mean, var, _forward(x, None, None, mask, mean, var, _NOTHING, reduces=True))


def apply(
    x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """See `contract.Backend.apply`."""
    y = torch.empty_like(x)
    _forward(x, y, residual, None, _wide(statistics.mean), _wide(statistics.var), affine, reduces=False)
    return y


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    affine: Affine,
    residual: torch.Tensor | None = None,
    *,
    is_estimated: bool,
    mask: torch.Tensor | None = None,
) -> Gradients:
    """See `contract.Backend.backward`; the sums have the dtype of the weight where that is float32 or float64."""
    dx = torch.empty_like(x)
    dresidual = None if residual is None else torch.empty_like(x)
    weight = affine.weight
    is_half = weight is None or weight.dtype not in (torch.float32, torch.float64)
    sums = _new_sums(x, torch.float64 if is_half or weight is None else weight.dtype)
    _backward(dy, x, statistics, affine, residual, dx, dresidual, sums, mask, True, is_estimated)
    return Gradients(dx, dresidual, sums)


def backward_reduce(
    dy: torch.Tensor, x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor | None = None
) -> BackwardSums:
    """See `contract.Backend.backward_reduce`."""
    sums = _new_sums(x, torch.float64)
    _backward(dy, x, statistics, affine, residual, None, None, sums, None, True, False)
    return sums


def backward_apply(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    affine: Affine,
    residual: torch.Tensor | None = None,
    *,
    sums: BackwardSums | None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `contract.Backend.backward_apply`."""
    dx = torch.empty_like(x)
    dresidual = None if residual is None else torch.empty_like(x)
    _backward(dy, x, statistics, affine, residual, dx, dresidual, sums, mask, False, sums is not None)
    return dx, dresidual


def update_running(
    running: Running, tracked: torch.Tensor | None, batch: Moments, momentum: float | None
) -> bool | None:
    """Takes a batch into running statistics in place, in one call instead of a dozen small operations.

    The rules are those of `stats.running.exponential` and `cumulative` (momentum=None). False, and nothing changed,
    where mean or variance is not finite; None, and nothing changed, where the core cannot do it.

    Args:
        running: mean and unbiased variance, (C,), float32 or float64.
        tracked: scalar int64, counted up; or None.
        batch: Moments, (C,), float64, count an int.
        momentum: weight of the new value, or None.
    """
    mean, var = running
    if type(batch.count) is not int or mean.dtype not in _WIDE or mean.dtype != var.dtype or mean.ndim != 1:
        return None
    state = [mean, var] if tracked is None else [mean, var, tracked]
    if not all(can_write(tensor) for tensor in state):
        return None
    done = _cpu.update_running(
        mean, var, tracked, batch.mean, batch.var, batch.count, -1.0 if momentum is None else momentum
    )
    # Autograd finds out by this that a tensor it saved has changed.
    torch.autograd.graph.increment_version(state)
    return done


def can_write(state: torch.Tensor) -> bool:
    """Whether the core can change this tensor: plain memory that is its own."""
    return bool(
        state.is_cpu
        and type(state) is torch.Tensor
        and state.is_contiguous()
        and not state.is_inference()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def instruction_set() -> str:
    """The instruction set in use: "avx512", "avx2" or "plain"; BATCHNORM_CPU_ISA in the environment forces one."""
    return _cpu.instruction_set()


_NOTHING = Affine(None, None, 0.0, None)


def _new_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    channels = x.shape[1]
    return torch.empty(channels, dtype=torch.float64), torch.empty(channels, dtype=torch.float64)


def _new_sums(x: torch.Tensor, dtype: torch.dtype) -> BackwardSums:
    channels = x.shape[1]
    return BackwardSums(torch.empty(channels, dtype=dtype), torch.empty(channels, dtype=dtype))


def _forward(
    x: torch.Tensor,
    y: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    affine: Affine,
    *,
    reduces: bool,
) -> Any:
    """Runs the core and returns the count as Moments hold it: an int, or a tensor where a mask decides."""
    weight, bias = _plain(affine.weight), _plain(affine.bias)
    if mask is not None:
        mask = mask.contiguous()
    rest = (mask, weight, bias, mean, var, affine.eps, _ACTIVATIONS[affine.activation], reduces, y is not None)
    count = _cpu.forward(x, y, residual, *rest, torch.get_num_threads())
    if count < 0:  # strides that the core does not know
        whole = torch.empty(x.shape, dtype=x.dtype) if y is not None else None
        count = _cpu.forward(x.contiguous(), whole, _contiguous(residual), *rest, torch.get_num_threads())
        if y is not None and whole is not None:
            y.copy_(whole)
    return count if mask is None else torch.full((x.shape[1],), count)


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    affine: Affine,
    residual: torch.Tensor | None,
    dx: torch.Tensor | None,
    dresidual: torch.Tensor | None,
    sums: BackwardSums | None,
    mask: torch.Tensor | None,
    reduces: bool,
    is_estimated: bool,
) -> None:
    count = _count(statistics) if is_estimated else -1
    # Without an activation the residual's value plays no part.
    read = residual if affine.activation is not None else None
    rest = (
        None if mask is None else mask.contiguous(),
        _plain(affine.weight),
        _plain(affine.bias),
        _wide(statistics.mean),
        _wide(statistics.var),
        affine.eps,
        _ACTIVATIONS[affine.activation],
        *((None, None) if sums is None else sums),
        count,
        reduces,
        dx is not None,
        is_estimated,
        torch.get_num_threads(),
    )
    if _cpu.backward(dy, x, read, dx, dresidual, *rest):
        return
    # The gradient comes in another layout than x, as a rule; or x itself has strides that the core does not know.
    if dx is None or not _cpu.backward(
        _like(dy, dx), x, None if read is None else _like(read, dx), dx, dresidual, *rest
    ):
        inputs = (dy.contiguous(), x.contiguous(), _contiguous(read))
        whole = torch.empty(x.shape, dtype=x.dtype) if dx is not None else None
        whole_residual = torch.empty(x.shape, dtype=x.dtype) if dresidual is not None else None
        _cpu.backward(*inputs, whole, whole_residual, *rest)
        for to, result in ((dx, whole), (dresidual, whole_residual)):
            if to is not None and result is not None:
                to.copy_(result)


def _count(statistics: Statistics) -> int:
    count: Any = statistics.count if isinstance(statistics, Moments) else -1
    if not isinstance(count, torch.Tensor):
        return int(count)
    # A mask is the same for all channels, and so are their counts.
    return int(count.reshape(-1)[0]) if count.numel() else 0


def _wide(statistic: torch.Tensor) -> torch.Tensor:
    return statistic if statistic.dtype in _WIDE else statistic.float()


def _plain(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return parameter if parameter is None or parameter.is_contiguous() else parameter.contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(other).copy_(x)
