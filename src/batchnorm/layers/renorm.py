"""BatchRenorm: batch normalization whose training output follows the running statistics, within bounds that widen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeAlias, cast

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError
from batchnorm.functional import batch_moments, batch_norm
from batchnorm.kernels.contract import Activation
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.layers.commit import is_recomputed
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running

Schedule: TypeAlias = Sequence[tuple[int, float]]
"""(step, value) pairs, steps ascending: linear between them, constant before the first and after the last."""


class BatchRenorm(BatchNorm):
    """Batch normalization that corrects each batch's statistics towards the running ones, which evaluation uses.

    y = activation(((x - mean) / s * r + d) * weight + bias + residual), s = sqrt(var + eps) of the batch,
    r = s / sqrt(running_var + eps) within [1 / r_max, r_max], d = (mean - running_mean) / sqrt(running_var + eps)
    within [-d_max, d_max]. r and d are constants to the gradient; mean and s are not. Without the bounds training and
    evaluation give the same output; with r_max = 1 and d_max = 0 it is BatchNorm.

    The schedule counts the batches that entered the running statistics, num_batches_tracked: the state of the layer is
    that of torch.nn's, a checkpoint goes on where it was, and resetting the running statistics starts again.
    We differ from the paper in what is averaged: variances and not standard deviations, as in torch.nn.

    Under activation checkpointing the segment is computed again with the running statistics of the last forward pass
    before: run backward before the next forward pass through the same layer.

    Args:
        num_features: number of channels, C; see BatchNorm.
        eps: added to the variance; unit of the input, squared.
        momentum: weight of the NEW batch in the running statistics; the paper's 0.01, not BatchNorm's 0.1, since the
            correction needs running statistics that are steadier than a batch's.
        affine: whether there are weight (gamma) and bias (beta).
        device: of parameters and buffers.
        dtype: of parameters and buffers; running statistics are float32 at least.
        r_max: (step, value) pairs; the default is the paper's: 1 for 5,000 steps, then up to 3 at 40,000.
        d_max: likewise; 0 for 5,000 steps, then up to 5 at 25,000.
        bias: whether there is a beta where `affine` is on.
        activation: fused into the layer; see BatchNorm.
        channel_axis: the axis of the channels, or a tuple of axes.

    Raises:
        ArgumentError: a schedule is empty or its steps do not ascend, an r_max is below 1, or a d_max below 0.

    Example:
        >>> layer = BatchRenorm(3, r_max=[(0, 3.0)], d_max=[(0, 5.0)])  # the full correction from the start
        >>> x = torch.randn(16, 3)
        >>> torch.allclose(layer(x), (x - 0) / (1 + 1e-5) ** 0.5, atol=1e-5)  # running mean 0 and variance 1
        True

    Source: Ioffe 2017 (arXiv 1702.03275), Alg. 1; the schedule: section 4.
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        r_max: Schedule = ((5_000, 1.0), (40_000, 3.0)),
        d_max: Schedule = ((5_000, 0.0), (25_000, 5.0)),
        bias: bool = True,
        activation: Activation | None = None,
        channel_axis: int | tuple[int, ...] = 1,
    ) -> None:
        _check("r_max", r_max, 1.0)
        _check("d_max", d_max, 0.0)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            True,
            device,
            dtype,
            bias=bias,
            activation=activation,
            channel_axis=channel_axis,
        )
        self.r_max, self.d_max = tuple(r_max), tuple(d_max)
        self._last = self._state()

    def _by_batch(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Moments]:
        r, d = self._correction(batch_moments(input, channel_axis=self.channel_axis, mask=mask))
        is_half = input.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if is_half else input.dtype
        y, moments = batch_norm(
            input,
            (r if self.weight is None else self.weight * r).to(dtype),
            self._shift(d).to(dtype),
            eps=self.eps,
            channel_axis=self.channel_axis,
            mask=mask,
            activation=self.activation,
            residual=residual,
        )
        return y, cast(Moments, moments)

    def _correction(self, batch: Moments) -> tuple[Tensor, Tensor]:
        """r and d, shape of the channels, float64, without gradient."""
        with torch.no_grad():
            running, steps = self._state_of_forward()
            std = (running.var.to(batch.var.dtype) + self.eps).sqrt()
            r_max, d_max = _at(self.r_max, steps), _at(self.d_max, steps)
            r = torch.clamp((batch.var + self.eps).sqrt() / std, 1 / r_max, r_max)
            d = torch.clamp((batch.mean - running.mean) / std, -d_max, d_max)
        return r, d

    def _shift(self, d: Tensor) -> Tensor:
        shift = d if self.weight is None else self.weight * d
        return shift if self.bias is None else shift + self.bias

    def _state_of_forward(self) -> tuple[Running, Tensor]:
        """What the correction answers to: the buffers now, or as they were in the forward pass that is recomputed."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self._state()
        if not is_recomputed():
            running, steps = self._state()
            self._last = Running(running.mean.clone(), running.var.clone()), steps.clone()
        return self._last

    def _state(self) -> tuple[Running, Tensor]:
        mean, var, steps = self.running_mean, self.running_var, self.num_batches_tracked
        return Running(cast(Tensor, mean), cast(Tensor, var)), cast(Tensor, steps)

    def extra_repr(self) -> str:
        """What repr() shows between the parentheses."""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


def _at(schedule: Schedule, steps: Tensor) -> Tensor:
    """The schedule's value at `steps`, scalar; float64, on its device: nothing waits for an accelerator."""
    now = steps.to(torch.float64)
    value = torch.full_like(now, schedule[0][1])
    for (start, low), (end, high) in pairwise(schedule):
        value = value + (high - low) * ((now - start) / (end - start)).clamp(0, 1)
    return value


def _check(name: str, schedule: Schedule, least: float) -> None:
    pairs = list(schedule) if isinstance(schedule, Iterable) else [None]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise ArgumentError(f"{name} must be (step, value) pairs, got {schedule!r}; a constant is [(0, value)].")
    steps = [step for step, _ in schedule]
    if not steps or any(later <= earlier for earlier, later in pairwise(steps)):
        raise ArgumentError(f"{name} must be (step, value) pairs with ascending steps, got {schedule!r}.")
    if not all(value >= least for _, value in schedule):
        raise ArgumentError(f"{name} must not fall below {least:g}, got {schedule!r}.")
