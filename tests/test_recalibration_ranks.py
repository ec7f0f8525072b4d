"""recalibrate() on gloo processes: unequal and empty ranks, a rank that fails or dies, DistributedDataParallel."""

from __future__ import annotations

import datetime
import os
import threading
import warnings

import pytest
import ranks
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
    mp.start_processes(_worker, (str(tmp_path),), nprocs=2, start_method=ranks.START)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for name in ("unequal", "empty"):
        for estimator in ESTIMATORS:
            _ranks_do_not_diverge_and_give_what_one_process_gives(found, name, estimator)
    _distributed_data_parallel_does_too(found)
    _a_rank_can_work_alone(found)
    for failing in (0, 1):
        _a_rank_that_fails_ends_the_others_with_its_name(found, failing)


def _ranks_do_not_diverge_and_give_what_one_process_gives(found, name, estimator):
    first, second = (one[name, estimator] for one in found)
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


def _distributed_data_parallel_does_too(found):
    model = _model()
    recalibrate(model, _batches())
    for state, broadcasts in (one["ddp"] for one in found):
        torch.testing.assert_close(state, model.state_dict(), rtol=1e-10, atol=1e-10)
        assert broadcasts


def _a_rank_can_work_alone(found):
    for rank in (0, 1):
        model = _model()
        recalibrate(model, _batches()[rank : rank + 1])
        torch.testing.assert_close(found[rank]["local"], model.state_dict(), rtol=0, atol=0)


def _a_rank_that_fails_ends_the_others_with_its_name(found, failing):
    name, message, state = found[failing]["errors"][failing]
    assert (name, message) == ("OSError", "the disk is gone")
    name, message, other = found[1 - failing]["errors"][failing]
    assert name == "BatchNormError"
    assert f"rank {failing} of 2 failed, nothing was changed here: OSError: the disk is gone" in message
    for one in (state, other):
        torch.testing.assert_close(one, _model().state_dict(), rtol=0, atol=0)


# Ranks that take other ways, or do not come


def _killed_in_the_middle(rank, memory):
    """Rank 1 dies with its third batch in the model; what the others end with, and what is left of it."""

    def forward(model, batch, seen=[]):  # noqa: B006
        seen.append(batch)
        if rank == 1 and len(seen) == (3 if memory is None else 12):
            os._exit(1)
        model(batch)

    model = _model().train()
    model[2].eval()
    try:
        recalibrate(model, _batches(), forward=forward, memory=memory)
    except BatchNormError as error:
        modes = [module.training for module in model]
        hooks = sum(len(module._forward_pre_hooks) for module in model)
        waiting = [thread for thread in threading.enumerate() if thread.name == "recalibrate"]
        return type(error).__name__, str(error), model.state_dict(), modes, hooks, len(waiting)
    return "no error"


@pytest.mark.parametrize("memory", [None, 0], ids=["one pass", "passes"])
def test_when_a_rank_is_killed_the_others_end_with_an_error_that_names_them_and_put_everything_back(tmp_path, memory):
    found = ranks.run(_killed_in_the_middle, 3, tmp_path, memory, timeout=10)
    assert found[1] is None
    for rank in (0, 2):
        name, message, state, modes, hooks, waiting = found[rank]
        assert name == "RankError"
        assert f"recalibrate: rank {rank} of 3 waited for the statistics of the other ranks" in message
        torch.testing.assert_close(state, _model().state_dict(), rtol=0, atol=0)
        assert modes == [True, True, False, True, True, True, True]
        assert (hooks, waiting) == (0, 0)


class _Paths(nn.Module):
    """On some ranks the batches take another way."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.first, self.second = rank, nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.second(self.first(x) if self.rank != 2 else x)


def _four_ranks(rank):
    """Batches of random sizes, ranks with none; batches that go through other layers on one rank."""
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(0, 9, (12,), generator=generator).tolist()
        owners = torch.randint(0, 4, (12,), generator=generator).tolist()
        x = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator) * 4 + 1
        model = _model()
        report = recalibrate(model, [part for part, owner in zip(x.split(sizes), owners, strict=True) if owner == rank])
        found.append((model.state_dict(), report.passes, x))
    paths = _Paths(rank).double()
    report = recalibrate(paths, _batches()[rank : rank + 1])
    return found, paths.state_dict(), report.passes, report.why_passes


def test_four_ranks_with_random_and_empty_shares_give_what_one_process_gives_on_everything(tmp_path):
    results = ranks.run(_four_ranks, 4, tmp_path)
    assert all(isinstance(one, tuple) for one in results), results
    for found, *_ in results:
        for state, passes, x in found:
            model = _model()
            recalibrate(model, [x])
            assert passes == 1
            for name, value in model.state_dict().items():
                if "running" in name:
                    torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10)
    for _, state, passes, why in results:
        torch.testing.assert_close(state, results[0][1], rtol=0, atol=0)
        assert passes > 1
        assert "do not go through the same layers" in why
