"""batch_norm(): the one door to the kernels."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.utils._pytree

from batchnorm.kernels import direct, operations, operators, recomputation
from batchnorm.kernels.arrays import moments_to_arrays, statistics_to_tensors, to_tensor
from batchnorm.kernels.autograd import Normalise, Work
from batchnorm.kernels.checks import check_out, checked_view
from batchnorm.kernels.contract import Activation, Affine, Statistics
from batchnorm.kernels.dispatch import backend_for, backend_now
from batchnorm.kernels.transforms import must_look_inside
from batchnorm.kernels.view import View, flat, in_memory_format, reshaped
from batchnorm.stats.distributed import Ranks
from batchnorm.stats.moments import Moments

# torch.func, torch.export and DataParallel take results apart with torch's pytree, which does not know our dataclass
# by itself.
torch.utils._pytree.register_pytree_node(
    Moments,
    lambda moments: ([moments.mean, moments.var, moments.count], None),
    lambda parts, _: Moments(*parts),
    serialized_type_name="batchnorm.Moments",
)


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    moments: Statistics | None = None,
    eps: float = 1e-5,
    channel_axis: int | tuple[int, ...] = 1,
    mask: torch.Tensor | None = None,
    activation: Activation | None = None,
    residual: torch.Tensor | None = None,
    ranks: Ranks | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Statistics]:
    """Batch normalization: the output, and the Moments it was made with.

    y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), with mean and biased variance of each
    channel over all other axes of the batch, or those of `moments`. Backward is the closed form through mean and
    variance; it can be differentiated again, and torch.func (vmap, grad, jacrev, jacfwd) and torch.compile take it.

    Args:
        x: activations, (N, C, ...) or any shape with a channel axis, float; half precision is computed in float32.
            A NumPy array works too, with arrays for everything else: y and Moments are arrays then, without gradient.
        weight: gamma, shape of the channel axes, (C,) as a rule; dtype of x, or float32 where x is float16 or
            bfloat16. None is 1.
        bias: beta, likewise. None is 0.
        moments: normalise with these instead of the batch's own, as at inference; shape of the channel axes each.
            Their variance is taken as it is, and gradients flow into them where they require any. `mask` then only
            keeps padding out of the gradients.
        eps: added to the variance; at least 0; unit of x, squared.
        channel_axis: the axis of the channels, or several: each combination of their positions is then a channel of
            its own, and weight, bias and moments have the shape of those axes in ascending order.
        mask: bool, True = counts; the shape of x without its channel axes, or broadcastable to it. What it leaves out
            is not in the statistics but is normalised like the rest; NaN, infinity and values whose square overflows
            are read as 0 there, in x and in residual, so that padding may hold anything.
        activation: "relu", "leaky_relu" (slope 0.01), "silu", "gelu" (exact), "sigmoid", "tanh" or None.
        residual: added before the activation; shape and dtype of x.
        ranks: the batch's own moments are those of these ranks' batches together; every one of them must make this
            call, an empty batch included.
        out: where y is written: shape and dtype of x, which it may be itself (inference in place). Only with `moments`,
            and not where autograd follows: backward needs x.

    Returns:
        y, shape, dtype and memory format of x; and the Moments used: those given, or the batch's (detached, mean and
        var float64).

    Raises:
        ShapeError: one value a channel where the batch's own moments are asked for, or shapes that do not fit.
        DtypeError: x is no float tensor, or a dtype does not go with that of x.
        ArgumentError: eps is negative, or the activation is unknown, or `out` is given where it cannot be.

    Example:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> y, moments = batch_norm(x, eps=0.0)
        >>> y.tolist(), moments.mean.tolist(), moments.var.tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [2.0, 20.0], [1.0, 100.0])

    Source: Ioffe & Szegedy 2015, Alg. 1 and section 3 (backward). We differ in one thing: a large mean is subtracted
        in two parts, so that float32 input with mean 1e4 loses nothing of its normalised values.
    """
    if isinstance(x, np.ndarray) and out is None:
        return _of_arrays(x, weight, bias, moments, eps, channel_axis, mask, activation, residual)
    if out is not None:
        check_out(out, x, (weight, bias, residual), moments, ranks)
        return _into(out, x, weight, bias, residual, moments, eps, channel_axis, mask, activation)
    looks_inside = must_look_inside()
    is_constant = moments is None or not _answers_to_gradient(moments)
    if not looks_inside and is_constant and mask is None and ranks is None and channel_axis == 1:
        found = direct.batch_norm(x, weight, bias, residual, eps, activation, moments)
        if found is not None:
            return found
    view = checked_view(
        x, weight, bias, residual, moments=moments, eps=eps, channel_axis=channel_axis, mask=mask, activation=activation
    )
    mask3 = None if mask is None else view.fold_mask(mask)
    if mask3 is not None:
        x = _without_garbage(x, mask3, view)
        residual = None if residual is None else _without_garbage(residual, mask3, view)
    if looks_inside or not is_constant:
        affine = Affine(flat(weight), flat(bias), eps, activation)
        used: Statistics
        if moments is None and ranks is None and operators.can_serve(x):
            y, used = operators.normalise(x, affine, residual, view=view, mask=mask3)
        else:
            y, used = operations.normalise(x, affine, residual, view=view, mask=mask3, given=moments, ranks=ranks)
        return in_memory_format(y, view), used
    work = Work(view, backend_for(x), mask3 if moments is None else None, moments, eps, activation, ranks)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        y = _in_graph((x, weight, bias, residual), work)
    else:
        y = in_memory_format(work.forward(x, weight, bias, residual), view)
    return y, work.used


def _in_graph(inputs: tuple[torch.Tensor | None, ...], work: Work) -> torch.Tensor:
    """The output as a node of autograd's graph; the layer's own node keeps the inputs, another one often the output."""
    view = work.view

    def node() -> torch.Tensor:
        return in_memory_format(Normalise.apply(*inputs, work), view)  # type: ignore[no-untyped-call]

    if not recomputation.in_use:
        return node()
    again = partial(work.again, work.backend)  # backward may go on with another one
    return recomputation.noted(
        node,
        inputs,
        lambda *inputs: in_memory_format(again(*inputs), view),
        keeps_inputs=inputs[3] is None or work.activation is not None,
    )


def _into(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    moments: Any,
    eps: float,
    channel_axis: int | tuple[int, ...],
    mask: torch.Tensor | None,
    activation: Activation | None,
) -> tuple[torch.Tensor, Statistics]:
    """`batch_norm` with its output written to `out`: at once where the core can, else copied."""
    if mask is None and channel_axis == 1 and not must_look_inside():
        y = direct.infer_into(out, x, weight, bias, residual, eps, activation, moments.mean, moments.var)
        if y is not None:
            return y, moments
    y, _ = batch_norm(
        x,
        weight,
        bias,
        moments=moments,
        eps=eps,
        channel_axis=channel_axis,
        mask=mask,
        activation=activation,
        residual=residual,
    )
    return out.copy_(y), moments


def _of_arrays(
    x: Any,
    weight: Any,
    bias: Any,
    moments: Statistics | None,
    eps: float,
    channel_axis: int | tuple[int, ...],
    mask: Any,
    activation: Activation | None,
    residual: Any,
) -> Any:
    """NumPy's way through the same kernels: arrays share their memory with tensors."""
    with torch.no_grad():
        y, used = batch_norm(
            to_tensor(x),
            to_tensor(weight),
            to_tensor(bias),
            moments=statistics_to_tensors(moments),
            eps=eps,
            channel_axis=channel_axis,
            mask=to_tensor(mask),
            activation=activation,
            residual=to_tensor(residual),
        )
    return y.numpy(), moments if moments is not None else moments_to_arrays(cast(Moments, used))


def batch_moments(
    x: torch.Tensor, *, channel_axis: int | tuple[int, ...] = 1, mask: torch.Tensor | None = None
) -> Moments:
    """The Moments with which `batch_norm` would normalise `x`, detached; arguments and errors as there.

    Returns:
        Moments, shape of the channel axes, mean and var float64.

    Example:
        >>> batch_moments(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).mean.tolist()
        [2.0, 20.0]
    """
    view = checked_view(x, channel_axis=channel_axis, mask=mask)
    mask3 = None if mask is None else view.fold_mask(mask)
    with torch.no_grad():
        moments: Moments = reshaped(backend_now(x).stats(view.fold(x.detach()), mask3), view.channels)
    return moments


def _without_garbage(x: torch.Tensor, mask: torch.Tensor, view: View) -> torch.Tensor:
    """`x` with 0 where `mask`, (N, 1, L), leaves out what would make NaN of a gradient of 0."""
    x3 = view.fold(x)
    limit = min(torch.finfo(x.dtype).max, torch.finfo(torch.promote_types(x.dtype, torch.float32)).max ** 0.5)
    return view.unfold(x3.masked_fill(~(mask | (x3.abs() <= limit)), 0))


def _answers_to_gradient(moments: Statistics) -> bool:
    return torch.is_grad_enabled() and any(getattr(s, "requires_grad", False) for s in (moments.mean, moments.var))
