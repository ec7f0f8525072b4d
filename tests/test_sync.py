"""SyncBatchNorm on four gloo processes against the oracle, and one process, on the concatenated batch."""

from __future__ import annotations

import datetime
import os
import pickle
import re

import oracle
import pytest
import ranks
import sync_cases
import torch
import torch.distributed as dist
from sync_cases import CASES, WORLD

from batchnorm import BatchNorm, SyncBatchNorm
from batchnorm.errors import ArgumentError

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found in each case: one start of the processes for all cases, and for all workers of the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sync"
    folder.mkdir(exist_ok=True)
    workers = dist.FileStore(str(folder / "workers"))
    if workers.add("came", 1) == 1:
        try:
            ranks.run(sync_cases.all_cases, WORLD, folder)
        finally:
            workers.set("done", "1")
    workers.wait(["done"], datetime.timedelta(minutes=5))
    results = ranks.results(WORLD, folder)
    for result in results:
        assert isinstance(result, dict), result
    return results


def _close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), **EXACT)


def _expected(case):
    batch = case.batch()
    given = {k: None if v is None else v.numpy() for k, v in batch.items()}
    return oracle.train(
        given["x"],
        given["dy"],
        mask=given["mask"],
        residual=given["residual"],
        activation=dict(case.arguments).get("activation"),
    )


@pytest.mark.parametrize("name", CASES)
def test_ranks_give_what_one_process_gives_on_the_concatenated_batch(found, name):
    case, parts = CASES[name], [result[name] for result in found]
    expected = _expected(case)
    _close(torch.cat([part["y"] for part in parts]), expected.y)
    _close(torch.cat([part["dx"] for part in parts]), expected.dx)
    if "affine" not in dict(case.arguments):
        # Each rank has the gradient of its own part, as everywhere in torch: DDP puts them together.
        _close(sum(part["dweight"] for part in parts), expected.dweight)
        _close(sum(part["dbias"] for part in parts), expected.dbias)
    momentum = dict(case.arguments).get("momentum", 0.1)
    mean, var = oracle.running([(expected.mean, expected.var, expected.count)], momentum)
    for part in parts:
        _close(part["buffers"]["running_mean"], mean)
        _close(part["buffers"]["running_var"], var)
        assert int(part["buffers"]["num_batches_tracked"]) == 1
        assert part["is_channels_last"] in (None, True)


def test_evaluation_needs_no_other_rank(found):
    for rank, result in enumerate(found):
        case, part = CASES["empty"], result["empty"]
        start = sum(case.sizes[:rank])
        x = case.batch()["x"][start : start + case.sizes[rank]]
        _close(
            part["eval"],
            oracle.normalise(x, part["buffers"]["running_mean"], part["buffers"]["running_var"]),
        )


def test_compiled_without_a_graph_break(tmp_path):
    parts = ranks.run(sync_cases.one_step, 2, tmp_path, sync_cases.COMPILED)
    assert all(isinstance(part, dict) for part in parts), parts
    expected = _expected(sync_cases.COMPILED)
    _close(torch.cat([part["y"] for part in parts]), expected.y)
    _close(torch.cat([part["dx"] for part in parts]), expected.dx)
    for part in parts:
        assert int(part["buffers"]["num_batches_tracked"]) == 1


def test_groups_share_statistics_among_themselves_only(found):
    for group in ((0, 1), (2, 3)):
        whole = torch.cat([sync_cases.values_of(rank) for rank in group])
        y = BatchNorm(2, dtype=torch.float64)(whole)
        _close(torch.cat([found[rank]["groups"]["y"] for rank in group]), y)
        for rank in group:
            _close(found[rank]["groups"]["mean"], 0.1 * whole.mean(0))


def test_a_deep_copy_shares_the_process_group(found):
    for result in found:
        assert result["groups"]["is_shared"]
        _close(result["groups"]["mean of copy"], result["groups"]["mean"])


def test_checkpointed_segments_commit_once(found):
    whole = torch.cat([sync_cases.values_of(rank) for rank in range(WORLD)])
    for result in found:
        assert int(result["checkpoint"]["tracked"]) == 1
        _close(result["checkpoint"]["mean"], 0.1 * whole.mean(0))


def test_one_collective_operation_forward_and_one_backward(found):
    for result in found:
        forward, backward = result["collectives"]
        assert "allgather" in forward
        assert "allreduce" in backward


def test_gradients_of_gradients(found):
    whole = torch.cat([sync_cases.values_of(rank) for rank in range(WORLD)]).requires_grad_()
    layer = BatchNorm(2, dtype=torch.float64, activation="tanh")
    (dx,) = torch.autograd.grad(layer(whole).square().sum(), whole, create_graph=True)
    dx.square().sum().backward()
    _close(torch.cat([result["double backward"]["dx"] for result in found]), whole.grad)


def test_nan_on_one_rank_leaves_the_statistics_of_all(found):
    for result in found:
        assert int(result["nan"]["tracked"]) == 0
        assert not result["nan"]["mean"].any()


@pytest.mark.parametrize("kind", ["SyncBatchNorm", "TorchsOnCpu"])
def test_a_transaction_commits_the_batches_of_all_ranks_once(found, kind):
    whole = torch.cat([sync_cases.values_of(rank, n=rank * 2) for rank in range(WORLD)])
    for result in found:
        assert int(result["transaction"][kind]["tracked"]) == 1
        _close(result["transaction"][kind]["mean"], 0.1 * whole.mean(0))
        _close(result["transaction"][kind]["var"], 0.9 + 0.1 * whole.var(0))


def test_twenty_steps_of_ddp_are_those_of_one_process(found):
    alone = sync_cases.twenty_steps(None)
    for result in found:
        for name, value in result["ddp"].items():
            _close(value, alone[name])


# Ranks that do not come


@pytest.mark.parametrize(
    ("in_backward", "what"),
    [(False, "statistics of forward"), (True, "sums of backward")],
    ids=["forward", "backward"],
)
def test_when_a_rank_dies_the_others_name_the_layer_and_themselves(tmp_path, in_backward, what):
    results = ranks.run(sync_cases.one_dies, 3, tmp_path, in_backward, timeout=5)
    assert results[1] is None
    for rank in (0, 2):
        layer = r"4 = SyncBatchNorm\(6" if in_backward else r"1 = SyncBatchNorm\(4"
        assert re.search(rf"RankError: {layer}.*rank {rank} of 3 waited .* share the {what}", results[rank]), results


def test_a_rank_that_never_comes_ends_in_an_error_within_the_timeout(tmp_path):
    results = ranks.run(sync_cases.one_never_comes, 2, tmp_path, timeout=1)
    assert results[1] == "waited"
    assert results[0].startswith("RankError: SyncBatchNorm(2"), results[0]
    assert "rank 0 of 2 waited" in results[0]


# One process


def test_without_a_process_group_it_is_batch_norm():
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    layer, plain = SyncBatchNorm(3, dtype=torch.float64), BatchNorm(3, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.running_var, plain.running_var)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(x[:1, :, 0])


def test_arguments_come_in_the_order_of_torch_nn():
    ours = SyncBatchNorm(3, 1e-3, 0.2, False, False, None, "cpu", torch.float64)
    theirs = torch.nn.SyncBatchNorm(3, 1e-3, 0.2, False, False, None, "cpu", torch.float64)
    assert ours.extra_repr() == theirs.extra_repr()


@pytest.mark.parametrize("theirs", [torch.nn.BatchNorm1d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm])
def test_checkpoints_of_torch_nn_load_and_go_back(theirs):
    old = theirs(3)
    old.running_mean.normal_()
    ours = SyncBatchNorm(3)
    ours.load_state_dict(old.state_dict())
    assert torch.equal(ours.running_mean, old.running_mean)
    theirs(3).load_state_dict(ours.state_dict())


def test_pickle_refuses_a_process_group_and_says_what_to_do():
    layer = SyncBatchNorm(3)
    assert repr(pickle.loads(pickle.dumps(layer))) == repr(layer)
    layer.process_group = object()
    with pytest.raises(ArgumentError, match=r"process_group cannot be pickled.*state_dict"):
        pickle.dumps(layer)
