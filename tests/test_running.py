from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from batchnorm import Moments
from batchnorm.errors import ShapeError
from batchnorm.stats.running import Running, cumulative, exponential


def _batches(steps, channels=3):
    generator = torch.Generator().manual_seed(0)
    # Sizes and distributions differ from batch to batch: equal ones would hide a wrong weight.
    return [torch.randn(4 + i % 5, channels, generator=generator) * (1 + i % 3) + i % 7 for i in range(steps)]


@pytest.mark.parametrize("steps", [0, 1, 2, 100])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 0.9, 1.0])
def test_rules_follow_torch_and_the_oracle(steps, momentum):
    layer = torch.nn.BatchNorm1d(3, momentum=momentum)
    running = Running(torch.zeros(3), torch.ones(3))
    seen = []
    for step, x in enumerate(_batches(steps), start=1):
        layer(x)
        batch = Moments.of(x, 0)
        seen.append(oracle.moments(x.numpy()))
        running = exponential(running, batch, momentum) if momentum is not None else cumulative(running, batch, step)
    torch.testing.assert_close(running.mean.float(), layer.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(running.var.float(), layer.running_var, rtol=1e-5, atol=1e-6)
    if seen:
        mean, var = oracle.running(seen, momentum)
        np.testing.assert_allclose(running.mean, mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(running.var, var, rtol=1e-6)


def test_nothing_is_changed_in_place():
    before = Running(np.zeros(2), np.ones(2))
    after = exponential(before, Moments(np.ones(2), np.ones(2), 4), 0.5)
    assert before.mean.tolist() == [0, 0]
    assert before.var.tolist() == [1, 1]
    assert after.mean.tolist() == [0.5, 0.5]


def test_cumulative_forgets_the_start():
    batch = Moments(np.array([5.0]), np.array([3.0]), 4)
    first = cumulative(Running(np.array([123.0]), np.array([456.0])), batch, 1)
    assert (first.mean.tolist(), first.var.tolist()) == ([5.0], [4.0])


def test_batches_may_be_a_tensor():
    batch = Moments(torch.tensor([4.0]), torch.tensor([1.0]), 2)
    after = cumulative(Running(torch.zeros(1), torch.ones(1)), batch, torch.tensor(2))
    assert (after.mean.tolist(), after.var.tolist()) == ([2.0], [1.5])


def test_one_value_has_no_unbiased_variance():
    with pytest.raises(ShapeError, match="at least 2 values"):
        exponential(Running(np.zeros(1), np.ones(1)), Moments(np.ones(1), np.zeros(1), 1), 0.1)
