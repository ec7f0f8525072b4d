"""SyncBatchNorm: batch normalization over the batches of several processes, as if they were one."""

from __future__ import annotations

import copy
import gc
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.errors import ArgumentError
from batchnorm.kernels.contract import Activation
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.stats.distributed import Ranks
from batchnorm.stats.moments import Moments


class SyncBatchNorm(BatchNorm):
    """Batch normalization with the statistics of all ranks' batches together, exact for unequal and empty ones.

    y and its gradients on every rank are what one process would give for the concatenated batch: the ranks' Moments
    merge by the law of total variance in one all_gather, and backward takes one all_reduce. Any torch.distributed
    backend serves: gloo on a CPU, NCCL on GPUs. Evaluation needs no other rank. Without an initialised process group,
    and in a group of one, it is BatchNorm.

    No subclass of torch.nn.SyncBatchNorm: DistributedDataParallel refuses to wrap such layers on a CPU.

    Args:
        num_features: number of channels, C; see BatchNorm.
        eps: added to the variance; unit of the input, squared.
        momentum: weight of the NEW batch in the running statistics; None keeps the plain average over all batches.
        affine: whether there are weight (gamma) and bias (beta).
        track_running_stats: whether there are running statistics; without them evaluation uses this rank's batch.
        process_group: the ranks that share statistics; None is all of them. Copies of the layer share it.
        device: of parameters and buffers.
        dtype: of parameters and buffers; running statistics are float32 at least.
        bias: whether there is a beta where `affine` is on.
        activation: fused into the layer; see BatchNorm.
        channel_axis: the axis of the channels, or a tuple of axes.

    Raises:
        RankError: (forward and backward) another rank did not join within the group's timeout; names this layer.

    Example:
        >>> layer = SyncBatchNorm(8)  # torch.distributed.init_process_group(...) makes it span the processes
        >>> layer(torch.randn(4, 8, 5)).shape
        torch.Size([4, 8, 5])

    Source: Peng et al. 2018, "MegDet" (cross-GPU batch normalization), with their two all_reduces of sum
    and squared sum replaced by one all_gather of Moments, which do not cancel.
    """

    process_group: Any

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
        channel_axis: int | tuple[int, ...] = 1,
    ) -> None:
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
        self.process_group = process_group

    def _by_batch(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Moments]:
        y, moments = self._normalise(input, residual, mask, ranks=ranks_of(self))
        return y, cast(Moments, moments)

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        memo[id(self.process_group)] = self.process_group  # a connection: it cannot be copied, and need not be
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise ArgumentError(
                "a SyncBatchNorm with a process_group cannot be pickled, as its group lives in this process only: "
                "save its state_dict(), or set layer.process_group = None before and make a group after loading."
            )
        return self.__dict__


def ranks_of(layer: SyncBatchNorm | torch.nn.SyncBatchNorm) -> Ranks | None:
    """The ranks that share the statistics of a batch that goes through the layer now; None where it is on its own."""
    if not (layer.training and dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if layer.process_group is None else layer.process_group
    return Ranks(group, partial(_describe, layer)) if dist.get_world_size(group) > 1 else None


def _describe(layer: torch.nn.Module) -> str:
    path = _path_of(layer)
    return f"{path} = {layer!r}" if path else repr(layer)


def _path_of(module: torch.nn.Module) -> str:
    """The dotted name of `module` in the network that holds it, or "" where nothing does.

    A module does not know its parents. Looking for them among all objects is slow, and done only to explain an error.
    """
    parents = [found for found in gc.get_objects() if issubclass(type(found), torch.nn.Module)]
    path: list[str] = []
    child, seen = module, {id(module)}
    while True:
        above = next(((p, n) for p in parents for n, c in p._modules.items() if c is child and id(p) not in seen), None)
        if above is None:
            return ".".join(reversed(path))
        child = above[0]
        seen.add(id(child))
        path.append(above[1])
