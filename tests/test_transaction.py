"""transaction(): running statistics commit once, at the end, and only if the step happened."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import transaction
from batchnorm.errors import ArgumentError, BatchNormError, StatisticsWarning

F64 = torch.float64
NORMS = [nn.BatchNorm1d, nn.SyncBatchNorm, batchnorm.BatchNorm1d]


def _model(norm, momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(norm(3, momentum=momentum), nn.Linear(3, 4), norm(4, momentum=momentum)).double()


def _statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name or "tracked" in name}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.sampled_from([0.1, None]), st.sampled_from(NORMS))
def test_micro_batches_commit_what_the_big_batch_would(sizes, momentum, norm):
    x = torch.randn(sum(sizes), 3, dtype=F64, generator=torch.Generator().manual_seed(1)) * 3 + 1
    layer, big = norm(3, momentum=momentum).double(), nn.BatchNorm1d(3, momentum=momentum).double()
    for _ in range(2):
        big(x)
        with transaction(layer):
            for part in x.split(sizes):
                layer(part)
    torch.testing.assert_close(layer.state_dict(), big.state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_accumulation_steps_once(norm):
    model = _model(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(32, 3, dtype=F64)
    outputs = [model(part) for part in copy.deepcopy(x).split(8)]
    model = _model(norm)
    with transaction(model, optimizer):
        for part, expected in zip(x.split(8), outputs, strict=True):
            y = model(part)
            torch.testing.assert_close(y, expected)  # each micro-batch is still normalised by itself
            y.square().sum().backward()
        before = _statistics(model)
        optimizer.step()
        assert _statistics(model).keys() == before.keys()
        torch.testing.assert_close(_statistics(model), before, rtol=0, atol=0)
    assert model[0].num_batches_tracked == model[2].num_batches_tracked == 1
    torch.testing.assert_close(model[0].running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(model[0].running_var, 0.9 + 0.1 * x.var(0))


@pytest.mark.parametrize("norm", NORMS)
def test_checkpoint_updates_torchs_layers_twice(norm):
    x = torch.randn(8, 3, dtype=F64, requires_grad=True)
    for reentrant in (False, True):
        model, plain = _model(norm), _model(norm)
        plain(x)
        with transaction(model):
            checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(_statistics(model), _statistics(plain), rtol=1e-10, atol=1e-10)


class _Overflow(torch.amp.GradScaler):
    """On a CPU that gives gradients an infinity when asked."""

    def __init__(self):
        super().__init__("cpu", init_scale=2.0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("overflows", [True, False])
def test_a_step_skipped_by_grad_scaler_commits_nothing(norm, overflows):
    model = _model(norm)
    before = _statistics(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), _Overflow()
    with transaction(model, optimizer) as opened:
        loss = model(torch.randn(8, 3, dtype=F64)).square().sum() * (float("inf") if overflows else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert opened.steps == (not overflows)
    assert model[0].num_batches_tracked == (not overflows)
    assert torch.equal(_statistics(model)["0.running_mean"], before["0.running_mean"]) == overflows
    assert not optimizer._optimizer_step_post_hooks


def test_a_fused_optimizer_that_looks_for_the_overflow_itself():
    model = _model(batchnorm.BatchNorm1d)
    optimizer, scaler = torch.optim.Adam(model.parameters(), fused=True), _Overflow()
    for scale, commits in ((float("inf"), 0), (1.0, 1)):
        optimizer.zero_grad()
        with transaction(model, optimizer):
            scaler.scale(model(torch.randn(8, 3, dtype=F64)).square().sum() * scale).backward()
            scaler.step(optimizer)
            scaler.update()
        assert model[0].num_batches_tracked == commits


@pytest.mark.parametrize("norm", NORMS)
def test_a_second_forward_does_not_count_twice(norm):
    """Real and fake through a discriminator: one commit, of both; none when only the generator steps."""
    discriminator = _model(norm)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    generators = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    real, fake = torch.randn(8, 3, dtype=F64), torch.randn(8, 3, dtype=F64) + 4
    with transaction(discriminator, optimizer):
        (discriminator(real).square().sum() - discriminator(fake).square().sum()).backward()
        optimizer.step()
    assert discriminator[0].num_batches_tracked == 1
    torch.testing.assert_close(discriminator[0].running_var, 0.9 + 0.1 * torch.cat([real, fake]).var(0))
    before = _statistics(discriminator)
    with transaction(discriminator, optimizer):
        discriminator(fake).square().sum().backward()
        generators.step()
    torch.testing.assert_close(_statistics(discriminator), before, rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_after_an_error_or_discard_nothing_is_committed_and_all_is_put_back(norm):
    model, plain = _model(norm), _model(norm)
    with pytest.raises(RuntimeError, match="out of memory"), transaction(model):  # noqa: PT012
        model(torch.randn(8, 3, dtype=F64))
        raise RuntimeError("out of memory")
    with transaction(model) as opened:
        model(torch.randn(8, 3, dtype=F64))
        assert opened.will_commit
        opened.discard()
    with transaction(model):
        pass
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    for mine, other in zip(model.modules(), plain.modules(), strict=True):
        assert mine.__dict__.keys() == other.__dict__.keys()
        assert not mine._forward_pre_hooks
        assert getattr(mine, "track_running_stats", None) == getattr(other, "track_running_stats", None)
    x = torch.randn(8, 3, dtype=F64)
    model(x), plain(x)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_batches_that_are_not_finite_are_left_out(norm):
    model = norm(3).double()
    good, bad = torch.randn(8, 3, dtype=F64), torch.full((8, 3), float("inf"), dtype=F64)
    plain = nn.BatchNorm1d(3).double()
    plain(good)
    for batches, commits in (((bad, good), 1), ((bad,), 1), ((good[:0], good[:0]), 2)):
        if norm is batchnorm.BatchNorm1d and batches[0] is bad and not model._has_warned:
            with pytest.warns(StatisticsWarning, match="not finite"), transaction(model):  # noqa: PT031
                for batch in batches:
                    model(batch)
        else:
            with transaction(model):
                for batch in batches:
                    model(batch)
        assert model.num_batches_tracked == commits
        torch.testing.assert_close(model.running_var, plain.running_var)


@pytest.mark.parametrize("norm", NORMS)
def test_evaluation_inside_is_evaluation(norm):
    model, plain = _model(norm), _model(norm)
    x = torch.randn(8, 3, dtype=F64)
    with transaction(model):
        model.eval()
        torch.testing.assert_close(model(x), plain.eval()(x))
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_masks():
    layer = batchnorm.BatchNorm1d(3, momentum=1.0).double()
    x, mask = torch.randn(6, 3, 5, dtype=F64), torch.rand(6, 5) > 0.3
    with transaction(layer):
        for part, of in zip(x.split(2), mask.split(2), strict=True):
            layer(part, mask=of)
    torch.testing.assert_close(layer.running_var, x.permute(0, 2, 1)[mask].var(0))


@pytest.mark.parametrize("norm", NORMS)
def test_compiled_whole_and_once_for_any_number_of_micro_batches(norm):
    torch._dynamo.reset()
    layer = norm(3, momentum=1.0)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(48, 3)
    for number in (1, 2):
        with transaction(layer):
            for part in x.split(4):  # more than torch recompiles
                compiled(part)
        assert layer.num_batches_tracked == number
        torch.testing.assert_close(layer.running_var, x.var(0))


def test_what_cannot_be():
    model = _model(batchnorm.BatchNorm1d)
    with transaction(model), pytest.raises(BatchNormError, match="0 is in an open transaction already"):
        transaction(model).__enter__()
    torchs = _model(nn.BatchNorm1d)
    with transaction(torchs), pytest.raises(BatchNormError, match="0 is in an open transaction already"):
        transaction(torchs).__enter__()
    assert torchs[0].track_running_stats
    with pytest.raises(ArgumentError, match=r"optimizer must be a torch.optim.Optimizer or None, got float"):
        transaction(model, 0.1).__enter__()
    with pytest.raises(ArgumentError, match="Linear has no batch normalization layer"):
        transaction(nn.Linear(1, 1)).__enter__()
    layer = batchnorm.BatchNorm1d(3)
    with transaction(layer), pytest.raises(BatchNormError, match=r"no batches under torch.func"):
        torch.vmap(layer)(torch.randn(2, 4, 3))


def test_frozen_layers_and_layers_without_statistics():
    model = nn.Sequential(batchnorm.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    batchnorm.freeze(model, layers=["0"])
    model.train()
    with transaction(model):
        model(torch.randn(8, 3))
    assert [layer.num_batches_tracked for layer in model] == [0, 1, None]
