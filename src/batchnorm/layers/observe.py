"""What a batch normalization layer sees: the Moments of its input, in float64 whatever the input's dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from batchnorm.errors import ShapeError
from batchnorm.kernels.dispatch import wide_stats
from batchnorm.kernels.view import View
from batchnorm.layers.decorrelated import DecorrelatedBatchNorm
from batchnorm.layers.inventory import BatchNormalization
from batchnorm.layers.shapes import check_channels
from batchnorm.stats.moments import Moments

_PART_ON_CPU = 2**18
"""Values that are widened at once: 2 MB in float64, which mostly stays in the caches between the passes over it."""
_PART_ELSEWHERE = 2**25


def input_moments(layer: BatchNormalization, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Moments:
    """Moments of the input of one call of `layer`, with its channel axis and its mask.

    The values are widened before anything is added up: the Moments of float32 activations are those of one float64
    pass, so that it does not matter into which batches they come.

    Args:
        layer: any batch normalization layer of torch.nn or of this library.
        args: positional arguments of the call; the first is the input, (N, C, ...).
        kwargs: keyword arguments of the call; `input` and `mask` are looked at.

    Returns:
        Moments with the shape of the layer's running statistics, on the input's device; for DecorrelatedBatchNorm
        GroupMoments.

    Raises:
        ShapeError: the input does not have the layer's channels.
    """
    x = input_of(args, kwargs)
    if isinstance(layer, DecorrelatedBatchNorm):
        check_channels(layer, x)
        return layer.moments(x, kwargs.get("mask"))
    axis = getattr(layer, "channel_axis", 1)
    mask = kwargs.get("mask")
    if axis == 1:
        if x.ndim < 2:
            raise ShapeError(f"{layer!r} got an input of shape {tuple(x.shape)}: expected (N, C, ...).")
        running_mean = layer._buffers["running_mean"]
        if mask is None and (running_mean is None or len(running_mean) == x.shape[1]):
            whole = wide_stats(x)  # of the input as it is: small batches are done before a view of them is made
            if whole is not None:
                return whole
    view = View.of(x, axis)
    expected = view.channels if layer.running_mean is None else tuple(layer.running_mean.shape)
    if view.channels != expected:
        raise ShapeError(
            f"{layer!r} keeps statistics of shape {expected} and got {view.channels} channels "
            f"(input of shape {tuple(x.shape)})."
        )
    whole = _in_parts(view.fold(x.detach()), None if mask is None else view.fold_mask(mask))
    if len(expected) == 1:
        return whole
    count = whole.count.reshape(expected) if isinstance(whole.count, torch.Tensor) else whole.count
    return Moments(whole.mean.reshape(expected), whole.var.reshape(expected), count)


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The input among the arguments of a layer's call."""
    x: torch.Tensor = args[0] if args else kwargs["input"]
    return x


def _in_parts(x: torch.Tensor, mask: torch.Tensor | None) -> Moments:
    """Moments of (N, C, L) `x` over N and L."""
    if mask is None and (whole := wide_stats(x)) is not None:
        return whole
    if x.device.type == "mps":  # has no float64
        return Moments.of(x, (0, 2), mask)
    most = _PART_ON_CPU if x.device.type == "cpu" else _PART_ELSEWHERE
    rows = max(1, most * max(len(x), 1) // max(x.numel(), 1))
    if mask is not None:
        masks = _rows(mask, rows)
        parts = [Moments.of(part.double(), (0, 2), of) for part, of in zip(_rows(x, rows), masks, strict=True)]
    else:
        # One workspace for all parts: an allocator that gives memory back to the system between them costs more than
        # the arithmetic.
        workspace = torch.empty_like(x[:rows], dtype=torch.float64)
        parts = [_of_wide(workspace[: len(part)].copy_(part)) for part in _rows(x, rows)]
    return parts[0] if len(parts) == 1 else parts[0].merge(*parts[1:])


def _of_wide(x: torch.Tensor) -> Moments:
    """`Moments.of(x, (0, 2))`, (N, C, L) in float64, written over x: a third of the time, for want of temporaries."""
    count = x.shape[0] * x.shape[2]
    if count == 0:
        return Moments.of(x, (0, 2))
    mean = x.mean((0, 2))
    return Moments(mean, x.sub_(mean.unsqueeze(-1)).square_().mean((0, 2)), count)


def _rows(x: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    return torch.split(x, size)
