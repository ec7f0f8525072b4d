"""DecorrelatedBatchNorm: whitens groups of channels, so that they are uncorrelated as well as of variance 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.fx import Proxy

from batchnorm.errors import ArgumentError, BatchNormError, DtypeError, ShapeError
from batchnorm.kernels.checks import check_activation
from batchnorm.kernels.contract import Activation
from batchnorm.kernels.reference import activate
from batchnorm.kernels.transforms import can_read
from batchnorm.kernels.view import View
from batchnorm.layers.commit import Buffers, commit, is_recomputed, warn_once
from batchnorm.layers.precision import widened
from batchnorm.layers.shapes import check_channels, in_format_of
from batchnorm.layers.stage import Stage, take
from batchnorm.layers.tracing import as_one_node, is_traced
from batchnorm.stats.grouped import GroupMoments
from batchnorm.stats.whitening import newton, zca

Method = Literal["zca", "newton"]

_PART = 2**22
"""Values that are widened to float64 at once."""


class DecorrelatedBatchNorm(torch.nn.Module):
    """Whitening by batch statistics: channels of a group come out with covariance 1 (identity).

    y = activation(W (x - mean) * weight + bias + residual), W = (covariance + eps)^(-1/2) of the group's channels over
    the batch; gradients go through mean and W. Evaluation takes both from running averages of mean and covariance.
    (The papers average W itself; the average of covariances is the better estimate, and what a BatchNorm checkpoint
    can be turned into.)

    Costs a matrix product of the activations with a (d, d) matrix for each group, twice, and in evaluation too; "zca"
    an eigendecomposition besides. A batch should have many more than d values a channel: with d or fewer the covariance
    is singular, and eps decides the output.

    Checkpoints of torch.nn's BatchNorm layers load: their variances become the diagonal of the covariance, and with
    "zca" evaluation is then exactly theirs. There is no way back, as no BatchNorm whitens.

    Args:
        num_features: number of channels, C.
        eps: added to the diagonal of the covariance; unit of the input, squared.
        momentum: weight of the NEW batch in the running statistics; None keeps the plain average over all batches.
        affine: whether there are weight (gamma) and bias (beta), by channel.
        track_running_stats: whether there are running statistics; without them evaluation uses the batch's too.
        device: of parameters and buffers.
        dtype: of parameters and buffers; running statistics are float32 at least.
        group_size: channels that are whitened together, d; divides C. A layer of fewer channels is one group.
        method: "zca", exact and once differentiable, or "newton", five iterations, matrix products only.
        bias: whether there is a beta where `affine` is on.
        activation: of the result; see BatchNorm.
        channel_axis: the axis of the channels.

    Attributes:
        weight: (C,), or None; bias: likewise.
        running_mean: (C,), float32 or float64; None without track_running_stats.
        running_covariance: (C / d, d, d), likewise; unbiased.
        num_batches_tracked: scalar int64, batches that entered the statistics.

    Raises:
        ArgumentError: group_size does not divide num_features, or the method is unknown.

    Example:
        >>> x = torch.randn(64, 4) @ torch.ones(4, 4).tril()
        >>> y = DecorrelatedBatchNorm(4)(x)
        >>> torch.allclose(y.T @ y / 64, torch.eye(4), atol=1e-2)
        True

    Source: Huang et al. 2018 (arXiv 1804.08450), Alg. 1; Huang et al. 2019 (arXiv 1904.03441), Alg. 1.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_covariance: Tensor | None
    num_batches_tracked: Tensor | None
    _stage: Stage | None = None  # where batches wait for the end of a transaction

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int = 16,
        method: Method = "zca",
        bias: bool = True,
        activation: Activation | None = None,
        channel_axis: int = 1,
    ) -> None:
        check_activation(activation)
        if method not in get_args(Method):
            raise ArgumentError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}.")
        size = min(group_size, num_features)
        if size < 1 or num_features % size:
            raise ArgumentError(
                f"group_size must divide num_features, got {group_size} and {num_features}: "
                "take a divisor, or num_features for one group."
            )
        super().__init__()
        self.num_features, self.channel_axis, self.group_size = num_features, channel_axis, size
        self.eps, self.momentum, self.method, self.activation = eps, momentum, method, activation
        zeros = torch.zeros(num_features, device=device, dtype=dtype)
        covariance = torch.eye(size, device=device, dtype=dtype).repeat(num_features // size, 1, 1)
        self.register_parameter("weight", torch.nn.Parameter(torch.ones_like(zeros)) if affine else None)
        self.register_parameter("bias", torch.nn.Parameter(zeros.clone()) if affine and bias else None)
        self.register_buffer("running_mean", widened(zeros.clone()) if track_running_stats else None)
        self.register_buffer("running_covariance", widened(covariance) if track_running_stats else None)
        tracked = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("num_batches_tracked", tracked if track_running_stats else None)
        self._has_warned = False

    def forward(self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Activation(whitened(input) + residual).

        Args:
            input: activations, (N, C, ...) with the channels on `channel_axis`, float.
            residual: shape and dtype of the input; added before the activation.
            mask: bool, True = counts in the statistics; the input's shape without its channel axis, or broadcastable
                to it.

        Returns:
            Shape and dtype of the input.

        Raises:
            ShapeError: wrong number of channels, shapes that do not fit, or one value a channel in training.
            DtypeError: the input is no float tensor, or mask is not bool.
        """
        if isinstance(input, Proxy):
            return as_one_node(self, input, residual, mask)
        self._check(input, residual, mask)
        view = View.of(input, self.channel_axis)
        folded = view.fold(input)
        groups = self._groups(folded)
        running_mean, running_covariance = self.running_mean, self.running_covariance
        if not self.training and running_mean is not None and running_covariance is not None:
            mean, covariance = running_mean, running_covariance
            high = mean.to(groups.dtype)
            centred = groups - self._column(high) + self._column((mean - high).to(groups.dtype))
        else:
            keep = None if mask is None else view.fold_mask(mask).reshape(-1)
            batch, centred = _covariance(groups, keep)
            covariance = batch.var
            _check_count(batch.count, input)
            if self.training:
                self._commit(batch)
        z = self._whitening(covariance).to(centred.dtype) @ centred
        z = z.reshape(self.num_features, folded.shape[0], folded.shape[2])
        if self.weight is not None:
            z = z * self.weight[:, None, None]
        if self.bias is not None:
            z = z + self.bias[:, None, None]
        y = view.unfold(z.movedim(0, 1))
        y = activate(y if residual is None else y + residual, self.activation)
        return in_format_of(input, y.to(input.dtype))

    def _whitening(self, covariance: Tensor) -> Tensor:
        wide = covariance if covariance.device.type == "mps" else covariance.double()
        return zca(wide, self.eps) if self.method == "zca" else newton(wide, self.eps)

    def moments(self, input: Tensor, mask: Tensor | None = None) -> GroupMoments:
        """What the running statistics would get of an input, widened to float64 first; see forward for the arguments.

        Large inputs are taken in parts, which changes nothing but the memory that it takes.
        """
        view = View.of(input, self.channel_axis)
        folded, keep = view.fold(input.detach()), None if mask is None else view.fold_mask(mask)
        rows = max(1, _PART * max(len(folded), 1) // max(folded.numel(), 1))
        starts = range(0, max(len(folded), 1), rows)
        parts = [
            _covariance(
                self._groups(folded[i : i + rows].double()), None if keep is None else keep[i : i + rows].reshape(-1)
            )[0]
            for i in starts
        ]
        return parts[0].merge(*parts[1:])

    def _commit(self, batch: GroupMoments) -> None:
        """Takes a batch into the running statistics: the one place in which the layer's state changes."""
        mean, covariance = self.running_mean, self.running_covariance
        if mean is None or covariance is None or is_recomputed():
            return
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise BatchNormError(
                "DecorrelatedBatchNorm cannot track statistics under torch.func, which slices what it would have to "
                "merge: call eval() first, or make the layer with track_running_stats=False."
            )
        batch = GroupMoments(batch.mean.detach(), batch.var.detach(), batch.count)
        if self._stage is not None:
            is_taken = take(self._stage, batch)
        else:
            # The running rules average each entry, and take a matrix where others have variances.
            buffers = Buffers(self._column(mean), covariance, self.num_batches_tracked)
            is_taken = commit(buffers, batch, self.momentum)
        if not is_taken:
            warn_once(self)

    def _new_stage(self) -> Stage:
        assert self.running_mean is not None
        assert self.running_covariance is not None
        return Stage.like(self._column(self.running_mean), self.running_covariance)

    def _groups(self, x: Tensor) -> Tensor:
        """(N, C, L) as (C / d, d, N * L), at least float32."""
        wide = x if x.dtype == torch.float64 else x.float()
        return wide.movedim(1, 0).reshape(self.num_features // self.group_size, self.group_size, -1)

    def _column(self, values: Tensor) -> Tensor:
        """(C,) as (C / d, d, 1), a view."""
        return values.view(-1, self.group_size, 1)

    def _check(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> None:
        if not isinstance(input, Tensor) or not input.is_floating_point():
            raise DtypeError(f"input must be a float tensor, got {getattr(input, 'dtype', type(input).__name__)}.")
        if not is_traced():
            check_channels(self, input)
        if residual is not None and residual.shape != input.shape:
            raise ShapeError(
                f"residual must have the shape of the input, {tuple(input.shape)}; got {tuple(residual.shape)}."
            )
        if mask is not None and mask.dtype != torch.bool:
            raise DtypeError(f"mask must be bool (True = counts), got {mask.dtype}: pass mask != 0.")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> DecorrelatedBatchNorm:
        before = self.running_mean, self.running_covariance
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._keep_statistics_wide(*before)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        var = state_dict.pop(prefix + "running_var", None)
        if var is not None:  # a BatchNorm's: it takes the channels for uncorrelated
            diagonal = var.reshape(-1, self.group_size) if var.numel() == self.num_features else var
            state_dict.setdefault(prefix + "running_covariance", torch.diag_embed(diagonal))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._keep_statistics_wide()

    def _keep_statistics_wide(self, mean: Tensor | None = None, covariance: Tensor | None = None) -> None:
        self.register_buffer("running_mean", widened(self.running_mean, mean))
        self.register_buffer("running_covariance", widened(self.running_covariance, covariance))

    def extra_repr(self) -> str:
        """What repr() shows between the parentheses."""
        shown = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}, "
            f"bias={self.bias is not None}, track_running_stats={self.running_mean is not None}, "
            f"group_size={self.group_size}, method={self.method!r}"
        )
        ours = {"channel_axis": (self.channel_axis, 1), "activation": (self.activation, None)}
        return ", ".join([shown, *(f"{k}={value!r}" for k, (value, default) in ours.items() if value != default)])


def _covariance(groups: Tensor, keep: Tensor | None) -> tuple[GroupMoments, Tensor]:
    """Mean and covariance of (G, d, M) over the M where `keep`, (M,) bool, is True; and the centred values, all M."""
    if keep is None:
        count: Any = groups.shape[-1]
        counted = groups
        share: Any = 1.0 / max(count, 1)
    else:
        count = keep.sum()
        # What does not count may hold anything; where it is finite it is whitened like the rest.
        groups = groups.masked_fill(~(keep | torch.isfinite(groups)), 0)
        counted = groups.masked_fill(~keep, 0)
        share = 1.0 / count.clamp(min=1).to(groups.dtype)
    # A rough mean first, so that nothing cancels; it is a constant to the gradient, which goes through the rest.
    shift = counted.detach().sum(-1, keepdim=True) * share
    rest = _kept(counted - shift, keep).sum(-1, keepdim=True) * share
    centred = groups - shift - rest
    values = _kept(centred, keep)
    matrix = (values @ values.mT) * share
    return GroupMoments(shift.double() + rest.double(), matrix.double(), count), centred


def _kept(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else values.masked_fill(~keep, 0)


def _check_count(count: int | Tensor, input: Tensor) -> None:
    if isinstance(count, Tensor):
        if not can_read(count):
            return
        count = int(count)
    if count == 1:
        raise ShapeError(
            f"Expected more than 1 value per channel when training, got 1 in an input of shape {tuple(input.shape)}: "
            "one value has no covariance. Use a larger batch, drop the last short batch (DataLoader(drop_last=True)), "
            "or call eval() to whiten with running statistics."
        )
