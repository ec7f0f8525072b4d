"""DistributedDataParallel with two gloo processes on the CPU: our layers beside torch.nn's."""

from __future__ import annotations

import datetime
import warnings

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import batchnorm

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


def _network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), norm(5), nn.ReLU(), nn.Linear(5, 5), norm(5, momentum=None), nn.Linear(5, 2))


def _train(norm, rank, steps=4):
    network = nn.parallel.DistributedDataParallel(_network(norm))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)  # the ranks see different data, and batches of different sizes
    for step in range(steps):
        x = torch.randn(6 + rank, 4, generator=generator) + rank + step
        optimizer.zero_grad()
        network(x).pow(2).mean().backward()
        optimizer.step()
    with torch.no_grad():
        network(x)  # buffers of rank 0 go to all at the start of a forward
    return {name: value.clone() for name, value in network.module.state_dict().items()}


def _worker(rank, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    states = {name: _train(norm, rank) for name, norm in (("ours", batchnorm.BatchNorm1d), ("torch", nn.BatchNorm1d))}
    # Statistics of the ranks, merged across processes, are those of all the data.
    own = torch.randn(5 + rank, 3, generator=torch.Generator().manual_seed(10 + rank))
    gathered = [None, None]
    dist.all_gather_object(gathered, batchnorm.Moments.of(own, 0))
    states["merged"] = gathered[0].merge(gathered[1])
    torch.save(states, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_train_as_with_torchs_layers(tmp_path):
    mp.start_processes(_worker, (str(tmp_path),), nprocs=2, start_method=ranks.START)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for states in (first, second):
        assert list(states["ours"]) == list(states["torch"])
        torch.testing.assert_close(dict(states["ours"]), dict(states["torch"]), rtol=1e-4, atol=1e-5)
    for name in first["ours"]:
        if "weight" in name or "bias" in name:
            torch.testing.assert_close(first["ours"][name], second["ours"][name])
    whole = torch.cat([torch.randn(5 + r, 3, generator=torch.Generator().manual_seed(10 + r)) for r in (0, 1)]).double()
    torch.testing.assert_close(first["merged"].mean, whole.mean(0))
    torch.testing.assert_close(second["merged"].unbiased_var, whole.var(0))
