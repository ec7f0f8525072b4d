"""What could be wrong with the arguments of a normalisation, and the errors that say so."""

from __future__ import annotations

from typing import get_args

import torch

from batchnorm.errors import ArgumentError, DtypeError, ShapeError
from batchnorm.kernels.contract import Activation, Statistics
from batchnorm.kernels.transforms import can_read
from batchnorm.kernels.view import View
from batchnorm.stats.moments import Moments

ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def checked_view(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    moments: Statistics | None = None,
    eps: float = 0.0,
    channel_axis: int | tuple[int, ...] = 1,
    mask: torch.Tensor | None = None,
    activation: str | None = None,
) -> View:
    """The view of x, after everything that could be wrong was looked at; arguments and errors of `batch_norm`."""
    _check_values(x, eps)
    check_activation(activation)
    view = View.of(x, channel_axis)
    _check_channels("weight", weight, view, x)
    _check_channels("bias", bias, view, x)
    _check_residual(residual, x)
    _check_mask_dtype(mask)
    if moments is not None:
        _check_moments(moments, view)
    return view


def check_activation(activation: str | None) -> None:
    """Raises ArgumentError, which lists the names, unless `activation` is one of them or None."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ArgumentError(f"activation must be one of {', '.join(ACTIVATIONS)} or None; got {activation!r}.")


def _check_values(x: torch.Tensor, eps: float) -> None:
    if not isinstance(x, torch.Tensor):
        raise DtypeError(f"input must be a float tensor, got {type(x).__name__}: pass torch.as_tensor(x).")
    if not x.is_floating_point():
        raise DtypeError(f"input must be a float tensor, got {x.dtype} of shape {tuple(x.shape)}: pass x.float().")
    if not eps >= 0:
        raise ArgumentError(f"eps must be at least 0, got {eps}.")


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


def check_out(
    out: torch.Tensor,
    x: torch.Tensor,
    operands: tuple[torch.Tensor | None, ...],
    moments: Statistics | None,
    ranks: object,
) -> None:
    """Raises unless the output with these moments may be written to `out`, a tensor like x."""
    if moments is None or ranks is not None:
        raise ArgumentError(
            "out= needs moments=: with the batch's own statistics the input is read again in backward, "
            "and must stay. Pass moments (a layer: call eval()), or leave out= away."
        )
    if not isinstance(x, torch.Tensor) or not isinstance(out, torch.Tensor):
        raise DtypeError(f"out= takes tensors, got {type(out).__name__} for an input of {type(x).__name__}.")
    if out.shape != x.shape:
        raise ShapeError(f"out must have the shape of the input, {tuple(x.shape)}; got {tuple(out.shape)}.")
    if out.dtype != x.dtype or out.device != x.device:
        raise DtypeError(
            f"out must have dtype and device of the input, {x.dtype} on {x.device}; got {out.dtype} on {out.device}."
        )
    followed = (x, out, *operands, moments.mean, moments.var)
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in followed):
        raise ArgumentError(
            "out= is for inference, but autograd follows this call and would need the input for backward: "
            "call it under torch.no_grad() or torch.inference_mode(), or leave out= away."
        )


def check_count(moments: Moments, x: torch.Tensor) -> None:
    """Raises ShapeError where a channel's Moments come from one value, and that can be read."""
    count = moments.count
    if isinstance(count, torch.Tensor):
        if not can_read(count) or count.numel() == 0:
            return
        count = int(count.min())
    check_number(count, x)


def check_number(count: int, x: torch.Tensor) -> None:
    """Raises ShapeError where `count` values a channel are one."""
    if count == 1:
        raise ShapeError(
            f"Expected more than 1 value per channel when training, got 1 in an input of shape {tuple(x.shape)}: the "
            "variance of one value is 0. Use a larger batch, drop the last short batch (DataLoader(drop_last=True)), "
            "or call eval() to normalise with running statistics."
        )
