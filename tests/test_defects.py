"""Defects of today's tools in statistics, each reproduced where the tool is at hand, and what we do instead.

Those that recalibrate, transaction and the ranks answer to have their tests beside theirs: update_bn and PreciseBN in
test_recalibration.py, checkpointing in test_transaction.py, gloo in test_sync.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import BatchNorm1d, BatchNorm2d, SyncBatchNorm, recalibrate, transaction
from batchnorm.errors import ShapeError


def test_torch_updates_twice_under_checkpoint_and_we_once():
    x = torch.randn(8, 3, requires_grad=True)
    theirs, ours = nn.BatchNorm1d(3), BatchNorm1d(3)
    for layer in (theirs, ours):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert (int(theirs.num_batches_tracked), int(ours.num_batches_tracked)) == (2, 1)


def test_torch_stalls_at_96_in_a_bfloat16_model_whose_mean_is_100_and_we_do_not():
    theirs, ours = nn.BatchNorm1d(1).bfloat16(), BatchNorm1d(1).bfloat16()
    with torch.no_grad():
        for _ in range(200):
            x = (torch.randn(256, 1) + 100).bfloat16()
            theirs(x), ours(x)
    assert theirs.running_mean.item() < 97
    assert ours.running_mean.item() == pytest.approx(100, abs=0.1)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
def test_torch_sync_batch_norm_refuses_gloo_on_a_cpu_and_ours_runs_there(tmp_path):
    """On several ranks: test_sync.py."""
    x = torch.randn(4, 3, 2)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
            nn.SyncBatchNorm(3)(x)
        torch.testing.assert_close(SyncBatchNorm(3)(x), nn.BatchNorm1d(3)(x))
    finally:
        dist.destroy_process_group()


def test_torch_raises_under_vmap_and_grad_in_training_and_we_do_not():
    x = torch.randn(4, 8, 3)
    with pytest.raises(RuntimeError, match=r"(?i)batch norm got a batched tensor"):
        vmap(nn.BatchNorm1d(3))(x)
    assert vmap(BatchNorm1d(3))(x).shape == x.shape
    parameters, buffers = stack_module_state([BatchNorm1d(3) for _ in range(4)])
    base = BatchNorm1d(3, device="meta")
    grads = vmap(grad(lambda p, b, x: functional_call(base, (p, b), (x,)).pow(3).sum()))(parameters, buffers, x)
    assert grads["weight"].shape == (4, 3)
    assert buffers["num_batches_tracked"].tolist() == [1, 1, 1, 1]


def test_torch_does_not_compile_fullgraph_with_momentum_none_and_we_do():
    torch._dynamo.reset()
    layer, plain, x = BatchNorm1d(3, momentum=None), BatchNorm1d(3, momentum=None), torch.randn(8, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(3):
        torch.testing.assert_close(compiled(x + step), plain(x + step))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


def test_torch_is_off_by_7e_5_at_a_constant_1000_1_and_we_are_exact():
    x = torch.full((64, 3, 20, 20), 1000.1)
    ours = BatchNorm2d(3, momentum=1.0)
    y = ours(x)
    torch.testing.assert_close(ours.running_mean, x[0, :, 0, 0], rtol=0, atol=0)
    assert not ours.running_var.any()
    assert not y.any()


def test_keras_has_a_negative_variance_and_then_nan_at_mean_1e4_and_we_do_not():
    layer = BatchNorm1d(2, momentum=1.0)
    x = torch.randn(512, 2) + 1e4
    y = layer(x)
    torch.testing.assert_close(layer.running_var.double(), x.double().var(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(y.double(), (x.double() - x.double().mean(0)) / x.double().std(0), rtol=0, atol=5e-3)


def test_keras_has_nan_statistics_after_an_empty_batch_and_we_keep_ours():
    layer = BatchNorm2d(3)
    layer(torch.randn(4, 3, 2, 2))
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.empty(0, 3, 2, 2)).shape == (0, 3, 2, 2)
    for name in ("running_mean", "running_var"):
        assert torch.equal(layer.state_dict()[name], before[name])


def test_keras_answers_zeros_to_one_value_a_channel_and_we_say_so():
    with pytest.raises(ShapeError, match="Expected more than 1 value per channel"):
        BatchNorm1d(3)(torch.randn(1, 3))


def test_amp_overflow_poisons_running_statistics_and_ours_leave_it_out():
    theirs, ours = nn.BatchNorm1d(3), BatchNorm1d(3)
    x = torch.randn(8, 3)
    x[2, 1] = float("inf")
    theirs(x)
    with pytest.warns(batchnorm.errors.StatisticsWarning, match="not finite"):
        ours(x)
    assert not theirs.running_mean.isfinite().all()
    assert ours.running_mean.isfinite().all()


def test_gradient_accumulation_is_not_a_big_batch_to_torch_and_its_statistics_are_to_a_transaction():
    x = torch.randn(4, 8, 3) + torch.arange(4.0)[:, None, None] * 5  # micro-batches with different means
    theirs, ours, big = nn.BatchNorm1d(3), BatchNorm1d(3), nn.BatchNorm1d(3)
    with transaction(ours):
        for part in x:
            theirs(part), ours(part)
    big(x.flatten(0, 1))
    assert not torch.allclose(theirs.running_var, big.running_var, rtol=0.1)
    torch.testing.assert_close(ours.state_dict(), big.state_dict())


def test_swa_weights_have_stale_statistics_until_they_are_recalibrated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(64, 4) * 3 + 1
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    layer = average.module[1]
    truth = average.module[0](x).detach()
    assert (layer.running_var - truth.var(0)).abs().max() > 0.1
    recalibrate(average, x.split(16))
    torch.testing.assert_close(layer.running_mean, truth.mean(0))
    torch.testing.assert_close(layer.running_var, truth.var(0))
