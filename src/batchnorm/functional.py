"""batch_norm(): the one door to the kernels, to autograd and to torch.compile."""

from __future__ import annotations

import math
from typing import Any, cast, get_args

import numpy as np
import torch
import torch.utils._pytree
from torch.autograd import forward_ad

from batchnorm.errors import ArgumentError, DtypeError, ShapeError
from batchnorm.kernels import reference
from batchnorm.kernels.arrays import moments_to_arrays, statistics_to_tensors, to_tensor
from batchnorm.kernels.contract import Activation, Affine, Backend, BackwardSums, Statistics
from batchnorm.kernels.dispatch import backend_at_once, backend_for
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
    if isinstance(x, np.ndarray):
        return _of_arrays(x, weight, bias, moments, eps, channel_axis, mask, activation, residual)
    looks_inside = _must_look_inside()
    backend: Backend | None = None
    mask3: torch.Tensor | None = None
    if not looks_inside and mask is None and channel_axis == 1 and eps >= 0 and activation in _KNOWN:
        backend = backend_at_once(x, weight, bias, residual, moments)
    if backend is not None:
        view = View(x.shape, (1,))
    else:
        view = _checked(x, weight, bias, moments, eps, channel_axis, mask, activation, residual)
        mask3 = None if mask is None else view.fold_mask(mask)
        if mask3 is not None:
            x = _without_garbage(x, mask3, view)
            residual = None if residual is None else _without_garbage(residual, mask3, view)
    if looks_inside or (moments is not None and _answers_to_gradient(moments)):
        affine = Affine(_flat(weight), _flat(bias), eps, activation)
        y, used = _by_operations(x, affine, residual, mask3, moments, view, ranks)
        return _in_memory_format(y, view), used
    work = _Work(view, backend or backend_for(x), mask3 if moments is None else None, moments, eps, activation, ranks)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        y = _Normalise.apply(x, weight, bias, residual, work)  # type: ignore[no-untyped-call]
    else:
        y = work.forward(x, weight, bias, residual)
    return _in_memory_format(y, view), work.used


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


_KNOWN = frozenset({None, *get_args(Activation)})


def _checked(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    moments: Statistics | None,
    eps: float,
    channel_axis: int | tuple[int, ...],
    mask: torch.Tensor | None,
    activation: Activation | None,
    residual: torch.Tensor | None,
) -> View:
    """The view of x, after everything that could be wrong was looked at."""
    _check_values(x, eps, activation)
    view = View.of(x, channel_axis)
    _check_channels("weight", weight, view, x)
    _check_channels("bias", bias, view, x)
    _check_residual(residual, x)
    _check_mask_dtype(mask)
    if moments is not None:
        _check_moments(moments, view)
    return view


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
        moments: Moments = _reshaped(_backend(x).stats(view.fold(x.detach()), mask3), view.channels)
    return moments


def _backend(x: torch.Tensor) -> Backend:
    return cast(Backend, reference) if _must_look_inside() else backend_for(x)


def _by_operations(
    x: torch.Tensor,
    affine: Affine,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    moments: Statistics | None,
    view: View,
    ranks: Ranks | None,
) -> tuple[torch.Tensor, Statistics]:
    """By the reference's operations, for whoever transforms these: a compiler, torch.func, forward-mode autograd."""
    x3 = view.fold(x)
    residual3 = None if residual is None else view.fold(residual)
    if moments is not None:
        return view.unfold(reference.apply(x3, _reshaped(moments, (-1,)), affine, residual3)), moments
    found = _merged(reference.stats(x3, mask), ranks)
    _check_count(found, x3)
    y = reference.apply(x3, found, affine, residual3)
    count = found.count
    if isinstance(count, int) and not torch.compiler.is_compiling():
        # A number that is no tensor can leave neither vmap nor grad(has_aux=True).
        count = torch.as_tensor(count, device=x.device)
    used = Moments(found.mean.detach(), found.var.detach(), count)
    return view.unfold(y), _reshaped(used, view.channels)


def _merged(moments: Moments, ranks: Ranks | None) -> Moments:
    return moments if ranks is None else ranks.merge(moments)


def _in_memory_format(y: torch.Tensor, view: View) -> torch.Tensor:
    """`y` as torch's own layers return it, contiguous or channels-last, so that y.view(...) goes on working.

    Kernels keep the strides of x, which may be a transpose's. With channels on another axis there is no such custom.
    """
    if view.axes != (1,) or y.is_contiguous() or torch._C._are_functorch_transforms_active():
        return y
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.ndim)
    return y if last is not None and y.is_contiguous(memory_format=last) else y.contiguous()


def _without_garbage(x: torch.Tensor, mask: torch.Tensor, view: View) -> torch.Tensor:
    """`x` with 0 where `mask`, (N, 1, L), leaves out what would make NaN of a gradient of 0."""
    x3 = view.fold(x)
    limit = min(torch.finfo(x.dtype).max, torch.finfo(torch.promote_types(x.dtype, torch.float32)).max ** 0.5)
    return view.unfold(x3.masked_fill(~(mask | (x3.abs() <= limit)), 0))


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
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _answers_to_gradient(moments: Statistics) -> bool:
    return torch.is_grad_enabled() and bool(moments.mean.requires_grad or moments.var.requires_grad)


class _Work:
    """One normalisation by a backend: everything about it that autograd has no part in."""

    __slots__ = ("activation", "backend", "eps", "folded", "given", "is_whole", "mask", "ranks", "used", "view")

    def __init__(
        self,
        view: View,
        backend: Backend,
        mask: torch.Tensor | None,
        given: Statistics | None,
        eps: float,
        activation: Activation | None,
        ranks: Ranks | None,
    ) -> None:
        """`mask` is (N, 1, L), bool; `given` is what to normalise with, None takes the batch's own."""
        self.view, self.mask, self.given, self.ranks = view, mask, given, ranks
        self.eps, self.activation = eps, activation
        self.used: Any = given
        self.folded: Any = None if given is None else _reshaped(given, (-1,))
        self.set_backend(backend)

    def set_backend(self, backend: Backend) -> None:
        self.backend = backend
        self.is_whole = backend.folds and self.view.axes == (1,)

    def affine(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Affine:
        return Affine(_flat(weight), _flat(bias), self.eps, self.activation)

    def fold(self, x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None or self.is_whole:
            return x
        return self.view.fold(x)

    def unfold(self, y: torch.Tensor | None) -> torch.Tensor | None:
        if y is None or self.is_whole:
            return y
        return self.view.unfold(y)

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """y; the statistics it was made with are then in `used`, and as (C,) in `folded`."""
        affine = self.affine(weight, bias)
        x3, residual3 = cast(torch.Tensor, self.fold(x)), self.fold(residual)
        if self.given is not None:
            return cast(torch.Tensor, self.unfold(self.backend.apply(x3, self.folded, affine, residual3)))
        if self.ranks is not None:
            self.folded = self.ranks.merge(self.backend.stats(x3, self.mask))
            _check_count(self.folded, x3)
            y = self.backend.apply(x3, self.folded, affine, residual3)
        else:
            if self.mask is None:  # before any work: how many values there are is plain to see
                _check_number(x.numel() // max(math.prod(self.view.channels), 1), x)
            y, self.folded = self.backend.forward(x3, affine, residual3, self.mask)
            if self.mask is not None:
                _check_count(self.folded, x3)
        self.used = _reshaped(self.folded, self.view.channels)
        return cast(torch.Tensor, self.unfold(y))


class _Normalise(torch.autograd.Function):
    """Normalisation for autograd, by a backend's own backward; to be differentiated again, by operations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        work: _Work,
    ) -> torch.Tensor:
        y = work.forward(x, weight, bias, residual)
        if y._is_view():  # autograd refuses in-place operations, as of nn.ReLU(inplace=True), on a Function's view
            y = y.new_empty(0).set_(y)  # type: ignore[call-overload]
        # Without an activation the residual's value plays no part in backward, only its place.
        ctx.save_for_backward(x, weight, bias, residual if work.activation is not None else None)
        ctx.work, ctx.has_residual = work, residual is not None
        if work.given is not None:
            # Running statistics may move on before the backward pass.
            work.folded = Running(work.folded.mean.clone(), work.folded.var.clone())
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, bias, residual = ctx.saved_tensors
        work: _Work = ctx.work
        if torch.is_grad_enabled():  # create_graph=True: somebody wants to differentiate the gradient
            return (*_differentiable_backward(ctx, dy, x, weight, bias, residual), None)
        for_x, for_weight, for_bias, for_residual, _ = ctx.needs_input_grad
        # The gradient may be transformed where the input was not (is_grads_batched).
        work.set_backend(_backend(dy))
        backend, mask, is_estimated = work.backend, work.mask, work.given is None
        affine = work.affine(weight, bias)
        dy3, x3 = cast(torch.Tensor, work.fold(dy)), cast(torch.Tensor, work.fold(x))
        residual3 = dy3 if ctx.has_residual and residual is None else work.fold(residual)
        dx = dresidual = sums = None
        needs_sums = for_weight or for_bias or (for_x and is_estimated)
        if for_x and needs_sums and work.ranks is None:
            dx, dresidual, sums = backend.backward(
                dy3, x3, work.folded, affine, residual3, is_estimated=is_estimated, mask=mask
            )
        else:
            if needs_sums:
                sums = backend.backward_reduce(dy3, x3, work.folded, affine, residual3)
            if for_x or for_residual:
                # Over all ranks: mean and variance are those of all. Where only the residual asks, it needs no sums.
                answer = _over_ranks(sums, work.ranks) if for_x and is_estimated else None
                dx, dresidual = backend.backward_apply(
                    dy3, x3, work.folded, affine, residual3, sums=answer, mask=None if answer is None else mask
                )
        return (
            work.unfold(dx) if for_x else None,
            _like(sums.dz_xhat, weight) if sums is not None and for_weight else None,
            _like(sums.dz, bias) if sums is not None and for_bias else None,
            work.unfold(dresidual) if for_residual else None,
            None,
        )


def _over_ranks(sums: BackwardSums | None, ranks: Ranks | None) -> BackwardSums | None:
    if sums is None or ranks is None:
        return sums
    return BackwardSums(*ranks.sum(torch.stack([sums.dz, sums.dz_xhat])))


def _differentiable_backward(
    ctx: Any,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """The same gradients by way of the reference's own operations, which autograd can follow once more."""
    work: _Work = ctx.work
    with torch.enable_grad():
        x3 = work.view.fold(x)
        residual3 = None if residual is None else work.view.fold(residual)
        own = None if work.given is not None else _merged(reference.stats(x3, work.mask), work.ranks)
        statistics = work.folded if own is None else own
        y = work.view.unfold(reference.apply(x3, statistics, work.affine(weight, bias), residual3))
    inputs = [x, weight, bias, residual]
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
    _check_number(count, x)


def _check_number(count: int, x: torch.Tensor) -> None:
    if count == 1:
        raise ShapeError(
            f"Expected more than 1 value per channel when training, got 1 in an input of shape {tuple(x.shape)}: the "
            "variance of one value is 0. Use a larger batch, drop the last short batch (DataLoader(drop_last=True)), "
            "or call eval() to normalise with running statistics."
        )


def _flat(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return parameter if parameter is None or parameter.ndim == 1 else parameter.reshape(-1)


def _like(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if gradient.dtype != parameter.dtype:
        gradient = gradient.to(parameter.dtype)
    return gradient if gradient.ndim == parameter.ndim else gradient.reshape(parameter.shape)


def _reshaped(statistics: Any, shape: tuple[int, ...]) -> Any:
    if len(shape) == statistics.mean.ndim:
        return statistics
    parts = {"mean": statistics.mean.reshape(shape), "var": statistics.var.reshape(shape)}
    if isinstance(statistics, Moments):
        count: Any = statistics.count
        return Moments(**parts, count=count.reshape(shape) if isinstance(count, torch.Tensor) and count.ndim else count)
    return type(statistics)(**parts)
