"""merge_statistics(): clients' statistics as one pass over all their data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import moments
from torch import nn

import batchnorm
from batchnorm import merge_statistics, recalibrate
from batchnorm.errors import ArgumentError, BatchNormError, ShapeError


def _client(rows, norm=nn.BatchNorm1d):
    model = nn.Sequential(nn.Flatten(), norm(rows.shape[1])).double()
    recalibrate(model, [rows])
    return model.state_dict()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 20), st.floats(-1e3, 1e3), st.floats(0.1, 10)), min_size=1, max_size=6))
def test_clients_merge_to_one_pass_over_all_data(clients):
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(n, 3, dtype=torch.float64, generator=generator) * std + mean for n, mean, std in clients]
    merged = merge_statistics([_client(rows) for rows in data], [len(rows) for rows in data])
    mean, var, count = moments(torch.cat(data).numpy())
    np.testing.assert_allclose(merged["1.running_mean"], mean, rtol=1e-11, atol=1e-9)
    np.testing.assert_allclose(merged["1.running_var"], var * count / (count - 1), rtol=1e-10)
    assert merged["1.num_batches_tracked"] == len(clients)


def test_federated_averaging_of_variances_loses_what_lies_between_the_clients():
    data = [torch.randn(50, 1, dtype=torch.float64) + shift for shift in (-5, 0, 5)]
    states = [_client(rows) for rows in data]
    averaged = torch.stack([state["1.running_var"] for state in states]).mean()
    merged = merge_statistics(states, [50, 50, 50])["1.running_var"]
    assert averaged < 2 < 15 < torch.cat(data).var()
    torch.testing.assert_close(merged, torch.cat(data).var(0))


def test_only_statistics_come_back_and_load():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(2, 3), batchnorm.BatchNorm1d(3)) for _ in range(2)]
    merged = merge_statistics([model.state_dict() for model in models], [10, 30])
    assert sorted(merged) == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert not models[0].load_state_dict(merged, strict=False).unexpected_keys


def test_counts_by_layer_and_clients_without_data():
    a, b = torch.randn(6, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    states = [_client(a), _client(b), _client(a * 100)]
    merged = merge_statistics(states, [{"1": 6}, {"1": 9}, {"1": 0}])
    torch.testing.assert_close(merged["1.running_var"], torch.cat([a, b]).var(0))
    assert merged["1.num_batches_tracked"] == 2


def test_dtype_of_the_first_and_old_checkpoints_without_a_count_of_batches():
    state = {name: value.float() for name, value in _client(torch.randn(5, 3).double()).items()}
    del state["1.num_batches_tracked"]
    merged = merge_statistics([state, state], [5, 5])
    assert sorted(merged) == ["1.running_mean", "1.running_var"]
    assert merged["1.running_mean"].dtype == torch.float32


STATE = {"bn.running_mean": torch.zeros(2), "bn.running_var": torch.ones(2)}


@pytest.mark.parametrize(
    ("states", "counts", "error", "match"),
    [
        ([], [], ArgumentError, "no state_dicts came"),
        ([nn.Linear(1, 1)], [1], ArgumentError, r"state_dicts\[0\] must be a state_dict, got Linear"),
        ([{"weight": torch.zeros(1)}], [1], ArgumentError, "has no running_mean beside a running_var"),
        ([STATE, {}], [1, 1], ArgumentError, "statistics of different layers: bn"),
        ([STATE], [1, 1], ArgumentError, "one entry for each state_dict, 1; got 2"),
        ([STATE], 3, ArgumentError, "counts must be a list, with one entry for each state_dict; got 3"),
        ([STATE], [2.5], ArgumentError, r"counts\[0\] must be an int of at least 0 .*got 2.5"),
        ([STATE], [-1], ArgumentError, "must be an int of at least 0"),
        ([STATE], [{"other": 3}], ArgumentError, "no entry for the layer 'bn'"),
        ([STATE, STATE], [0, 1], ShapeError, "bn: counts add up to 1"),
        ([STATE, {key: value[:1] for key, value in STATE.items()}], [3, 3], ShapeError, "bn: .*different shapes"),
        ([{**STATE, "bn.running_var": torch.full((2,), torch.nan)}], [3], BatchNormError, "of 'bn' are not finite"),
    ],
)
def test_bad_arguments(states, counts, error, match):
    with pytest.raises(error, match=match):
        merge_statistics(states, counts)
