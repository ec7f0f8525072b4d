"""A scale and a shift of channels, taken into the weights of a convolution or linear map before or after them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from batchnorm.surgery.inference_form import ScaleShift


class LinearMap(NamedTuple):
    """What of a linear map's call decides how channels go through it."""

    weight: torch.Tensor
    """Linear: (out, in); convolution: (out, in / groups, *kernel); transposed: (in, out / groups, *kernel)."""
    bias: torch.Tensor | None
    groups: int = 1
    is_transposed: bool = False

    @property
    def in_channels(self) -> int:
        """Channels, or features, of its input."""
        return self.weight.shape[0] if self.is_transposed else self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Of its output."""
        return self.weight.shape[1] * self.groups if self.is_transposed else self.weight.shape[0]


class Folded(NamedTuple):
    """New parameters, float64; the caller rounds them."""

    weight: torch.Tensor
    bias: torch.Tensor


def fold_behind(linear: LinearMap, after: ScaleShift) -> Folded:
    """The map that is `linear`, then the scale and shift of its output channels.

    scale * (W x + b) + shift = (scale W) x + (scale b + shift)
    """
    weight = linear.weight.detach().double()
    bias = after.shift if linear.bias is None else linear.bias.detach().double() * after.scale + after.shift
    if linear.is_transposed:
        return Folded(_by_out_channel(weight, after.scale, linear.groups), bias)
    return Folded(weight * after.scale.reshape(-1, *[1] * (weight.ndim - 1)), bias)


def fold_in_front(linear: LinearMap, before: ScaleShift) -> Folded:
    """The map that is a scale and shift of the input channels, then `linear`, away from zero padding.

    W (scale x + shift) + b = (W scale) x + (W shift + b)
    """
    weight = linear.weight.detach().double()
    if linear.is_transposed:
        scaled = weight * before.scale.reshape(-1, *[1] * (weight.ndim - 1))
        shifted = weight * before.shift.reshape(-1, *[1] * (weight.ndim - 1))
        constant = shifted.reshape(linear.groups, -1, *weight.shape[1:]).flatten(3).sum((1, 3)).flatten()
    else:
        # (out, in / groups) of each group's part of the channels.
        scale, shift = (
            part.reshape(linear.groups, 1, -1).expand(-1, weight.shape[0] // linear.groups, -1).flatten(0, 1)
            for part in before
        )
        tail = [1] * (weight.ndim - 2)
        scaled = weight * scale.reshape(*scale.shape, *tail)
        constant = (weight * shift.reshape(*shift.shape, *tail)).flatten(1).sum(1)
    return Folded(scaled, constant if linear.bias is None else constant + linear.bias.detach().double())


def write(module: torch.nn.Module, folded: Folded) -> None:
    """Rounds the new parameters into those of `module`: the very Parameters, but for a bias that was not there.

    Optimizers and other holders go on with them.
    """
    one: Any = module
    with torch.no_grad():
        one.weight.copy_(folded.weight)
        if one.bias is not None:
            one.bias.copy_(folded.bias)
        else:
            bias = torch.nn.Parameter(folded.bias.to(one.weight.dtype), requires_grad=one.weight.requires_grad)
            one.register_parameter("bias", bias)


def survives_rounding(folded: Folded, dtype: torch.dtype) -> bool:
    """Whether the numbers are still finite in `dtype`: float16 ends at 65504."""
    return all(bool(part.to(dtype).isfinite().all()) for part in folded)


def _by_out_channel(weight: torch.Tensor, scale: torch.Tensor, groups: int) -> torch.Tensor:
    """A transposed convolution's weight, (in, out / groups, *kernel), times a number for each output channel."""
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (split * scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))).reshape(weight.shape)
