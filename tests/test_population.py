from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from batchnorm import Moments
from batchnorm.errors import ArgumentError, ShapeError
from batchnorm.stats.population import mean_of_batches, moving_average, population
from batchnorm.stats.running import Running

KINDS = [pytest.param(np.asarray, id="numpy"), pytest.param(torch.as_tensor, id="torch")]


def _arrays(sizes=(8, 8, 8), drift=5.0):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((size, 3)) * (1 + i) + drift * i for i, size in enumerate(sizes)]


@pytest.mark.parametrize("kind", KINDS)
def test_mean_of_batches_is_algorithm_2(kind):
    arrays = _arrays()
    found = mean_of_batches([Moments.of(kind(a), 0) for a in arrays])
    mean, var = oracle.algorithm_2([oracle.moments(a) for a in arrays])
    np.testing.assert_allclose(np.asarray(found.mean), mean)
    np.testing.assert_allclose(np.asarray(found.var), var)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(8, 8, 8), (1, 20, 3), (0, 5, 19), (24,), (1,) * 24], ids=str)
def test_population_is_one_pass_over_everything(kind, sizes):
    arrays = _arrays(sizes)
    found = population([Moments.of(kind(a), 0) for a in arrays])
    whole = np.concatenate(arrays)
    np.testing.assert_allclose(np.asarray(found.mean), whole.mean(0))
    np.testing.assert_allclose(np.asarray(found.var), whole.var(0, ddof=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_moving_average_is_the_layers(kind, momentum):
    arrays = _arrays()
    layer = torch.nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    for a in arrays:
        layer(torch.from_numpy(a))
    found = moving_average((Moments.of(kind(a), 0) for a in arrays), momentum)
    np.testing.assert_allclose(np.asarray(found.mean), layer.running_mean.numpy(), atol=1e-15)
    np.testing.assert_allclose(np.asarray(found.var), layer.running_var.numpy())


def test_moving_average_depends_on_the_order_and_the_start_and_the_others_do_not():
    batches = [Moments.of(a, 0) for a in _arrays()]
    assert not np.allclose(moving_average(batches).mean, moving_average(batches[::-1]).mean)
    for estimate in (mean_of_batches, population):
        np.testing.assert_allclose(estimate(batches).var, estimate(batches[::-1]).var)
    started = moving_average(batches, 0.0, start=Running(np.full(3, 7.0), np.full(3, 9.0)))
    assert (started.mean.tolist(), started.var.tolist()) == ([7.0] * 3, [9.0] * 3)


def test_mean_of_batches_misses_the_variance_between_batches():
    """The known limit of Alg. 2: batches that differ in their means (facts: 1.12 where the truth is 9.49)."""
    batches = [Moments.of(a, 0) for a in _arrays((10,) * 5, drift=100.0)]
    assert (mean_of_batches(batches).var < 0.01 * population(batches).var).all()


def test_generators_are_read_once():
    assert population(Moments.of(a, 0) for a in _arrays()).mean.shape == (3,)
    assert mean_of_batches(Moments.of(a, 0) for a in _arrays()).mean.shape == (3,)


@pytest.mark.parametrize("estimate", [mean_of_batches, moving_average, population])
def test_no_batches(estimate):
    with pytest.raises(ArgumentError, match="no batches came"):
        estimate([])


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ArgumentError, match=r"momentum must be in \[0, 1\]"):
        moving_average([Moments.of(np.ones((2, 1)), 0)], momentum)


@pytest.mark.parametrize("estimate", [mean_of_batches, moving_average, population])
def test_one_value_in_all(estimate):
    with pytest.raises(ShapeError, match="at least 2 values"):
        estimate([Moments.of(np.ones((1, 3)), 0)])
