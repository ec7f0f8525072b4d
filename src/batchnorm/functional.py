"""batch_norm(): the one door to the kernels, to autograd and to torch.compile."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.utils._pytree
from torch.autograd import forward_ad

from batchnorm.errors import ArgumentError, DtypeError, ShapeError
from batchnorm.kernels import reference
from batchnorm.kernels.contract import Activation, Affine, BackwardSums, Statistics
from batchnorm.kernels.view import View
from batchnorm.stats.distributed import Ranks
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running

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
) -> tuple[torch.Tensor, Statistics]:
    """Batch normalization: the output, and the Moments it was made with.

    y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual), with mean and biased variance of each
    channel over all other axes of the batch, or those of `moments`. Backward is the closed form through mean and
    variance; it can be differentiated again, and torch.func (vmap, grad, jacrev, jacfwd) and torch.compile take it.

    Args:
        x: activations, (N, C, ...) or any shape with a channel axis, float; half precision is computed in float32.
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

    Returns:
        y, shape, dtype and memory format of x; and the Moments used: those given, or the batch's (detached, mean and
        var float64).

    Raises:
        ShapeError: one value a channel where the batch's own moments are asked for, or shapes that do not fit.
        DtypeError: x is no float tensor, or a dtype does not go with that of x.
        ArgumentError: eps is negative, or the activation is unknown.

    Example:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> y, moments = batch_norm(x, eps=0.0)
        >>> y.tolist(), moments.mean.tolist(), moments.var.tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [2.0, 20.0], [1.0, 100.0])

    Source: Ioffe & Szegedy 2015, Alg. 1 and section 3 (backward). We differ in one thing: a large mean is subtracted
        in two parts, so that float32 input with mean 1e4 loses nothing of its normalised values.
    """
    _check_values(x, eps, activation)
    view = View.of(x, channel_axis)
    _check_channels("weight", weight, view, x)
    _check_channels("bias", bias, view, x)
    _check_residual(residual, x)
    _check_mask_dtype(mask)
    affine = Affine(_flat(weight), _flat(bias), eps, activation)
    x3 = view.fold(x)
    residual3 = None if residual is None else view.fold(residual)
    mask3 = None if mask is None else view.fold_mask(mask)
    if mask3 is not None:
        x3 = _without_garbage(x3, mask3)
        residual3 = None if residual3 is None else _without_garbage(residual3, mask3)
    if moments is not None:
        _check_moments(moments, view)
        y3 = _normalise(x3, residual3, _reshaped(moments, (-1,)), affine)
        return _in_memory_format(view.unfold(y3), view), moments
    y3, used = _normalise_by_itself(x3, residual3, affine, mask3, ranks)
    return _in_memory_format(view.unfold(y3), view), _reshaped(used, view.channels)


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
    _check_values(x, 0.0, None)
    _check_mask_dtype(mask)
    view = View.of(x, channel_axis)
    mask3 = None if mask is None else view.fold_mask(mask)
    with torch.no_grad():
        moments: Moments = _reshaped(_stats(view.fold(x.detach()), mask3, None), view.channels)
    return moments


def _normalise_by_itself(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    affine: Affine,
    mask: torch.Tensor | None,
    ranks: Ranks | None,
) -> tuple[torch.Tensor, Moments]:
    """Training: (N, C, L) activations normalised with their own moments, which answer to the gradient."""
    if _must_look_inside():
        moments = _stats(x, mask, ranks)
        _check_count(moments, x)
        y = reference.apply(x, moments, affine, residual)
        count = moments.count
        if isinstance(count, int) and not torch.compiler.is_compiling():
            # A number that is no tensor can leave neither vmap nor grad(has_aux=True).
            count = torch.as_tensor(count, device=x.device)
        return y, Moments(moments.mean.detach(), moments.var.detach(), count)
    with torch.no_grad():
        moments = _stats(x, mask, ranks)
    _check_count(moments, x)
    return _apply_function(x, residual, moments, affine, mask, ranks, is_estimated=True), moments


def _stats(x: torch.Tensor, mask: torch.Tensor | None, ranks: Ranks | None) -> Moments:
    moments = reference.stats(x, mask)
    return moments if ranks is None else ranks.merge(moments)


def _normalise(x: torch.Tensor, residual: torch.Tensor | None, statistics: Statistics, affine: Affine) -> torch.Tensor:
    """Inference: (N, C, L) activations normalised with given statistics."""
    is_differentiated = statistics.mean.requires_grad or statistics.var.requires_grad
    if _must_look_inside() or (torch.is_grad_enabled() and is_differentiated):
        return reference.apply(x, statistics, affine, residual)
    return _apply_function(x, residual, statistics, affine, None, None, is_estimated=False)


def _in_memory_format(y: torch.Tensor, view: View) -> torch.Tensor:
    """`y` as torch's own layers return it, contiguous or channels-last, so that y.view(...) goes on working.

    Kernels keep the strides of x, which may be a transpose's. With channels on another axis there is no such custom.
    """
    if view.axes != (1,) or y.is_contiguous() or torch._C._are_functorch_transforms_active():
        return y
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.ndim)
    return y if last is not None and y.is_contiguous(memory_format=last) else y.contiguous()


def _without_garbage(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N, C, L) `x` with 0 where `mask`, (N, 1, L), leaves out what would make NaN of a gradient of 0."""
    limit = min(torch.finfo(x.dtype).max, torch.finfo(torch.promote_types(x.dtype, torch.float32)).max ** 0.5)
    return x.masked_fill(~(mask | (x.abs() <= limit)), 0)


def can_read(values: torch.Tensor) -> bool:
    """Whether numbers can be read now: no accelerator has to stop for it, and no compiler or tracer follows."""
    return bool(
        values.device.type == "cpu"
        and not _must_look_inside()
        and type(values) is torch.Tensor  # fake tensors have no numbers, even where no mode is on
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _must_look_inside() -> bool:
    """Whether somebody transforms the operations themselves: a compiler, torch.func, forward-mode autograd."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or forward_ad._current_level >= 0
    )


def _apply_function(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    statistics: Statistics,
    affine: Affine,
    mask: torch.Tensor | None,
    ranks: Ranks | None,
    *,
    is_estimated: bool,
) -> torch.Tensor:
    y: torch.Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
        x, affine.weight, affine.bias, residual, mask, statistics, affine.eps, affine.activation, is_estimated, ranks
    )
    return y


class _Normalise(torch.autograd.Function):
    """Normalisation for autograd; `is_estimated` says that the statistics are those of x and answer to its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        mask: torch.Tensor | None,
        statistics: Statistics,
        eps: float,
        activation: Activation | None,
        is_estimated: bool,
        ranks: Ranks | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias, residual if activation is not None else None, mask)
        if not is_estimated and any(ctx.needs_input_grad):
            # Buffers: a training step before backward would write to them, and the gradient would be another's.
            statistics = Running(statistics.mean.clone(), statistics.var.clone())
        ctx.statistics, ctx.is_estimated, ctx.ranks = statistics, is_estimated, ranks
        ctx.eps, ctx.activation, ctx.has_residual = eps, activation, residual is not None
        return reference.apply(x, statistics, Affine(weight, bias, eps, activation), residual)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, bias, residual, mask = ctx.saved_tensors
        affine = Affine(weight, bias, ctx.eps, ctx.activation)
        if torch.is_grad_enabled():  # create_graph=True: somebody wants to differentiate the gradient
            return (*_differentiable_backward(ctx, dy, x, affine, residual, mask), *[None] * 6)
        for_x, for_weight, for_bias, for_residual = ctx.needs_input_grad[:4]
        sums = None
        if for_weight or for_bias or (for_x and ctx.is_estimated):
            sums = reference.backward_reduce(dy, x, ctx.statistics, affine, residual)
        dx = dresidual = None
        if for_x or for_residual:
            # Without an activation the residual's value plays no part in backward, only its place.
            stand_in = dy if ctx.has_residual and residual is None else residual
            dx, dresidual = reference.backward_apply(
                dy, x, ctx.statistics, affine, stand_in, sums=_answer(ctx, sums, for_x), mask=mask
            )
        return (
            dx if for_x else None,
            sums.dz_xhat.to(weight.dtype) if sums is not None and for_weight else None,
            sums.dz.to(bias.dtype) if sums is not None and for_bias else None,
            dresidual if for_residual else None,
            *[None] * 6,
        )


def _answer(ctx: Any, sums: BackwardSums | None, for_x: bool) -> BackwardSums | None:
    """The sums by which mean and variance answer to dy: over all ranks where there are several."""
    if sums is None or not ctx.is_estimated:
        return None
    if ctx.ranks is None or not for_x:
        return sums
    return BackwardSums(*ctx.ranks.sum(torch.stack([sums.dz, sums.dz_xhat])))


def _differentiable_backward(
    ctx: Any,
    dy: torch.Tensor,
    x: torch.Tensor,
    affine: Affine,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """The same gradients by way of the reference's own operations, which autograd can follow once more."""
    with torch.enable_grad():
        statistics = _stats(x, mask, ctx.ranks) if ctx.is_estimated else ctx.statistics
        y = reference.apply(x, statistics, affine, residual)
    inputs = [x, affine.weight, affine.bias, residual]
    wanted = [i for i, given in enumerate(inputs) if given is not None and ctx.needs_input_grad[i]]
    grads: list[torch.Tensor | None] = [None] * 4
    found: tuple[torch.Tensor, ...] = ()
    if wanted:
        found = torch.autograd.grad(y, [inputs[i] for i in wanted], dy, create_graph=True)  # type: ignore[arg-type]
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    if ctx.has_residual and residual is None and ctx.needs_input_grad[3]:
        grads[3] = dy
    return grads


def check_activation(activation: str | None) -> None:
    """Raises ArgumentError, which lists the names, unless `activation` is one of them or None."""
    if activation is not None and activation not in get_args(Activation):
        raise ArgumentError(f"activation must be one of {', '.join(get_args(Activation))} or None; got {activation!r}.")


def _check_values(x: torch.Tensor, eps: float, activation: str | None) -> None:
    if not isinstance(x, torch.Tensor):
        raise DtypeError(f"input must be a float tensor, got {type(x).__name__}: pass torch.as_tensor(x).")
    if not x.is_floating_point():
        raise DtypeError(f"input must be a float tensor, got {x.dtype} of shape {tuple(x.shape)}: pass x.float().")
    if not eps >= 0:
        raise ArgumentError(f"eps must be at least 0, got {eps}.")
    check_activation(activation)


def _check_channels(name: str, given: torch.Tensor | None, view: View, x: torch.Tensor) -> None:
    if given is None:
        return
    if tuple(given.shape) != view.channels:
        raise ShapeError(
            f"{name} must have the shape of the channels, {view.channels}, for an input of shape {view.shape} "
            f"with channels on axis {view.axes}; got {tuple(given.shape)}."
        )
    is_half = x.dtype in (torch.float16, torch.bfloat16)
    if given.dtype != x.dtype and not (is_half and given.dtype == torch.float32):
        hint = f"{x.dtype} or torch.float32" if is_half else f"{x.dtype}"
        raise DtypeError(
            f"{name} is {given.dtype} but the input is {x.dtype}: expected {hint}. "
            "Convert one of them (module.to or x.to)."
        )


def _check_residual(residual: torch.Tensor | None, x: torch.Tensor) -> None:
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ShapeError(f"residual must have the shape of the input, {tuple(x.shape)}; got {tuple(residual.shape)}.")
    if residual.dtype != x.dtype:
        raise DtypeError(
            f"residual must have the dtype of the input, {x.dtype}; got {residual.dtype}: pass residual.to(x)."
        )


def _check_mask_dtype(mask: torch.Tensor | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise DtypeError(f"mask must be a bool tensor, got {type(mask).__name__}: pass torch.as_tensor(mask).")
    if mask.dtype != torch.bool:
        raise DtypeError(f"mask must be bool (True = counts), got {mask.dtype}: pass mask != 0.")


def _check_moments(moments: Statistics, view: View) -> None:
    for name, given in (("mean", moments.mean), ("var", moments.var)):
        if not isinstance(given, torch.Tensor):
            raise DtypeError(f"moments.{name} must be a tensor, got {type(given).__name__}: use torch.as_tensor.")
        if tuple(given.shape) != view.channels:
            raise ShapeError(
                f"moments.{name} must have the shape of the channels, {view.channels}, "
                f"for an input of shape {view.shape}; got {tuple(given.shape)}."
            )


def _check_count(moments: Moments, x: torch.Tensor) -> None:
    count = moments.count
    if isinstance(count, torch.Tensor):
        if not can_read(count) or count.numel() == 0:
            return
        count = int(count.min())
    if count == 1:
        raise ShapeError(
            f"Expected more than 1 value per channel when training, got 1 in an input of shape {tuple(x.shape)} "
            "(N, C, L): the variance of one value is 0. Use a larger batch, drop the last short batch "
            "(DataLoader(drop_last=True)), or call eval() to normalise with running statistics."
        )


def _flat(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return parameter if parameter is None or parameter.ndim == 1 else parameter.reshape(-1)


def _reshaped(statistics: Any, shape: tuple[int, ...]) -> Any:
    if len(shape) == statistics.mean.ndim:
        return statistics
    parts = {"mean": statistics.mean.reshape(shape), "var": statistics.var.reshape(shape)}
    if isinstance(statistics, Moments):
        count: Any = statistics.count
        return Moments(**parts, count=count.reshape(shape) if isinstance(count, torch.Tensor) and count.ndim else count)
    return type(statistics)(**parts)
