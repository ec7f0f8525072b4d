"""BatchRenorm against NumPy float64, written from Alg. 1 of the paper (running variances, as in torch.nn)."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import close

from batchnorm import BatchNorm, BatchRenorm
from batchnorm.errors import ArgumentError

EPS = 1e-5


def _paper(x, dy, weight, bias, running_mean, running_var, r_max, d_max):
    """Alg. 1 with its gradients (section 3): y, dx, dweight, dbias; r and d are constants to the gradient."""
    mean, var, count = oracle.moments(x)

    def on(values):
        return oracle.spread(values, x.ndim, (1,))

    std_b, std = np.sqrt(var + EPS), np.sqrt(running_var + EPS)
    r = np.clip(std_b / std, 1 / r_max, r_max)
    d = np.clip((mean - running_mean) / std, -d_max, d_max)
    plain = (x - on(mean)) / on(std_b)
    x_hat = plain * on(r) + on(d)
    axes = oracle.others(x.ndim, (1,))
    d_hat = dy * on(weight)
    d_std = (d_hat * (x - on(mean)) * on(-r / std_b**2)).sum(axes)
    d_mean = (d_hat * on(-r / std_b)).sum(axes)
    dx = d_hat * on(r / std_b) + on(d_std) * (x - on(mean)) / on(std_b * count) + on(d_mean / count)
    return x_hat * on(weight) + on(bias), dx, (dy * x_hat).sum(axes), dy.sum(axes)


def _schedules(step):
    """The paper's section 4, by hand."""
    r = 1 if step <= 5000 else min(3, 1 + 2 * (step - 5000) / 35000)
    d = 0 if step <= 5000 else min(5, 5 * (step - 5000) / 20000)
    return r, d


@pytest.mark.parametrize("step", [0, 5000, 5001, 12000, 25000, 30000, 40000, 100000])
def test_alg_1_and_its_gradients_at_each_stage_of_the_schedule(step):
    generator = np.random.default_rng(step)
    layer = BatchRenorm(4, dtype=torch.float64)
    state = {
        "weight": generator.normal(size=4),
        "bias": generator.normal(size=4),
        # One channel within the bounds, others far outside on either side.
        "running_mean": np.array([0.9, -20.0, 30.0, 1.2]),
        "running_var": np.array([4.4, 200.0, 0.05, 3.0]),
    }
    layer.load_state_dict({**{k: torch.tensor(v) for k, v in state.items()}, "num_batches_tracked": torch.tensor(step)})
    x, dy = generator.normal(1, 2, (9, 4, 3)), generator.normal(size=(9, 4, 3))
    leaf = torch.tensor(x, requires_grad=True)
    y = layer(leaf)
    y.backward(torch.tensor(dy))
    expected = _paper(x, dy, *state.values(), *_schedules(step))
    for found, wanted in zip((y, leaf.grad, layer.weight.grad, layer.bias.grad), expected, strict=True):
        close(found, wanted, torch.float64)
    mean, var, count = oracle.moments(x)
    close(layer.running_mean, 0.99 * state["running_mean"] + 0.01 * mean, torch.float64)
    close(layer.running_var, 0.99 * state["running_var"] + 0.01 * oracle.unbiased(var, count), torch.float64)
    assert int(layer.num_batches_tracked) == step + 1


def test_within_the_bounds_training_gives_what_evaluation_gives():
    layer = BatchRenorm(3, r_max=[(0, 1e9)], d_max=[(0, 1e9)], activation="relu")
    layer(torch.randn(8, 3))
    x, residual = torch.randn(8, 3), torch.randn(8, 3)
    evaluated = layer.eval()(x, residual)
    torch.testing.assert_close(layer.train()(x, residual), evaluated)


def test_at_the_start_it_is_batch_norm():
    x = torch.randn(8, 3)
    torch.testing.assert_close(BatchRenorm(3)(x), BatchNorm(3)(x))


def test_checkpoints_of_torch_nn_load_with_their_place_in_the_schedule_and_go_back():
    old = torch.nn.BatchNorm1d(3)
    old.num_batches_tracked.fill_(40_000)
    layer = BatchRenorm(3, dtype=torch.float32)
    layer.load_state_dict(old.state_dict())
    torch.nn.BatchNorm1d(3).load_state_dict(layer.state_dict())
    x = torch.randn(8, 3)
    torch.testing.assert_close(layer.eval()(x), old.eval()(x))
    r = (x.var(0, correction=0) + EPS).sqrt().clamp(1 / 3, 3)
    torch.testing.assert_close(
        layer.train()(x), (x - x.mean(0)) / (x.var(0, correction=0) + EPS).sqrt() * r + x.mean(0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("affine", [{"affine": False}, {"bias": False}], ids=str)
def test_without_weight_or_bias(affine):
    layer = BatchRenorm(3, r_max=[(0, 2.0)], d_max=[(0, 2.0)], dtype=torch.float64, **affine)
    x = torch.randn(8, 3, dtype=torch.float64) + 1
    ones, zeros = np.ones(3), np.zeros(3)
    expected, *_ = _paper(x.numpy(), x.numpy(), ones, zeros, zeros, ones, 2.0, 2.0)
    close(layer(x), expected, torch.float64)


def test_bad_schedules_get_clear_errors():
    with pytest.raises(ArgumentError, match=r"r_max must be .step, value. pairs, got 3.0; a constant is"):
        BatchRenorm(3, r_max=3.0)
    with pytest.raises(ArgumentError, match=r"r_max must be .* ascending steps"):
        BatchRenorm(3, r_max=[(10, 1.0), (10, 2.0)])
    with pytest.raises(ArgumentError, match=r"d_max must be .* ascending steps"):
        BatchRenorm(3, d_max=[])
    with pytest.raises(ArgumentError, match="r_max must not fall below 1"):
        BatchRenorm(3, r_max=[(0, 0.5)])
    with pytest.raises(ArgumentError, match="d_max must not fall below 0"):
        BatchRenorm(3, d_max=[(0, -1.0)])
