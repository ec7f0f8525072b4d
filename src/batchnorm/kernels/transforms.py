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
