"""The family of layers under recalibrate, transaction, freeze and parameter_groups."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import moments
from torch import nn

from batchnorm import (
    BatchNorm,
    BatchRenorm,
    DecorrelatedBatchNorm,
    DomainBatchNorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    SyncBatchNorm,
    freeze,
    parameter_groups,
    recalibrate,
    transaction,
    unfreeze,
    use_domain,
)
from batchnorm.errors import ArgumentError, BatchNormError

F64 = torch.float64


def _ghost(channels):
    return GhostBatchNorm(channels, ghost_size=4)


@pytest.mark.parametrize("norm", [BatchNorm, BatchRenorm, SyncBatchNorm, _ghost])
def test_population_statistics_of_each(norm):
    model = nn.Sequential(norm(3), nn.Linear(3, 4), norm(4)).double()
    x = torch.randn(40, 3, dtype=F64) * 3 + 1
    recalibrate(model, x.split(7))
    y = model.eval()[1](model[0](x)).detach()
    for layer, values in ((model[0], x), (model[2], y)):
        mean, var, count = moments(values.numpy())
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(layer.running_var, var * count / (count - 1), rtol=1e-10)


@pytest.mark.parametrize("norm", [BatchNorm, BatchRenorm, SyncBatchNorm, _ghost])
def test_a_transaction_commits_the_big_batch(norm):
    layer = norm(3).double()
    x = torch.randn(32, 3, dtype=F64) * 3 + 1
    momentum = layer.momentum
    with transaction(layer):
        for part in x.split(8):
            layer(part).sum().backward()
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, momentum * x.mean(0))
    torch.testing.assert_close(layer.running_var, 1 - momentum + momentum * x.var(0))


@pytest.mark.parametrize("norm", [BatchNorm, BatchRenorm, SyncBatchNorm, _ghost, DecorrelatedBatchNorm])
def test_each_can_be_frozen(norm):
    model = nn.Sequential(nn.Linear(3, 4), norm(4)).double()
    plain = copy.deepcopy(model)
    x = torch.randn(16, 3, dtype=F64)
    expected = plain.eval()(x)
    freeze(model)
    model.train()
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected)
        assert not twin[1].training
        _, report = unfreeze(twin)
        assert report.nothing_moved
        assert twin[1].weight.requires_grad
        assert twin[1].training
        assert type(twin[1]) is type(plain[1])


def test_domains_share_weights_and_keep_their_own_statistics():
    layer = DomainBatchNorm(3, domains=("real", "fake")).double()
    real, fake = torch.randn(20, 3, dtype=F64), torch.randn(20, 3, dtype=F64) + 5
    with use_domain(layer, "fake"):
        report = recalibrate(layer, [fake])
    assert [one.name for one in report.layers] == ["domains.fake"]
    assert [one.name for one in report.skipped] == ["domains.real"]
    torch.testing.assert_close(layer.domains["fake"].running_mean, fake.mean(0))
    with transaction(layer):
        for domain, x in (("real", real), ("fake", fake), ("real", real + 1)):
            layer(x, domain=domain)
    assert [int(one.num_batches_tracked) for one in layer.domains.values()] == [1, 2]
    freeze(layer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    unfreeze(layer)
    assert all(parameter.requires_grad for parameter in layer.parameters())
    _, kept = parameter_groups(layer, 0.1)
    assert len(kept["params"]) == 2


def _covariances(x, groups, mask=None):
    """Mean and unbiased covariance of groups of channels, NumPy float64; x is (N, C, L)."""
    rows = np.moveaxis(x.double().numpy(), 1, -1)
    rows = rows[mask.numpy()] if mask is not None else rows.reshape(-1, x.shape[1])
    parts = np.split(rows, groups, axis=1)
    return rows.mean(0), np.stack([np.cov(part, rowvar=False) for part in parts])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.sampled_from([torch.float32, F64]), st.booleans())
def test_population_covariances_do_not_depend_on_the_split(cuts, dtype, is_masked):
    x = (torch.randn(40, 6, 3, dtype=F64, generator=torch.Generator().manual_seed(1)) * 3 + 50).to(dtype)
    mask = torch.rand(40, 3, generator=torch.Generator().manual_seed(2)) > 0.3 if is_masked else None
    layer = DecorrelatedBatchNorm(6, group_size=3, dtype=F64)
    edges = [0, *sorted(cuts), 40]
    parts = list(itertools.pairwise(edges))
    report = recalibrate(
        layer,
        parts,
        forward=lambda layer, part: layer(x[slice(*part)], mask=None if mask is None else mask[slice(*part)]),
    )
    mean, covariance = _covariances(x, 2, mask)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_covariance, covariance, rtol=1e-9, atol=1e-9)
    assert report.layers[0].count == (120 if mask is None else int(mask.sum()))


@pytest.mark.parametrize("sizes", [(32,), (8, 8, 8, 8), (1, 20, 0, 11)])
def test_whitening_layers_in_a_transaction_commit_the_big_batch(sizes):
    layer, big = (DecorrelatedBatchNorm(4, group_size=2, method="newton").double() for _ in range(2))
    x = torch.randn(32, 4, 3, dtype=F64) * 3 + 1
    with transaction(layer):
        for part in x.split(sizes):
            layer(part).sum().backward()
        assert layer.num_batches_tracked == 0
    big(x)
    assert layer._stage is None
    torch.testing.assert_close(layer.state_dict(), big.state_dict(), rtol=1e-10, atol=1e-10)
    with pytest.raises(BatchNormError, match="in an open transaction already"), transaction(layer):
        transaction(layer).__enter__()


def test_a_frozen_batch_norm_has_nothing_to_recalibrate():
    model = nn.Sequential(FrozenBatchNorm(3), BatchNorm(3))
    report = recalibrate(model, [torch.randn(20, 3)])
    assert [one.name for one in report.layers] == ["1"]
    with pytest.raises(ArgumentError, match="has no batch normalization layer"):
        recalibrate(model[:1], [torch.randn(20, 3)])
