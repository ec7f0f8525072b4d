"""The CPU backend: the contract's functions on top of the compiled core, batchnorm.kernels._cpu.

This module allocates the outputs and hands the tensors on; how the work is cut and done stands in csrc/. Importing it
raises ImportError where the package was installed without the core.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch  # before the core, which shares the OpenMP library that torch loads

from batchnorm.kernels import _cpu
from batchnorm.kernels.contract import ACTIVATION_CODES, Affine, BackwardSums, Core, Gradients, Statistics
from batchnorm.kernels.transforms import PLAIN_TENSORS, has_plain_memory
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running

folds = True
packs = False
pairs = False

WIDE = (torch.float64, torch.float32)

_cpu.set_exchange_api(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
if "BATCHNORM_CPU_ISA" in os.environ:
    _cpu.choose_instruction_set(os.environ["BATCHNORM_CPU_ISA"])
_cpu.limit_pool(
    int(os.environ["BATCHNORM_POOL_MB"]) << 20 if "BATCHNORM_POOL_MB" in os.environ else _cpu.usual_pool_limit()
)
# Who turns the pool off wants the memory left alone, and who sets malloc's thresholds wants those.
if _cpu.pool_state()[0] and not any(
    setting in os.environ or setting in os.environ.get("GLIBC_TUNABLES", "")
    for setting in (
        "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "malloc.mmap_threshold", "malloc.trim_threshold",
    )
):  # fmt: skip
    _cpu.recycle_heap(_cpu.pool_state()[0])
    os.register_at_fork(after_in_child=lambda: _cpu.recycle_heap(0))  # a DataLoader has many workers
# A forked child has none of OpenMP's threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_cpu.forbid_threads)


def can_take(x: torch.Tensor) -> bool:
    """Whether the core can read the memory of x: a plain tensor on the CPU, and nobody follows the operations."""
    return x.is_cpu and has_plain_memory(x)


def forward(
    x: torch.Tensor, affine: Affine, residual: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, Moments]:
    """See `contract.Backend.forward`; x may be (N, C, ...)."""
    y = new_like(x)
    mean, var = new_statistics(x)
    count = _forward(x, y, residual, mask, mean, var, affine, True)
    return y, Moments(mean, var, count)


def stats(x: torch.Tensor, mask: torch.Tensor | None = None) -> Moments:
    """See `contract.Backend.stats`."""
    mean, var = new_statistics(x)
    return Moments(mean, var, _forward(x, None, None, mask, mean, var, _NOTHING, True))


def wide_stats(x: torch.Tensor) -> Moments | None:
    """Moments of (N, C, L) `x` with every value widened to float64 first; None where the core cannot read it.

    Slower than `stats`, which sums in float32 what came in float32, and the same to float64 rounding however the values
    are split into tensors.
    """
    if not can_take(x):
        return None
    mean, var = new_statistics(x)
    threads = torch.get_num_threads()
    count = _cpu.wide_stats(x, mean, var, threads)
    if count < 0:  # strides that the core does not know
        count = _cpu.wide_stats(x.contiguous(), mean, var, threads)
    return Moments(mean, var, count)


def apply(
    x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """See `contract.Backend.apply`."""
    y = new_like(x)
    _forward(x, y, residual, None, _wide(statistics.mean), _wide(statistics.var), affine, False)
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
    dx = new_like(x)
    dresidual = _new_residual_gradient(x, affine, residual)
    weight = affine.weight
    if weight is not None and weight.dtype in WIDE:
        sums = BackwardSums(torch.empty_like(weight), torch.empty_like(weight))
    else:
        sums = _new_sums(x, torch.float64)
    _backward(dy, x, statistics, affine, residual, dx, dresidual, sums, mask, True, is_estimated)
    return Gradients(dx, dy if dresidual is None and residual is not None else dresidual, sums)


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
    dx = new_like(x)
    dresidual = _new_residual_gradient(x, affine, residual)
    _backward(dy, x, statistics, affine, residual, dx, dresidual, sums, mask, False, sums is not None)
    return dx, dy if dresidual is None and residual is not None else dresidual


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
    if type(batch.count) is not int or mean.dtype not in WIDE or mean.dtype != var.dtype or mean.ndim != 1:
        return None
    state = (mean, var) if tracked is None else (mean, var, tracked)
    for tensor in state:
        if type(tensor) is not torch.Tensor or not tensor.is_cpu or not tensor.is_contiguous():
            return None
    if mean.is_inference() or type(batch.mean) is not torch.Tensor or torch._C._len_torch_dispatch_stack():
        return None
    done = _cpu.update_running(
        mean, var, tracked, batch.mean, batch.var, batch.count, -1.0 if momentum is None else momentum
    )
    # Autograd finds out by this that a tensor it saved has changed.
    torch.autograd.graph.increment_version(state)
    return done


def instruction_set() -> str:
    """One of "avx512bf16", "avx512", "avx2" or "plain". BATCHNORM_CPU_ISA in the environment forces one."""
    return _cpu.instruction_set()


def core() -> Core:
    """What the core runs with."""
    level2, level3 = _cpu.cache_bytes()
    names = tuple(_cpu.instruction_sets())
    limit, idle, lent = _cpu.pool_state()
    pool = limit, idle, lent
    return Core(_cpu.instruction_set(), names, (level2, level3), _cpu.has_exchange_api(), pool)


def limit_pool(megabytes: int) -> None:
    """How much memory may lie idle in the pool of output buffers; 0 turns the pool off.

    Buffers in use do not count: they are ordinary tensors, and return to the pool when the last reference to them
    goes. BATCHNORM_POOL_MB in the environment sets the limit at start; without it that is 512, less on a small machine.
    """
    _cpu.limit_pool(megabytes << 20)


def new_like(x: torch.Tensor) -> torch.Tensor:
    """An output like x: torch.empty_like, or a recycled buffer where pages would have to be mapped afresh."""
    if x.nbytes < _cpu.POOLED_BYTES or not _is_dense(x):
        return torch.empty_like(x)
    capsule = _cpu.pooled_like(x)
    if capsule is None:
        return torch.empty_like(x)
    # set_ rather than a view: what comes out of an autograd Function must not be one.
    storage = torch.utils.dlpack.from_dlpack(capsule).untyped_storage()
    return x.new_empty(0).set_(storage, 0, x.shape, x.stride())


def _new_residual_gradient(x: torch.Tensor, affine: Affine, residual: torch.Tensor | None) -> torch.Tensor | None:
    """Where to write dresidual; None where there is none, and where it is dy itself, without an activation."""
    return None if residual is None or affine.activation is None else new_like(x)


def _is_dense(x: torch.Tensor) -> bool:
    if x.is_contiguous():
        return True
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return last is not None and x.is_contiguous(memory_format=last)


# What whole passes, kernels.direct, ask of torch.
_cpu.set_torch(
    *PLAIN_TENSORS,
    torch.empty_like,
    torch.Tensor.is_neg,
    new_like,
    _cpu.POOLED_BYTES,
)


def _install_node() -> None:
    """Small layers in training become nodes of autograd's graph without Python: csrc/node.hpp."""
    library = Path(torch.__file__).with_name("lib") / (
        "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    )
    operator = getattr(torch, "cudnn_batch_norm", None)
    has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
    if operator is None or has_kernel is None or has_kernel("aten::cudnn_batch_norm", "CPU"):
        return  # not there any more, or another library's
    if _cpu.install_node(str(library)):
        _cpu.set_node(operator)


_install_node()

_NOTHING = Affine(None, None, 0.0, None)


_prototypes: dict[int, torch.Tensor] = {}
"""One (C,) float64 tensor for each C that was met: torch.empty_like of one is faster than torch.empty."""


def new_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance to write, (C,) float64."""
    channels = x.shape[1]
    like = _prototypes.get(channels)
    if like is None:
        like = _prototypes[channels] = torch.empty(channels, dtype=torch.float64, device="cpu")
    return torch.empty_like(like), torch.empty_like(like)


def _new_sums(x: torch.Tensor, dtype: torch.dtype) -> BackwardSums:
    channels = x.shape[1]
    return BackwardSums(x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype))


def _forward(
    x: torch.Tensor,
    y: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    affine: Affine,
    reduces: bool,
) -> Any:
    """Runs the core and returns the count as Moments hold it: an int, or a tensor where a mask decides."""
    weight, bias, eps, activation = affine
    which, threads, maps = ACTIVATION_CODES[activation], torch.get_num_threads(), y is not None
    count = _cpu.forward(x, y, residual, mask, weight, bias, mean, var, eps, which, reduces, maps, threads)
    if count < 0:  # strides that the core does not know
        whole = None if y is None else torch.empty(x.shape, dtype=x.dtype)
        inputs = x.contiguous(), whole, _contiguous(residual), _contiguous(mask)
        parameters = _contiguous(weight), _contiguous(bias), mean.contiguous(), var.contiguous()
        count = _cpu.forward(*inputs, *parameters, eps, which, reduces, maps, threads)
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
    weight, bias, eps, activation = affine
    # Without an activation the residual's value plays no part.
    read = None if activation is None else residual
    mean, var = _wide(statistics.mean), _wide(statistics.var)
    rest = (
        eps,
        ACTIVATION_CODES[activation],
        *((None, None) if sums is None else sums),
        _count(statistics) if is_estimated else -1,
        reduces,
        dx is not None,
        is_estimated,
        torch.get_num_threads(),
    )
    if _cpu.backward(dy, x, read, dx, dresidual, mask, weight, bias, mean, var, *rest):
        return
    # The gradient comes in another layout than x, as a rule; or x itself has strides that the core does not know.
    given = _contiguous(mask), _contiguous(weight), _contiguous(bias), mean.contiguous(), var.contiguous()
    dy_like, read_like = _laid_out_like(x, dy), None if read is None else _laid_out_like(x, read)
    if _cpu.backward(dy_like, x, read_like, dx, dresidual, *given, *rest):
        return
    whole = None if dx is None else torch.empty(x.shape, dtype=x.dtype)
    whole_residual = None if dresidual is None else torch.empty(x.shape, dtype=x.dtype)
    _cpu.backward(dy.contiguous(), x.contiguous(), _contiguous(read), whole, whole_residual, *given, *rest)
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
    return statistic if statistic.dtype in WIDE else statistic.float()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _laid_out_like(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """`given` with the strides of x; where it is one number expanded, as sum() makes it, a piece that is repeated."""
    if given.stride() == x.stride():
        return given
    if not any(given.stride()) and given.numel() > 1:
        is_channels_last = x.ndim == 2 or (x.stride(1) == 1 and x.shape[1] > 1)
        if not is_channels_last or x.shape[1] >= _WIDE_ROW:
            piece = (slice(0, 1), slice(None), *(slice(0, 1) if is_channels_last else slice(None) for _ in x.shape[2:]))
            return torch.empty_like(x[piece]).copy_(given[piece]).expand(x.shape)
    return new_like(x).copy_(given)


_WIDE_ROW = 64
"""Channels from which on the core needs not fold rows of channels-last tensors, which repeated ones do not allow."""
