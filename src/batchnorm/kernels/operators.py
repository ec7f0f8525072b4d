"""Normalisation as functional operators of torch, for compilers: batchnorm::forward and batchnorm::backward.

A compiler cannot look into the kernels, and need not: it sees what goes in and comes out, shapes, dtypes and strides
included. Nothing is changed in place; running statistics are updated outside, by operations that the compiler sees.
"""

from __future__ import annotations

from typing import Any

import torch

from batchnorm.kernels.autograd import Work
from batchnorm.kernels.checks import check_number
from batchnorm.kernels.contract import ACTIVATION_CODES, Affine
from batchnorm.kernels.dispatch import backend_for, core_in_use, has_kernels
from batchnorm.kernels.transforms import KERNEL_DTYPES
from batchnorm.kernels.view import View, reshaped
from batchnorm.stats.moments import Moments

_NAMES = tuple(ACTIVATION_CODES)
_OPERANDS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "


def can_serve(x: torch.Tensor) -> bool:
    """Whether code that is being compiled should call the operators for x.

    Exported programs do without: they shall run where this library is not installed.
    """
    return bool(
        torch.compiler.is_compiling()
        # torch.compiler.is_exporting came with torch 2.7.
        and not getattr(torch.compiler, "is_exporting", lambda: False)()
        and not torch._C._are_functorch_transforms_active()
        and x.dtype in KERNEL_DTYPES
        and x.ndim >= 2
        and has_kernels(x.device.type)
    )


def normalise(
    x: torch.Tensor, affine: Affine, residual: torch.Tensor | None, *, view: View, mask: torch.Tensor | None
) -> tuple[torch.Tensor, Moments]:
    """`operations.normalise` with the batch's own statistics, through the operators; differentiable once."""
    is_whole = view.axes == (1,)
    folded = x if is_whole else view.fold(x)
    folded_residual = residual if residual is None or is_whole else view.fold(residual)
    channels = folded.shape[1]
    count: Any = x.numel() // channels if channels else 0
    if mask is None:
        check_number(count, x)
    else:
        count = mask.sum().expand(channels)
    y, mean, var = torch.ops.batchnorm.forward(
        folded, affine.weight, affine.bias, folded_residual, mask, affine.eps, ACTIVATION_CODES[affine.activation]
    )
    moments: Moments = reshaped(Moments(mean, var, count), view.channels)
    return y if is_whole else view.unfold(y), moments


# What is not wanted comes back empty: an optional tensor is no type of result.
torch.library.define(
    "batchnorm::forward", f"({_OPERANDS} float eps, int activation) -> (Tensor y, Tensor mean, Tensor var)"
)
torch.library.define(
    "batchnorm::backward",
    f"(Tensor dy, {_OPERANDS} Tensor mean, Tensor var, float eps, int activation, bool[] wanted)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
)

_Optional = torch.Tensor | None


@torch.library.impl("batchnorm::forward", ("cpu", "cuda"))
def _forward(
    x: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    mask: _Optional,
    eps: float,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    core, channels = core_in_use(), x.shape[1]
    if core is not None and mask is None and x.is_cpu:
        mean, var = torch.empty(channels, dtype=torch.float64), torch.empty(channels, dtype=torch.float64)
        threads = torch.get_num_threads()
        found = core.train(x, weight, bias, residual, eps, activation, -1, threads, mean, var, None, None, None, 0.0)
        if found is not None:
            return _as_promised(found[0], x), mean, var
    backend, view = backend_for(x), View(tuple(x.shape), (1,))
    affine = Affine(weight, bias, eps, _NAMES[activation])
    with torch.no_grad():
        if backend.folds:
            y, moments = backend.forward(x, affine, residual, mask)
        else:
            y, moments = backend.forward(view.fold(x), affine, None if residual is None else view.fold(residual), mask)
    return view.unfold(y) if y.shape != x.shape else y, moments.mean, moments.var


def _as_promised(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """With the strides that the compiler was told: the core writes contiguous what lies like no memory format."""
    if y.stride() == x.stride() or y.stride() == torch.empty_like(x, device="meta").stride():
        return y
    return torch.empty_like(x).copy_(y)


@torch.library.register_fake("batchnorm::forward")  # type: ignore[untyped-decorator]
def _(
    x: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    mask: _Optional,
    eps: float,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean = x.new_empty(x.shape[1], dtype=torch.float64)
    return torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.impl("batchnorm::backward", ("cpu", "cuda"))
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    mask: _Optional,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    activation: int,
    wanted: list[bool],
) -> tuple[torch.Tensor, ...]:
    work = Work(View(tuple(x.shape), (1,)), backend_for(x), mask, None, eps, _NAMES[activation], None)
    # A tensor: nobody shall wait for a GPU to read it.
    count: Any = x.numel() // max(x.shape[1], 1) if mask is None else mask.sum().expand(x.shape[1])
    work.folded = Moments(mean, var, count)
    with torch.no_grad():
        grads = work.backward(dy, (x, weight, bias, residual), tuple(wanted))
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("batchnorm::backward")  # type: ignore[untyped-decorator]
def _(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    mask: _Optional,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    activation: int,
    wanted: list[bool],
) -> tuple[torch.Tensor, ...]:
    like = (x, weight, bias, None if residual is None else x)
    return tuple(
        torch.empty_like(t) if is_wanted and t is not None else x.new_empty(0)
        for t, is_wanted in zip(like, wanted, strict=True)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, residual, mask, ctx.eps, ctx.activation = inputs
    _, mean, var = output
    # Without an activation the residual's value plays no part in backward, only its place.
    ctx.save_for_backward(x, weight, bias, residual if ctx.activation else None, mask, mean, var)


def _differentiate(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    *operands, mask, mean, var = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    is_residual_kept = operands[3] is not None
    asked = [*wanted[:3], wanted[3] and is_residual_kept]
    grads = torch.ops.batchnorm.backward(dy, *operands, mask, mean, var, ctx.eps, ctx.activation, asked)
    found = [grad if is_wanted else None for grad, is_wanted in zip(grads, asked, strict=True)]
    if wanted[3] and not is_residual_kept:
        found[3] = dy
    return (*found, None, None, None)


torch.library.register_autograd("batchnorm::forward", _differentiate, setup_context=_keep)
