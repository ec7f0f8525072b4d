"""Who follows or transforms the operations now: compilers, tracers, torch.func, forward-mode autograd."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def must_look_inside() -> bool:
    """Whether somebody transforms the operations themselves: a compiler, torch.func, forward-mode autograd."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def can_read(values: torch.Tensor) -> bool:
    """Whether numbers can be read now: no accelerator has to stop for it, and no compiler or tracer follows."""
    return bool(
        values.device.type == "cpu"
        and not must_look_inside()
        and type(values) is torch.Tensor  # fake tensors have no numbers, even where no mode is on
        and torch._C._len_torch_dispatch_stack() == 0
    )


PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
KERNEL_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def has_plain_memory(x: torch.Tensor) -> bool:
    """Whether a kernel may read the memory of x as it lies: a plain tensor, and nobody follows the operations."""
    return bool(
        x.dtype in KERNEL_DTYPES
        and type(x) in PLAIN_TENSORS  # subclasses and fake tensors have meanings of their own
        and torch._C._len_torch_dispatch_stack() == 0
        and x.layout is torch.strided
        and not x.is_neg()
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # autograd.grad(is_grads_batched=True)
    )
