"""Stage: where the batches of an open transaction wait, merged, until they enter the running statistics together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchnorm.errors import BatchNormError
from batchnorm.kernels.transforms import can_read
from batchnorm.stats.grouped import GroupMoments
from batchnorm.stats.moments import Moments


@dataclass(frozen=True, eq=False)
class Stage:
    """Moments of the batches so far; written in place, so that compiled code is the same for the first and the last."""

    mean: torch.Tensor
    """(C,), float64; or that of GroupMoments."""
    var: torch.Tensor
    """(C,), float64, biased; or that of GroupMoments."""
    count: torch.Tensor
    """(C,), int64; or a scalar."""
    batches: torch.Tensor
    """Scalar, int64: batches taken, those without a value included."""

    @staticmethod
    def like(mean: torch.Tensor, var: torch.Tensor) -> Stage:
        """An empty stage for running statistics, (C,) each, or with covariances, (G, d, 1) and (G, d, d)."""
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        zero = torch.zeros((), dtype=torch.int64, device=mean.device)
        count = torch.zeros_like(mean, dtype=torch.int64) if mean.shape == var.shape else zero.clone()
        return Stage(torch.zeros_like(mean, dtype=wide), torch.zeros_like(var, dtype=wide), count, zero)

    def moments(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor) -> Moments:
        """Moments of the kind that is merged here."""
        return (Moments if mean.shape == var.shape else GroupMoments)(mean, var, count)


def take(stage: Stage, batch: Moments) -> bool:
    """Merges a batch into the stage, in place, unless its mean or variance is not finite.

    Returns:
        False where the batch was left out and that can be known without stopping an accelerator or a compiler.

    Raises:
        BatchNormError: within a transform of torch.func, which forbids writing to tensors from outside.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise BatchNormError("a transaction takes no batches under torch.func (vmap, grad, ...): leave one of the two.")
    with torch.no_grad():
        is_usable = torch.isfinite(batch.mean + batch.var).all()
        if can_read(is_usable) and not bool(is_usable):
            return False
        new = stage.moments(
            torch.where(is_usable, batch.mean, torch.zeros_like(stage.mean)),
            torch.where(is_usable, batch.var, torch.zeros_like(stage.var)),
            is_usable * batch.count + torch.zeros_like(stage.count),
        )
        whole = stage.moments(stage.mean, stage.var, stage.count).merge(new)
        stage.mean.copy_(whole.mean)
        stage.var.copy_(whole.var)
        stage.count.copy_(torch.as_tensor(whole.count))
        stage.batches.add_(is_usable.to(torch.int64))
    return True


def staged_moments(stage: Stage) -> Moments | None:
    """What has been taken, as one batch; None if nothing was.

    Where that cannot be read (an accelerator would have to stop), nothing comes as one value that is not a number,
    which `commit` leaves out.
    """
    is_empty = stage.batches == 0
    if can_read(is_empty) and bool(is_empty):
        return None
    return stage.moments(stage.mean.masked_fill(is_empty, float("nan")), stage.var, stage.count + is_empty)
