"""What the ranks of a process group have collected, put together in the same order on each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist

from batchnorm.errors import ArgumentError, BatchNormError, RankError
from batchnorm.recalibration.collection import Call, Collected, Seen

Group: TypeAlias = "dist.ProcessGroup | Literal['local'] | None"
"""A process group; None: the default group where torch.distributed is initialised; "local": this process alone."""


def number_of_ranks(group: Group) -> int:
    """How many processes merge their statistics.

    Raises:
        ArgumentError: this process is no member of the group, or a group is given and there are none.
    """
    if isinstance(group, str) and group != "local":
        raise ArgumentError(f'group must be a process group, "local" or None, got {group!r}.')
    if group == "local" or not (dist.is_available() and dist.is_initialized()):
        if group not in (None, "local"):
            raise ArgumentError("group was given, but torch.distributed is not initialised: call init_process_group.")
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ArgumentError(f"this process (rank {dist.get_rank()}) is no member of the group: leave it out there.")
    return size


def together(collect: Callable[[], Collected], group: Group, layers: Sequence[str]) -> Collected:
    """What `collect` gives on each rank, as one. One collective.

    A rank that fails still joins, so that the others end with an error that names it instead of waiting.

    Raises:
        BatchNormError: another rank failed, or has other `layers`.
        RankError: another rank did not arrive within the group's timeout, or is gone.
        Exception: whatever `collect` raised here.
    """
    if number_of_ranks(group) == 1:
        return collect()
    failure: Exception | None = None
    payload: Any
    try:
        collected = collect()
        seen = {call: [_to_cpu(one) for one in many] for call, many in collected.seen.items()}
        payload = (list(layers), collected._replace(seen=seen))
    except Exception as error:
        failure, payload = error, f"{type(error).__name__}: {error}"
    gathered = _gather(payload, group)
    if failure is not None:
        raise failure
    failed = {rank: part for rank, part in enumerate(gathered) if isinstance(part, str)}
    if failed:
        raise BatchNormError(
            f"rank {', '.join(map(str, failed))} of {len(gathered)} failed, nothing was changed here: "
            f"{next(iter(failed.values()))}"
        )
    others = [rank for rank, (names, _) in enumerate(gathered) if names != gathered[0][0]]
    if others:
        raise BatchNormError(
            f"ranks 0 and {others[0]} recalibrate different layers: pass the same model and the same `layers` on each "
            "rank. Nothing was changed."
        )
    return _merged([collected for _, collected in gathered])


def _merged(parts: Sequence[Collected]) -> Collected:
    calls: dict[Call, None] = {}
    seen: dict[Call, list[Seen]] = {}
    for rank, part in enumerate(parts):
        calls.update(dict.fromkeys(part.calls))
        for call, many in part.seen.items():
            seen.setdefault(call, []).extend(one._replace(rank=rank) for one in many)
    later = set().union(*(part.later for part in parts))
    return Collected(sum(part.batches for part in parts), list(calls), later, seen)


def _gather(payload: Any, group: Group) -> list[Any]:
    process_group = None if isinstance(group, str) else group
    gathered: list[Any] = [None] * dist.get_world_size(process_group)
    try:
        dist.all_gather_object(gathered, payload, group=process_group)
    except RuntimeError as error:
        me, world = dist.get_rank(process_group), dist.get_world_size(process_group)
        raise RankError(
            f"recalibrate: rank {me} of {world} waited for the statistics of the other ranks, and at least one did not "
            "answer. Each rank must call recalibrate, with an empty list too; look in the logs for a rank that failed "
            f"first. Nothing was changed here. torch.distributed says: {error}"
        ) from error
    return gathered


def _to_cpu(seen: Seen) -> Seen:
    found = seen.moments
    count = found.count.cpu() if isinstance(found.count, torch.Tensor) else found.count
    moments = dataclasses.replace(found, mean=found.mean.cpu(), var=found.var.cpu(), count=count)
    return seen._replace(moments=moments)
