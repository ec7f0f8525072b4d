"""Ranks: the processes of a group whose batches are one batch; one collective for their Moments, one for their sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from batchnorm.errors import RankError
from batchnorm.stats.moments import Moments


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group, as a place where statistics merge.

    Every rank of the group must make the same calls in the same order, whether it has values or not: Moments of count
    0 take part like any others and weigh nothing. A call that the others never answer ends in RankError after the
    group's timeout (torch.distributed.init_process_group(timeout=...)). In compiled code, and on NCCL unless
    TORCH_NCCL_BLOCKING_WAIT=1, it is torch.distributed that ends it, and its message does not name the layer.

    Attributes:
        group: a torch.distributed ProcessGroup of any backend.
        describe: gives the name of the layer that an error is about; called only then.
    """

    group: Any
    describe: Callable[[], str]

    @property
    def number(self) -> int:
        """How many ranks there are."""
        return dist.get_world_size(self.group)

    def merge(self, moments: Moments) -> Moments:
        """Moments of all the ranks' values together, the same on every rank.

        One all_gather of mean, variance and count; backward, one all_reduce. Differentiable, twice too, and traceable.

        Args:
            moments: this rank's Moments, torch tensors of any shape, the same on every rank.

        Returns:
            New Moments, float64; count is a tensor of the shape of mean.

        Raises:
            RankError: another rank did not answer in time, or is gone.
        """
        count = moments.count
        if not isinstance(count, torch.Tensor):
            count = torch.full_like(moments.mean, count, dtype=torch.float64)
        count = count.to(torch.float64).expand(moments.mean.shape)
        merged = _Merge.apply(moments.mean, moments.var, count, self)  # type: ignore[no-untyped-call]
        return Moments(*merged)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' `values`, any shape, in float64 and back in their dtype; one all_reduce.

        Raises:
            RankError: another rank did not answer in time, or is gone.
        """
        if torch.is_grad_enabled():
            total: torch.Tensor = _Sum.apply(values, self)  # type: ignore[no-untyped-call]
            return total
        return self._all_reduce(values)

    def _all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        total = values.to(torch.float64, copy=True).contiguous()
        if torch.compiler.is_compiling():
            from torch.distributed import _functional_collectives as functional

            reduced: torch.Tensor = functional.wait_tensor(functional.all_reduce(total, "sum", self.group))  # type: ignore[no-untyped-call]
            return reduced.to(values.dtype)
        with self._named("the sums of backward"):
            dist.all_reduce(total, group=self.group)
        return total.to(values.dtype)

    def _all_gather(self, values: torch.Tensor) -> torch.Tensor:
        """(R, k) from the ranks' `values`, (k,), float64."""
        # Newer versions of torch call the operation all_gather_single, and warn about its old names.
        if torch.compiler.is_compiling():
            from torch.distributed import _functional_collectives as functional

            gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
            gathered: torch.Tensor = functional.wait_tensor(gather(values, 0, self.group))  # type: ignore[no-untyped-call]
            return gathered.reshape(-1, *values.shape)
        gathered = values.new_empty(self.number * values.numel())
        with self._named("the statistics of forward"):
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(gathered, values, group=self.group)
        return gathered.reshape(-1, *values.shape)

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # also what torch.distributed's own errors are
            me, world = dist.get_rank(self.group), dist.get_world_size(self.group)
            raise RankError(
                f"{self.describe()}: rank {me} of {world} waited for the other ranks to share {what}, and at least one "
                f"did not answer, or not in kind. Every rank of the group must run this layer equally often, forward "
                f"and backward, with an empty batch too; look in the logs for a rank that failed first, ran out of "
                f"data, or took another branch. torch.distributed says: {error}"
            ) from error


class _Merge(torch.autograd.Function):
    """The ranks' Moments merged; the gradient of each rank's own is its share of the summed gradient."""

    @staticmethod
    def forward(
        mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor, ranks: Ranks
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        local = torch.stack([mean.to(torch.float64), var.to(torch.float64), count])
        every = ranks._all_gather(local.reshape(-1)).reshape(-1, *local.shape)
        whole = Moments(every[:, 0], every[:, 1], every[:, 2].to(torch.int64)).merge_along(0)
        return whole.mean, whole.var, torch.as_tensor(whole.count)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        mean, _, count, ctx.ranks = inputs
        whole_mean, _, whole_count = output
        ctx.mark_non_differentiable(whole_count)
        ctx.save_for_backward(mean, count, whole_mean, whole_count)

    @staticmethod
    def backward(ctx: Any, dmean: torch.Tensor, dvar: torch.Tensor, _: Any) -> Any:
        mean, count, whole_mean, whole_count = ctx.saved_tensors
        dmean, dvar = ctx.ranks.sum(torch.stack([dmean, dvar]))
        share = count / whole_count.clamp(min=1)
        return share * (dmean + 2 * (mean - whole_mean) * dvar), share * dvar, None, None


class _Sum(torch.autograd.Function):
    """all_reduce, whose gradient is all_reduce."""

    @staticmethod
    def forward(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        return ranks._all_reduce(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.ranks.sum(grad), None
