"""FrozenBatchNorm: the affine map that a trained batch normalization is at inference, as a layer that stays so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from batchnorm.functional import batch_norm
from batchnorm.kernels.checks import check_activation
from batchnorm.kernels.contract import Activation, Affine
from batchnorm.layers.precision import widened
from batchnorm.layers.shapes import check_channels
from batchnorm.layers.tracing import as_one_node, as_one_operator, is_exported, is_traced
from batchnorm.stats.running import Running


class FrozenBatchNorm(torch.nn.Module):
    """Batch normalization with fixed statistics and fixed weights, in training as in evaluation.

    y = activation((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual), whatever train() and eval()
    say. All five tensors are buffers under the names of torch.nn's BatchNorm layers, so that their checkpoints load
    and go back; there is nothing to train, and no optimizer or weight decay finds anything to move.
    It is no torch.nn BatchNorm layer to isinstance: tools that reset or refresh running statistics pass it over.

    Args:
        num_features: number of channels, C; for several channel axes the tuple of their sizes, ascending.
        eps: added to the variance; unit of the input, squared.
        affine: whether there are weight and bias.
        device: of the buffers.
        dtype: of the buffers; mean and variance are float32 at least.
        bias: whether there is a bias where `affine` is on.
        activation: fused into the layer; see BatchNorm.
        channel_axis: the axis of the channels, or a tuple of axes.

    Attributes:
        weight: (C,), buffer; None without affine.
        bias: (C,), buffer; None without affine or with bias=False.
        running_mean: (C,), float32 or float64 buffer.
        running_var: (C,), likewise, as the BatchNorm layer kept it (unbiased).
        num_batches_tracked: scalar int64 buffer, what the checkpoint said; plays no part. None if converted from
            a layer without it.

    Example:
        >>> trained = torch.nn.BatchNorm1d(3)
        >>> frozen = FrozenBatchNorm(3)
        >>> frozen.load_state_dict(trained.state_dict())
        <All keys matched successfully>
        >>> list(frozen.train().parameters())
        []

    Source: Ioffe & Szegedy 2015, Alg. 2, line 11; He et al. 2016 (arXiv 1512.03385), appendix A (fixed, for detection).
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
        channel_axis: int | tuple[int, ...] = 1,
    ) -> None:
        check_activation(activation)
        super().__init__()
        self.num_features, self.channel_axis = num_features, channel_axis
        self.eps, self.affine, self.activation = eps, affine, activation
        ones = torch.ones(num_features, device=device, dtype=dtype)
        self.register_buffer("weight", ones if affine else None)
        self.register_buffer("bias", torch.zeros_like(ones) if affine and bias else None)
        self.register_buffer("running_mean", widened(torch.zeros_like(ones)))
        self.register_buffer("running_var", widened(torch.ones_like(ones)))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Activation(BN(input) + residual), with the fixed statistics.

        Args:
            input: activations, (N, C, ...) with the channels on `channel_axis`, float.
            residual: shape and dtype of the input; added before the activation.
            mask: bool, True = counts; changes nothing here but what padding that is not finite is read as: 0.

        Returns:
            Shape, dtype and memory format of the input.

        Raises:
            ShapeError: another number of channels, or a mask that does not fit.
            DtypeError: the input is no float tensor, or its dtype does not go with the weight's.
        """
        if isinstance(input, Proxy):
            return as_one_node(self, input, residual, mask)
        if not is_traced():
            check_channels(self, input)
        running = Running(self.running_mean, self.running_var)
        if is_exported(self.channel_axis):
            return as_one_operator(input, running, Affine(self.weight, self.bias, self.eps, self.activation), residual)
        y, _ = batch_norm(
            input,
            self.weight,
            self.bias,
            moments=running,
            eps=self.eps,
            channel_axis=self.channel_axis,
            mask=mask,
            activation=self.activation,
            residual=residual,
        )
        return y

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FrozenBatchNorm:
        before = self.running_mean, self.running_var
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._keep_statistics_wide(*before)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Old checkpoints and other libraries' frozen layers have no count; nor do layers converted from the latter.
        key = prefix + "num_batches_tracked"
        if self.num_batches_tracked is None:
            state_dict.pop(key, None)
        else:
            state_dict.setdefault(key, self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._keep_statistics_wide()

    def _keep_statistics_wide(self, mean: Tensor | None = None, var: Tensor | None = None) -> None:
        self.register_buffer("running_mean", widened(self.running_mean, mean))
        self.register_buffer("running_var", widened(self.running_var, var))

    def extra_repr(self) -> str:
        """What repr() shows between the parentheses."""
        shown = f"{self.num_features}, eps={self.eps}, affine={self.affine}, bias={self.bias is not None}"
        ours = {"channel_axis": (self.channel_axis, 1), "activation": (self.activation, None)}
        return ", ".join([shown, *(f"{k}={value!r}" for k, (value, default) in ours.items() if value != default)])
