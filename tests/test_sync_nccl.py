"""SyncBatchNorm over NCCL: runs where there are two GPUs. It has not been run by this project's CI, which has none."""

from __future__ import annotations

import pytest
import sync_cases
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from batchnorm import BatchNorm, SyncBatchNorm

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_nccl_available() or torch.cuda.device_count() < 2,
    reason="needs NCCL and two GPUs",
)

SIZES = (5, 2)


def _network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).double().cuda()


def _batch():
    return torch.randn(sum(SIZES), 3, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _worker(rank, folder):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x = _batch().split(SIZES)[rank].cuda()
    model = nn.parallel.DistributedDataParallel(_network(SyncBatchNorm), device_ids=[rank])
    y = model(x)
    (y.square().sum() / sum(SIZES) * 2).backward()
    grads = {name: value.grad.cpu() for name, value in model.module.named_parameters()}
    empty = SyncBatchNorm(2).cuda()
    empty(sync_cases.values_of(rank).float().cuda()[: 0 if rank else 3])
    torch.save(
        {
            "y": y.detach().cpu(),
            "grads": grads,
            "buffers": {name: value.cpu() for name, value in model.module.named_buffers()},
            "empty": empty.running_mean.cpu(),
        },
        f"{folder}/{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


def test_two_gpus_give_what_one_gives_on_the_concatenated_batch(tmp_path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2, join=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    model = _network(BatchNorm)
    y = model(_batch().cuda())
    (y.square().sum() / sum(SIZES)).backward()
    exact = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([one["y"] for one in ranks]), y.detach().cpu(), **exact)
    for one in ranks:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(one["grads"][name], parameter.grad.cpu(), **exact)
        torch.testing.assert_close(one["buffers"], {n: b.cpu() for n, b in model.named_buffers()}, **exact)
        torch.testing.assert_close(one["empty"], ranks[0]["empty"])
