"""recalibrate() on two gloo processes: unequal and empty ranks, a rank that fails, DistributedDataParallel."""

from __future__ import annotations

import datetime
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from batchnorm import BatchNorm1d, recalibrate
from batchnorm.errors import BatchNormError

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")

ESTIMATORS = ("population", "mean_of_batches", "moving_average")


def _model():
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), BatchNorm1d(4), nn.Linear(4, 2)
    return nn.Sequential(*layers, BatchNorm1d(2, momentum=0.3)).double()


def _batches():
    x = torch.randn(70, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return x.split(9)


def _of_rank(name, rank):
    """Unequal: 6 batches and 2; empty: 8 and none."""
    cut = 6 if name == "unequal" else 8
    return (_batches()[:cut], _batches()[cut:])[rank]


def _worker(rank, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    found = {}
    for name in ("unequal", "empty"):
        for estimator in ESTIMATORS:
            model = _model()
            report = recalibrate(model, _of_rank(name, rank), estimator=estimator)
            found[name, estimator] = (model.state_dict(), report.batches, report.ranks)
    model = nn.parallel.DistributedDataParallel(_model())
    recalibrate(model, _of_rank("unequal", rank))
    found["ddp"] = (model.module.state_dict(), model.broadcast_buffers)
    model = _model()
    recalibrate(model, _batches()[rank : rank + 1], group="local")
    found["local"] = model.state_dict()
    found["errors"] = [_error(rank, failing) for failing in (0, 1)]
    with pytest.raises(BatchNormError, match="ranks 0 and 1 recalibrate different layers"):
        recalibrate(_model(), _batches(), layers=["1", "4"][rank])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _error(rank, failing):
    def forward(model, batch):
        if rank == failing:
            raise OSError("the disk is gone")
        model(batch)

    model = _model()
    try:
        recalibrate(model, _batches(), forward=forward)
    except (OSError, BatchNormError) as error:
        return type(error).__name__, str(error), model.state_dict()
    return None


def test_two_processes(tmp_path):
    """One test, as starting processes takes seconds."""
    mp.spawn(_worker, (str(tmp_path),), nprocs=2, join=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for name in ("unequal", "empty"):
        for estimator in ESTIMATORS:
            _ranks_do_not_diverge_and_give_what_one_process_gives(ranks, name, estimator)
    _distributed_data_parallel_does_too(ranks)
    _a_rank_can_work_alone(ranks)
    for failing in (0, 1):
        _a_rank_that_fails_ends_the_others_with_its_name(ranks, failing)


def _ranks_do_not_diverge_and_give_what_one_process_gives(ranks, name, estimator):
    first, second = (one[name, estimator] for one in ranks)
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=0)
    assert first[1:] == second[1:] == (8, 2)
    if name == "unequal":  # batches are taken in turn: the moving average depends on it
        a, b = _batches()[:6], _batches()[6:]
        order = [one for pair in zip(a, b, strict=False) for one in pair] + list(a[2:])
    else:
        order = _batches()
    model = _model()
    recalibrate(model, order, estimator=estimator)
    torch.testing.assert_close(first[0], model.state_dict(), rtol=1e-10, atol=1e-10)


def _distributed_data_parallel_does_too(ranks):
    model = _model()
    recalibrate(model, _batches())
    for state, broadcasts in (one["ddp"] for one in ranks):
        torch.testing.assert_close(state, model.state_dict(), rtol=1e-10, atol=1e-10)
        assert broadcasts


def _a_rank_can_work_alone(ranks):
    for rank in (0, 1):
        model = _model()
        recalibrate(model, _batches()[rank : rank + 1])
        torch.testing.assert_close(ranks[rank]["local"], model.state_dict(), rtol=0, atol=0)


def _a_rank_that_fails_ends_the_others_with_its_name(ranks, failing):
    name, message, state = ranks[failing]["errors"][failing]
    assert (name, message) == ("OSError", "the disk is gone")
    name, message, other = ranks[1 - failing]["errors"][failing]
    assert name == "BatchNormError"
    assert f"rank {failing} of 2 failed, nothing was changed here: OSError: the disk is gone" in message
    for one in (state, other):
        torch.testing.assert_close(one, _model().state_dict(), rtol=0, atol=0)
