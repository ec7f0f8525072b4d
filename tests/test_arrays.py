"""batch_norm on NumPy arrays."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from batchnorm import Moments, batch_norm
from batchnorm.errors import DtypeError
from batchnorm.stats.running import Running


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_forward(dtype):
    x = np.random.default_rng(0).normal(3, 2, (6, 4, 5)).astype(dtype)
    y, moments = batch_norm(x, np.full(4, 2, dtype), np.ones(4, dtype), activation="relu")
    mean, var, _ = oracle.moments(x)
    assert isinstance(y, np.ndarray)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, np.maximum(2 * oracle.normalise(x, mean, var) + 1, 0), rtol=1e-4, atol=1e-5)
    assert isinstance(moments, Moments)
    assert isinstance(moments.mean, np.ndarray)
    np.testing.assert_allclose(moments.var, var, rtol=1e-6)


def test_inference_returns_what_was_given():
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    given = Running(np.zeros(4, np.float32), np.ones(4, np.float32))
    y, used = batch_norm(x, moments=given, eps=0.0)
    assert used is given
    np.testing.assert_allclose(y, x)


def test_mask_residual_channel_axis_and_odd_strides():
    rng = np.random.default_rng(1)
    x, residual, mask = rng.normal(size=(5, 7, 3)), rng.normal(size=(5, 7, 3)), rng.random((5, 7)) < 0.6
    tensors = [torch.from_numpy(a) for a in (x, residual, mask)]
    expected, _ = batch_norm(tensors[0], residual=tensors[1], mask=tensors[2], channel_axis=-1)
    y, moments = batch_norm(x, residual=residual, mask=mask, channel_axis=-1)
    np.testing.assert_allclose(y, expected.numpy())
    assert isinstance(moments.count, np.ndarray)
    x.setflags(write=False)
    turned, _ = batch_norm(x[::-1], residual=residual[::-1], mask=mask[::-1], channel_axis=-1)
    np.testing.assert_allclose(turned[::-1], y, rtol=1e-12)


def test_integers_are_refused():
    with pytest.raises(DtypeError, match="float16, float32 or float64"):
        batch_norm(np.ones((3, 2), dtype=np.int64))
