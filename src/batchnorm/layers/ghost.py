"""GhostBatchNorm: the statistics of small parts of a large batch, each part normalised with its own."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, ShapeError
from batchnorm.functional import batch_norm
from batchnorm.kernels.contract import Activation
from batchnorm.kernels.view import View
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.layers.shapes import in_format_of
from batchnorm.stats.moments import Moments


class GhostBatchNorm(BatchNorm):
    """Batch normalization by ghost batches: each `ghost_size` examples in a row are normalised by themselves.

    A large batch so keeps the noise in its statistics that makes small batches generalise. The running statistics get
    the ghosts' Moments merged, once a batch: the exact moments of the whole batch, and one step of `momentum`, so that
    evaluation does not depend on `ghost_size`. (Hoffer et al. take a step for each ghost, and leave out the variance
    between the ghosts' means.) A shorter rest at the end of the batch is a ghost of its own; if it had but one value a
    channel it joins the ghost before it. Ghosts are cut along the first axis that is no channel axis, before masking.

    Args:
        num_features: number of channels, C; see BatchNorm.
        eps: added to the variance; unit of the input, squared.
        momentum: weight of the NEW batch in the running statistics; None keeps the plain average over all batches.
        affine: whether there are weight (gamma) and bias (beta), shared by all ghosts.
        track_running_stats: whether there are running statistics; without them evaluation uses ghosts too.
        device: of parameters and buffers.
        dtype: of parameters and buffers; running statistics are float32 at least.
        ghost_size: examples in a ghost batch, at least 1.
        bias: whether there is a beta where `affine` is on.
        activation: fused into the layer; see BatchNorm.
        channel_axis: the axis of the channels, or a tuple of axes.

    Raises:
        ArgumentError: ghost_size is no int or below 1.
        ShapeError: (forward) a ghost has one value a channel; names the sizes.

    Example:
        >>> layer = GhostBatchNorm(3, ghost_size=4)
        >>> y = layer(torch.randn(10, 3))  # ghosts of 4, 4 and 2
        >>> bool(y[:4].mean(0).abs().max() < 1e-6), bool(y[8:].mean(0).abs().max() < 1e-6)
        (True, True)

    Source: Hoffer, Hubara & Soudry 2017 (arXiv 1705.08741), Alg. 1.
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        ghost_size: int = 32,
        bias: bool = True,
        activation: Activation | None = None,
        channel_axis: int | tuple[int, ...] = 1,
    ) -> None:
        if not isinstance(ghost_size, int) or ghost_size < 1:
            raise ArgumentError(f"ghost_size must be an int of at least 1 example, got {ghost_size!r}.")
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            channel_axis=channel_axis,
        )
        self.ghost_size = ghost_size

    def _by_batch(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Moments]:
        channels = View.of(input, self.channel_axis).axes
        others = [axis for axis in range(input.ndim) if axis not in channels]
        if not others:
            return super()._by_batch(input, residual, mask)
        batch_axis = others[0]
        per_example = math.prod([input.shape[axis] for axis in others[1:]])
        cuts = _cuts(input.shape[batch_axis], per_example, self.ghost_size)
        if mask is not None:
            mask = _whole(mask, [input.shape[axis] for axis in others], input)
            # What counts differs from ghost to ghost, and one call has one mask for all its channels.
            cuts = [single for cut in cuts for single in cut.apart()]
        parts = [self._stack(cut, input, residual, mask, channels, batch_axis) for cut in cuts]
        y = parts[0][0] if len(parts) == 1 else torch.cat([part for part, _ in parts], batch_axis)
        return in_format_of(input, y), Moments.merge(*(moments for _, moments in parts))

    def _stack(
        self,
        cut: _Cut,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        channels: tuple[int, ...],
        batch_axis: int,
    ) -> tuple[Tensor, Moments]:
        """The ghosts of one cut at once, as channels of their own; their output joined, their Moments merged."""
        axes = tuple(sorted([batch_axis, *(axis + (axis > batch_axis) for axis in channels)]))
        position = axes.index(batch_axis)
        y, moments = batch_norm(
            cut.of(input, batch_axis),
            None if self.weight is None else _repeated(self.weight, cut.number, position),
            None if self.bias is None else _repeated(self.bias, cut.number, position),
            eps=self.eps,
            channel_axis=axes,
            mask=None if mask is None else cut.of(mask, 0).squeeze(0),
            activation=self.activation,
            residual=None if residual is None else cut.of(residual, batch_axis),
        )
        return y.flatten(batch_axis, batch_axis + 1), cast(Moments, moments).merge_along(position)

    def extra_repr(self) -> str:
        """What repr() shows between the parentheses."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class _Cut(NamedTuple):
    """`number` ghosts of `size` examples each, from example `start` on."""

    start: int
    number: int
    size: int

    def of(self, whole: Tensor, axis: int) -> Tensor:
        """(..., N, ...) with N on `axis` as (..., number, size, ...): a view."""
        part = whole.narrow(axis, self.start, self.number * self.size)
        return part.reshape(*whole.shape[:axis], self.number, self.size, *whole.shape[axis + 1 :])

    def apart(self) -> list[_Cut]:
        return [_Cut(self.start + i * self.size, 1, self.size) for i in range(self.number)]


def _cuts(examples: int, values: int, size: int) -> list[_Cut]:
    """Where the ghosts lie among `examples` with `values` values a channel each: the whole ones, then the rest."""
    rest = examples % size
    if rest * values == 1 and examples > size:
        rest += size
    number = (examples - rest) // size
    cuts = [_Cut(0, number, size)] if number else []
    if rest or not cuts:
        cuts.append(_Cut(examples - rest, 1, rest))
    return cuts


def _repeated(parameter: Tensor, number: int, position: int) -> Tensor:
    shape = parameter.shape
    return parameter.unsqueeze(position).expand(*shape[:position], number, *shape[position:])


def _whole(mask: Tensor, others: list[int], input: Tensor) -> Tensor:
    try:
        return mask.expand(others)
    except RuntimeError:
        raise ShapeError(
            f"mask of shape {tuple(mask.shape)} does not fit an input of shape {tuple(input.shape)}: "
            f"it must have the input's shape without its channel axis, {tuple(others)}, or broadcast to it."
        ) from None
