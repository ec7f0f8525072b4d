"""What the ranks of test_sync.py do; a module of its own, as each rank imports it."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, SyncBatchNorm, transaction

WORLD = 4
C = 5


@dataclass(frozen=True)
class Case:
    """One forward and backward of a layer on WORLD ranks."""

    sizes: tuple[int, ...]
    """Of the ranks' batches."""
    rest: tuple[int, ...] = (3,)
    """The axes after N and C."""
    is_masked: bool = False
    has_residual: bool = False
    is_channels_last: bool = False
    backend: str | None = None
    """Of torch.compile."""
    arguments: tuple[tuple[str, object], ...] = ()

    def batch(self) -> dict[str, torch.Tensor | None]:
        """The concatenated batch and what goes with it."""
        generator = torch.Generator().manual_seed(sum(self.sizes))
        n = sum(self.sizes)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x = draw(n, C, *self.rest) * 2 + 0.5
        mask = None
        if self.is_masked:
            mask = draw(n, *self.rest) > 0
            mask[: self.sizes[0]] = False  # the first rank has values, but none that counts
        residual = draw(*x.shape) if self.has_residual else None
        return {"x": x, "dy": draw(*x.shape), "mask": mask, "residual": residual}


CASES = {
    "equal": Case((4, 4, 4, 4)),
    "unequal": Case((1, 7, 2, 3)),
    "empty": Case((0, 5, 0, 3)),
    "one value": Case((1, 0, 0, 1), rest=()),
    "dense": Case((3, 1, 6, 0), rest=()),
    "mask": Case((3, 4, 0, 5), is_masked=True),
    "residual and activation": Case((3, 4, 0, 5), has_residual=True, arguments=(("activation", "silu"),)),
    "channels-last": Case((2, 1, 0, 3), rest=(4, 3), is_channels_last=True, arguments=(("activation", "relu"),)),
    "cumulative": Case((2, 1, 4, 3), arguments=(("momentum", None),)),
    "no affine": Case((2, 1, 4, 3), arguments=(("affine", False),)),
}

COMPILED = Case((0, 5), is_masked=True, has_residual=True, backend="aot_eager", arguments=(("activation", "silu"),))
"""On two ranks: loading the compiler takes each of them seconds."""


def one_step(rank: int, case: Case) -> dict[str, object]:
    layer = SyncBatchNorm(C, dtype=torch.float64, **dict(case.arguments))
    start = sum(case.sizes[:rank])
    mine = {k: None if v is None else v[start : start + case.sizes[rank]] for k, v in case.batch().items()}
    x, residual = mine["x"].clone(), mine["residual"]
    if case.is_channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    call = layer if case.backend is None else torch.compile(layer, fullgraph=True, backend=case.backend)
    y = call(x, residual, mask=mine["mask"])
    y.backward(mine["dy"])
    layer.eval()
    again = call(x.detach())
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": None if layer.weight is None else layer.weight.grad,
        "dbias": None if layer.bias is None else layer.bias.grad,
        "buffers": {k: v for k, v in layer.state_dict().items() if "running" in k or "num" in k},
        "is_channels_last": y.is_contiguous(memory_format=torch.channels_last)
        if len(y.shape) == 4 and len(y)
        else None,
        "eval": again,
    }


def all_cases(rank: int) -> dict[str, object]:
    found: dict[str, object] = {name: one_step(rank, case) for name, case in CASES.items()}
    found["groups"] = _two_groups(rank)
    found["checkpoint"] = _checkpointed(rank)
    found["double backward"] = _gradient_penalty(rank)
    found["collectives"] = _collectives(rank)
    found["nan"] = _not_finite(rank)
    found["transaction"] = {kind.__name__: _transaction(kind, rank) for kind in (SyncBatchNorm, TorchsOnCpu)}
    found["ddp"] = twenty_steps(rank, is_wrapped=True)
    return found


def _two_groups(rank: int) -> dict[str, object]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = SyncBatchNorm(2, process_group=groups[rank // 2], dtype=torch.float64)
    copied = copy.deepcopy(layer)
    y = layer(values_of(rank))
    copied(values_of(rank))
    return {
        "y": y.detach(),
        "mean": layer.running_mean,
        "mean of copy": copied.running_mean,
        "is_shared": copied.process_group is layer.process_group,
    }


def values_of(rank: int, n: int = 3) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) + rank


def _checkpointed(rank: int) -> dict[str, object]:
    layer = SyncBatchNorm(2, dtype=torch.float64)
    x = values_of(rank).requires_grad_()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    return {"tracked": layer.num_batches_tracked, "mean": layer.running_mean}


def _collectives(rank: int) -> list[str]:
    """The names of the collective operations of one forward and backward, in order."""
    x = values_of(rank).requires_grad_()
    layer = SyncBatchNorm(2, dtype=torch.float64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x).sum().backward()
    names = [event.name for event in sorted(profile.events(), key=lambda event: event.time_range.start)]
    return [name for name in names if name.startswith("c10d::")]


def _gradient_penalty(rank: int) -> dict[str, object]:
    layer = SyncBatchNorm(2, dtype=torch.float64, activation="tanh")
    x = values_of(rank).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    return {"dx": x.grad}


def _not_finite(rank: int) -> dict[str, object]:
    layer = SyncBatchNorm(2, dtype=torch.float64)
    layer._has_warned = True
    x = values_of(rank)
    if rank == 2:
        x[0, 0] = float("nan")
    layer(x)
    return {"tracked": layer.num_batches_tracked, "mean": layer.running_mean}


class TorchsOnCpu(nn.SyncBatchNorm):
    """torch.nn's, which refuses a CPU once there are ranks; what it makes of its input does not matter here."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert not (self.training and self.track_running_stats)
        return input


def _transaction(kind: type, rank: int) -> dict[str, object]:
    layer = kind(2, dtype=torch.float64)
    x = values_of(rank, n=rank * 2)  # none on rank 0
    with transaction(layer):
        for part in (x[:rank], x[rank:]):
            layer(part)
    return {"tracked": layer.num_batches_tracked, "mean": layer.running_mean, "var": layer.running_var}


# A network, wrapped in DistributedDataParallel or alone on the concatenated batch

STEPS = 20


def network(norm) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv1d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv1d(4, 6, 3), norm(6), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)
    )
    return net.double()


def batch_of_step(step: int) -> tuple[torch.Tensor, list[int]]:
    """The concatenated batch, and what each rank takes of it: another split at each step, empty ones included."""
    generator = torch.Generator().manual_seed(step)
    sizes = [int(n) for n in torch.randint(0, 5, (WORLD,), generator=generator)]
    sizes[step % WORLD], sizes[(step + 1) % WORLD] = 0, 3
    return torch.randn(sum(sizes), 3, 10, generator=generator, dtype=torch.float64) * 2 + 1, sizes


def twenty_steps(rank: int | None, *, is_wrapped: bool = False) -> dict[str, torch.Tensor]:
    net = network(SyncBatchNorm if is_wrapped else BatchNorm)
    model = nn.parallel.DistributedDataParallel(net) if is_wrapped else net
    for step in range(STEPS):
        x, sizes = batch_of_step(step)
        total = len(x)
        if rank is not None:
            start = sum(sizes[:rank])
            x = x[start : start + sizes[rank]]
        # DDP averages the ranks' gradients: their sum over the whole batch is WORLD times as much.
        loss = (model(x) - x.mean((1, 2))[:, None]).square().sum() / total * (WORLD if is_wrapped else 1)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():  # torch.optim loads the compiler, which takes each rank seconds
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    return net.state_dict()


# Ranks that do not come


def one_dies(rank: int, in_backward: bool) -> str:
    net = network(SyncBatchNorm)
    for step in range(4):
        y = net(torch.randn(3, 3, 10, dtype=torch.float64))
        if step == 2 and rank == 1 and in_backward:
            os._exit(1)
        y.square().sum().backward()
        if step == 2 and rank == 1:
            os._exit(1)
    return "no error"


def one_never_comes(rank: int) -> str:
    layer = SyncBatchNorm(2)
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["rank 0 is done"])
        return "waited"
    try:
        layer(torch.randn(3, 2))
    finally:
        store.set("rank 0 is done", "1")
    return "no error"
