"""What a layer asks of its input's shape, and the memory format it answers in."""

from __future__ import annotations

from typing import Protocol

import torch

from batchnorm.errors import ShapeError


class HasChannels(Protocol):
    """A layer with channels on some axes."""

    @property
    def num_features(self) -> int | tuple[int, ...]:
        """Their number, or the sizes of several axes."""
        ...

    @property
    def channel_axis(self) -> int | tuple[int, ...]:
        """Where they are."""
        ...


def check_channels(layer: HasChannels, input: torch.Tensor) -> None:
    """Raises ShapeError unless `input` has the layer's number of channels where the layer looks for them."""
    if layer.channel_axis == 1 and input.dim() > 1 and input.shape[1] == layer.num_features:
        return  # the common case, at once: this runs in front of every small kernel
    axes = layer.channel_axis if isinstance(layer.channel_axis, tuple) else (layer.channel_axis,)
    expected = layer.num_features if isinstance(layer.num_features, tuple) else (layer.num_features,)
    name, shape = type(layer).__name__, tuple(input.shape)
    if any(not -input.dim() <= axis < input.dim() for axis in axes):
        raise ShapeError(
            f"{name} has its channels on axis {layer.channel_axis}, which an input of shape {shape} does not have."
        )
    sizes = tuple(input.shape[axis] for axis in sorted(axis % input.dim() for axis in axes))
    if sizes != expected:
        raise ShapeError(
            f"{name} expected {layer.num_features} channels on axis {layer.channel_axis}, got "
            f"{sizes if len(sizes) > 1 else sizes[0]} (input of shape {shape}): make the layer with "
            "num_features of that size, or check the order of the input's axes."
        )


def in_format_of(input: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`y`, of the input's shape, in channels-last memory where the input is, and contiguous elsewhere."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.ndim)
    if last is not None and input.is_contiguous(memory_format=last) and not input.is_contiguous():
        return y.contiguous(memory_format=last)
    return y.contiguous()
