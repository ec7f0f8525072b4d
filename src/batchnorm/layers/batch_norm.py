"""BatchNorm for any rank and channel axis, and BatchNorm1d, 2d, 3d that stand in for torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Proxy

from batchnorm.errors import ArgumentError, ShapeError
from batchnorm.functional import batch_norm
from batchnorm.kernels import direct
from batchnorm.kernels.checks import check_activation
from batchnorm.kernels.contract import Activation, Affine, Statistics
from batchnorm.kernels.transforms import must_look_inside
from batchnorm.layers.commit import Buffers, commit, is_recomputed, runs_in_backward, warn_once
from batchnorm.layers.precision import widened
from batchnorm.layers.shapes import check_channels
from batchnorm.layers.stage import Stage, take
from batchnorm.layers.tracing import as_one_node, as_one_operator, is_exported, is_traced
from batchnorm.stats.distributed import Ranks
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running


class BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization of activations of any rank, with the channels on any axis or on several.

    Training: y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual) with the batch's mean and biased
        variance, which also enter the running statistics. Evaluation: with the running statistics. Parameters,
        buffers and state_dict are those of torch.nn's BatchNorm layers.

    Args:
        num_features: number of channels, C; for several channel axes the tuple of their sizes, in ascending order of
            the axes.
        eps: added to the variance; unit of the input, squared.
        momentum: weight of the NEW batch in the running statistics; None keeps the plain average over all batches.
        affine: whether there are weight (gamma) and bias (beta).
        track_running_stats: whether there are running statistics; without them evaluation uses the batch's too.
        device: of parameters and buffers.
        dtype: of parameters and buffers; running statistics are float32 at least, so that they do not stall.
        bias: whether there is a beta where `affine` is on.
        activation: fused into the layer: "relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh" or None.
        channel_axis: the axis of the channels, or a tuple of axes.

    Attributes:
        weight: (C,), or the tuple's shape; None without affine.
        bias: likewise; None without affine or with bias=False.
        running_mean: likewise, float32 or float64; None without track_running_stats.
        running_var: likewise; unbiased variance.
        num_batches_tracked: scalar int64, batches that entered the statistics.

    Example:
        >>> layer = BatchNorm(8, channel_axis=-1)
        >>> layer(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])
        >>> stack = BatchNorm((3, 8), channel_axis=(0, 2))  # three networks in one tensor, (3, N, 8)
        >>> stack(torch.randn(3, 16, 8)).shape, stack.running_mean.shape
        (torch.Size([3, 16, 8]), torch.Size([3, 8]))

    Source: Ioffe & Szegedy 2015, Alg. 1 and 2. Where we differ from torch.nn on purpose: docs/conventions.md.
    """

    ranks: ClassVar[tuple[int, ...] | None] = None
    # Whether what a class does is what BatchNorm does: in evaluation; and in training, a batch by itself.
    _evaluates_plainly: ClassVar[bool] = True
    _trains_plainly: ClassVar[bool] = True
    num_features: int | tuple[int, ...]  # type: ignore[assignment]
    channel_axis: int | tuple[int, ...]
    activation: Activation | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def inherits(*names: str) -> bool:
            return all(getattr(cls, name) is getattr(BatchNorm, name) for name in names)

        cls._evaluates_plainly = inherits("_normalise", "_check_input_dim")
        cls._trains_plainly = cls._evaluates_plainly and inherits("_by_batch", "_commit")

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
        bias: bool = True,
        activation: Activation | None = None,
        channel_axis: int | tuple[int, ...] = 1,
    ) -> None:
        check_activation(activation)
        if isinstance(channel_axis, tuple) != isinstance(num_features, tuple):
            raise ArgumentError(
                "num_features and channel_axis must both be ints or both be tuples (one size for each axis), "
                f"got {num_features} and {channel_axis}."
            )
        super().__init__(
            cast(int, num_features), eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.activation = activation
        self.channel_axis = channel_axis
        if not bias:  # set here and not passed on: older versions of torch do not know the argument
            self.register_parameter("bias", None)
        self._has_warned = False
        self._stage: Stage | None = None  # where batches wait for the end of a transaction
        self._keep_statistics_wide()

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Activation(BN(input) + residual).

        Args:
            input: activations, (N, C, ...) with the channels on `channel_axis`, float.
            residual: shape and dtype of the input; added before the activation.
            mask: bool, True = counts in the statistics; the input's shape without its channel axes, or broadcastable
                to it.
            out: where the output is written, the input itself for inference in place; in evaluation only, without
                gradients. See batch_norm.

        Returns:
            Shape, dtype and memory format of the input.

        Raises:
            ArgumentError: `out` in training, or where autograd follows.
            ShapeError: wrong rank or number of channels, a mask that does not fit, or one value a channel in training.
            DtypeError: the input is no float tensor, or its dtype does not go with the parameters'.
        """
        if out is not None:
            return self._into(out, input, residual, mask)
        if mask is None and type(input) is Tensor and not must_look_inside():
            y = self._directly(input, residual)
            if y is not None:
                return y
        if isinstance(input, Proxy):
            return as_one_node(self, input, residual, mask)
        if not is_traced():  # there sizes are tensors, and looking at one warns
            self._check_input_dim(input)
        # Each look at a buffer costs as much as a small kernel: none more than needed.
        running = None if self.training else Running(self.running_mean, self.running_var)
        if running is not None and (running.mean is not None or running.var is not None):
            if is_exported(self.channel_axis):
                affine = Affine(self.weight, self.bias, self.eps, self.activation)
                return as_one_operator(input, running, affine, residual)
            return self._normalise(input, residual, mask, moments=running)[0]
        y, moments = self._by_batch(input, residual, mask)
        if self.training and self.track_running_stats:
            self._commit(moments)
        return y

    def _into(self, out: Tensor, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        return batch_norm(
            input,
            self.weight,
            self.bias,
            moments=None if self.training or mean is None or var is None else Running(mean, var),
            eps=self.eps,
            channel_axis=self.channel_axis,
            mask=mask,
            activation=self.activation,
            residual=residual,
            out=out,
        )[0]

    def _directly(self, input: Tensor, residual: Tensor | None) -> Tensor | None:
        """What `forward` gives, in one call of the core; None, and nothing done, where that is not the way.

        Small inputs are why: a look at a parameter through torch.nn.Module costs as much as their arithmetic.
        """
        features = self.num_features
        if self.channel_axis != 1 or type(features) is not int or (self.ranks and input.dim() not in self.ranks):
            return None
        parameters, buffers = self._parameters, self._buffers
        try:
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var, tracked = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:  # a parametrization has put something else in place
            return None
        if not self.training and mean is not None and var is not None:
            if not self._evaluates_plainly:
                return None
            return direct.infer(input, weight, bias, residual, self.eps, self.activation, features, mean, var)
        if not self._trains_plainly or self._stage is not None:
            return None
        if not (self.training and self.track_running_stats) or mean is None or var is None or runs_in_backward():
            mean = var = tracked = None
        found = direct.train(
            input, weight, bias, residual, self.eps, self.activation, features, mean, var, tracked, self.momentum
        )
        if found is None:
            return None
        if not found[1]:
            warn_once(self)
        return found[0]

    def _by_batch(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Moments]:
        """The output, and the Moments to commit, where the batch's own statistics count."""
        y, moments = self._normalise(input, residual, mask)
        return y, cast(Moments, moments)

    def _normalise(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        *,
        moments: Statistics | None = None,
        ranks: Ranks | None = None,
    ) -> tuple[Tensor, Statistics]:
        return batch_norm(
            input,
            self.weight,
            self.bias,
            moments=moments,
            eps=self.eps,
            channel_axis=self.channel_axis,
            mask=mask,
            activation=self.activation,
            residual=residual,
            ranks=ranks,
        )

    def _commit(self, batch: Moments) -> None:
        """Takes a batch into the running statistics: the one place in which the layer's state changes."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or is_recomputed():
            return
        if self._stage is not None:
            is_taken = take(self._stage, batch)
        else:
            buffers = Buffers(mean, var, self.num_batches_tracked)
            is_taken = commit(buffers, batch, self.momentum)
        if not is_taken:
            warn_once(self)

    def _new_stage(self) -> Stage:
        assert self.running_mean is not None
        assert self.running_var is not None
        return Stage.like(self.running_mean, self.running_var)

    def _check_input_dim(self, input: Tensor) -> None:
        if self.ranks is not None and input.dim() not in self.ranks:
            expected = " or ".join(f"{rank}D" for rank in self.ranks)
            raise ShapeError(
                f"{type(self).__name__} expected {expected} input, (N, C, ...) (got {input.dim()}D input of shape "
                f"{tuple(input.shape)}). Use BatchNorm1d for (N, C) and (N, C, L), BatchNorm2d for (N, C, H, W), "
                "BatchNorm3d for (N, C, D, H, W), BatchNorm for any rank and channel axis."
            )
        check_channels(self, input)

    def _keep_statistics_wide(self, before: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:
        for name, old in zip(("running_mean", "running_var"), before, strict=True):
            setattr(self, name, widened(getattr(self, name), old))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> BatchNorm:
        before = (self.running_mean, self.running_var)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._keep_statistics_wide(before)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_statistics_wide()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("_has_warned", False)
        self.__dict__.setdefault("_stage", None)

    def extra_repr(self) -> str:
        """What repr() shows between the parentheses: torch.nn's part, and ours where it is not the default."""
        ours = {"channel_axis": (self.channel_axis, 1), "activation": (self.activation, None)}
        added = [f"{name}={value!r}" for name, (value, default) in ours.items() if value != default]
        return ", ".join([super().extra_repr(), *added])  # type: ignore[no-untyped-call]


class BatchNorm1d(BatchNorm, torch.nn.BatchNorm1d):
    """Stands in for torch.nn.BatchNorm1d: (N, C) or (N, C, L); `activation`, `residual` and `mask` come with it."""

    ranks = (2, 3)


class BatchNorm2d(BatchNorm, torch.nn.BatchNorm2d):
    """Stands in for torch.nn.BatchNorm2d: (N, C, H, W); `activation`, `residual` and `mask` come with it."""

    ranks = (4,)


class BatchNorm3d(BatchNorm, torch.nn.BatchNorm3d):
    """Stands in for torch.nn.BatchNorm3d: (N, C, D, H, W); `activation`, `residual` and `mask` come with it."""

    ranks = (5,)
