"""transaction(): batches wait, and enter the running statistics together, once, if the optimizer really stepped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.layers.commit import Buffers, commit, is_recomputed
from batchnorm.layers.decorrelated import DecorrelatedBatchNorm
from batchnorm.layers.inventory import BatchNormalization, has_statistics, select
from batchnorm.layers.observe import input_moments
from batchnorm.layers.stage import Stage, staged_moments, take
from batchnorm.layers.sync import ranks_of
from batchnorm.stats.grouped import GroupMoments


class Transaction:
    """An open transaction; `discard()` ends it without a commit.

    Attributes:
        is_discarded: whether `discard` was called.
        steps: how often the optimizer really stepped; always 0 where none was given.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.is_discarded = False
        self.steps = 0
        self._has_optimizer = optimizer is not None

    def discard(self) -> None:
        """Leave the running statistics as they are at the end."""
        self.is_discarded = True

    @property
    def will_commit(self) -> bool:
        """Whether the batches would enter the running statistics if the transaction ended now."""
        return not self.is_discarded and (self.steps > 0 or not self._has_optimizer)

    def _count_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # GradScaler does not call step() after an overflow, but fused optimizers look for themselves.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is None or not bool(overflow):
            self.steps += 1


@contextmanager
def transaction(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Transaction]:
    """Running statistics commit once, at the end, whatever was forwarded inside; not at all if the step did not happen.

    All batches that go through a layer inside are merged by the law of total variance into one update of its running
    statistics: the micro-batches of gradient accumulation, two views, real and fake. For the first layer that is
    exactly the update of the one big batch. Nothing is committed after an exception, after `discard()`, and, where an
    optimizer is given, unless it stepped: GradScaler skips the step after an overflow. Batches that are not finite are
    left out; activation checkpointing counts once.

    What it cannot do: the output of a forward, so the activations of deeper layers and all gradients, is still
    normalised with its own micro-batch. Gradient accumulation with batch normalization is not training with the big
    batch; only the statistics of inference become its.

    Args:
        model: with batch normalization layers, torch.nn's or ours. torch.nn.SyncBatchNorm takes one more collective
            operation for each batch inside, as it tells nobody the statistics that it has shared.
        optimizer: commit only if its step() happened inside. None commits at the end.

    Yields:
        The Transaction.

    Raises:
        ArgumentError: model has no batch normalization layers, or optimizer is none.
        BatchNormError: a layer of the model is in an open transaction already.

    Example:
        >>> model = torch.nn.Sequential(BatchNorm(1, momentum=1.0))
        >>> with transaction(model):
        ...     for micro_batch in (torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0]])):
        ...         _ = model(micro_batch)
        >>> round(model[0].running_var.item(), 4), model[0].num_batches_tracked.item()
        (34.6667, 1)
    """
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}.")
    opened = Transaction(optimizer)
    staged: list[tuple[BatchNormalization, Stage]] = []
    with ExitStack() as put_back:
        for name, layer in select(model).items():
            # A torch.nn layer in a transaction looks as if it kept no statistics.
            if getattr(layer, "_stage", None) is not None or _is_staged_by_hook(layer):
                raise BatchNormError(f"{name} is in an open transaction already: end that one first.")
            if not has_statistics(layer):
                continue
            if isinstance(layer, BatchNorm | DecorrelatedBatchNorm):
                stage = layer._new_stage()
                put_back.callback(setattr, layer, "_stage", None)
                layer._stage = stage
            else:
                assert layer.running_mean is not None
                assert layer.running_var is not None
                stage = Stage.like(layer.running_mean, layer.running_var)
                put_back.callback(setattr, layer, "track_running_stats", True)
                hook = partial(_stage_input, stage)
                put_back.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
                layer.track_running_stats = False  # its forward then uses the batch and writes nothing
            staged.append((layer, stage))
        if optimizer is not None:
            put_back.callback(optimizer.register_step_post_hook(opened._count_step).remove)
        yield opened
    if opened.will_commit:
        for layer, stage in staged:
            _commit_staged(layer, stage)


def _stage_input(stage: Stage, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook for torch.nn's layers, which have no method in which their state changes."""
    if not layer.training or is_recomputed():
        return
    batch = input_moments(layer, args, kwargs)
    ranks = ranks_of(layer) if isinstance(layer, torch.nn.SyncBatchNorm) else None
    if ranks is not None:
        with torch.no_grad():
            batch = ranks.merge(batch)
    take(stage, batch)


def _is_staged_by_hook(layer: torch.nn.Module) -> bool:
    return any(getattr(hook, "func", None) is _stage_input for hook in layer._forward_pre_hooks.values())


def _commit_staged(layer: BatchNormalization, stage: Stage) -> None:
    batch = staged_moments(stage)
    if batch is None:
        return
    if isinstance(layer, DecorrelatedBatchNorm):
        assert isinstance(batch, GroupMoments)
        layer._commit(batch)
    elif isinstance(layer, BatchNorm):
        layer._commit(batch)
    elif layer.running_mean is not None and layer.running_var is not None:
        commit(Buffers(layer.running_mean, layer.running_var, layer.num_batches_tracked), batch, layer.momentum)
