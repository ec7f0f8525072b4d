"""dual_batch_norm(): the two branches that meet in a residual block, normalised and added up in one pass."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from batchnorm.kernels import dual
from batchnorm.kernels.checks import checked_view
from batchnorm.kernels.dispatch import dual_backend_for
from batchnorm.kernels.transforms import has_plain_memory, must_look_inside
from batchnorm.kernels.view import View
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running


def dual_batch_norm(first: torch.nn.Module, input: Tensor, second: torch.nn.Module, residual: Tensor) -> Tensor:
    """What `first(input, second(residual))` gives: activation(BN(input) + BN(residual)).

    A residual block with a convolution in its shortcut ends so: two layers, whose outputs are added up. On a GPU both
    inputs are normalised, added and activated in one pass, and neither layer's output is written: forward moves 5
    activations where the two layers move 7, backward 8 where they move 11, and what is kept for backward is the two
    inputs. Each layer has its own parameters, eps, momentum, running statistics and mode, and takes its batch into its
    statistics by its own rules; what comes out is the same, but that the second one's output is not rounded to the
    input's dtype in between.

    That is done on a GPU with plain tensors, for BatchNorm and BatchNorm1d to 3d without hooks, the second one without
    an activation. In any other case the one layer is called after the other: on a CPU, in compiled and exported code,
    under torch.func, and with any other module in the place of a layer.

    Args:
        first: a layer of ours, or what else takes `(input, residual)`; its activation is that of the sum.
        input: activations, (N, C, ...) with the channels on the layers' `channel_axis`, float.
        second: a layer that takes `(residual)`.
        residual: activations of the other branch; shape and dtype of the input.

    Returns:
        Shape, dtype and memory format of the input.

    Raises:
        ShapeError: as the layers; or input and residual have different shapes.
        DtypeError: as the layers; or input and residual have different dtypes.

    Example:
        >>> from batchnorm import BatchNorm2d
        >>> first, second = BatchNorm2d(8, activation="relu"), BatchNorm2d(8)
        >>> x, shortcut = torch.randn(4, 8, 6, 6), torch.randn(4, 8, 6, 6)
        >>> y = dual_batch_norm(first, x, second, shortcut)
        >>> torch.equal(y, first(x, second(shortcut)))
        True

    Source: Ioffe & Szegedy 2015, Alg. 1, twice; He et al. 2016 (arXiv 1512.03385), equation 2, for the block.
    """
    if not must_look_inside():
        y = _in_one_pass(first, input, second, residual)
        if y is not None:
            return y
    return cast(Tensor, first(input, second(residual)))


def _in_one_pass(first: torch.nn.Module, input: Tensor, second: torch.nn.Module, residual: Tensor) -> Tensor | None:
    """What `dual_batch_norm` gives; None, and nothing done, where that is not the way."""
    if not (type(input) is type(residual) is Tensor):
        return None
    backend = dual_backend_for(input)
    if backend is None or not (_runs_by_itself(first) and _runs_by_itself(second)):
        return None
    assert isinstance(first, BatchNorm)
    assert isinstance(second, BatchNorm)
    if second.activation is not None or second.channel_axis != first.channel_axis:
        return None
    if (residual.shape, residual.dtype, residual.device) != (input.shape, input.dtype, input.device):
        return None
    a, b = _operand(first, input), _operand(second, residual)
    if a is None or b is None or not has_plain_memory(residual):
        return None
    view = _checked_view(first, a)
    _checked_view(second, b)
    y, used = dual.batch_norm(a, b, first.activation, view=view, backend=backend)
    for layer, moments in ((second, used[1]), (first, used[0])):
        if layer.training and layer.track_running_stats:
            layer._commit(cast(Moments, moments))
    return y


def _runs_by_itself(layer: torch.nn.Module) -> bool:
    """Whether a call of the layer is BatchNorm's forward and nothing else: nobody listens to it or has replaced it."""
    return (
        isinstance(layer, BatchNorm)
        and type(layer).forward is BatchNorm.forward
        and type(layer).__call__ is torch.nn.Module.__call__
        and "forward" not in vars(layer)
        and getattr(layer, "_compiled_call_impl", None) is None
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _operand(layer: BatchNorm, x: Tensor) -> dual.Operand | None:
    """What the layer does to x; None where that is more than to normalise it and to commit the batch."""
    mean, var = layer.running_mean, layer.running_var
    if layer.training or (mean is None and var is None):
        return dual.Operand(x, layer.weight, layer.bias, layer.eps, None) if layer._trains_plainly else None
    if not layer._evaluates_plainly or mean is None or var is None or mean.requires_grad or var.requires_grad:
        return None
    return dual.Operand(x, layer.weight, layer.bias, layer.eps, Running(mean, var))


def _checked_view(layer: BatchNorm, operand: dual.Operand) -> View:
    """The view of x, after what the layer and `batch_norm` look at."""
    x, weight, bias, eps, given = operand
    layer._check_input_dim(x)
    return checked_view(x, weight, bias, moments=given, eps=eps, channel_axis=layer.channel_axis)
