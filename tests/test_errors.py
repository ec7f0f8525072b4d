# ruff: noqa: E501 (a table reads best with one case a line)
"""Each error says what was expected, what came, and what to do; and is of the class that callers catch already."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, Moments, batch_norm
from batchnorm import errors as e
from batchnorm.stats.running import Running

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def _mask(*shape, dtype=torch.bool):
    return torch.ones(shape, dtype=dtype)


CALLS = [
    # input
    ("integer input", lambda: batch_norm(X.long()), e.DtypeError, r"got torch.int64 of shape \(4, 3\): pass x.float\(\)"),
    ("integer into a layer", lambda: BatchNorm1d(3)(X.int()), e.DtypeError, "float tensor, got torch.int32"),
    ("bool input", lambda: BatchNorm1d(3)(X > 0), e.DtypeError, "float tensor, got torch.bool"),
    ("complex input", lambda: batch_norm(X.to(torch.complex64)), e.DtypeError, "float tensor, got torch.complex64"),
    ("list input", lambda: batch_norm(X.tolist()), e.DtypeError, r"got list: pass torch.as_tensor\(x\)"),
    ("list input", lambda: batch_norm([[1.0]]), e.DtypeError, "got list"),
    # channels
    ("wrong channels", lambda: BatchNorm1d(5)(X), e.ShapeError, r"expected 5 channels on axis 1, got 3 .*shape \(4, 3\)"),
    ("wrong channels, eval", lambda: BatchNorm2d(5).eval()(IMAGE), e.ShapeError, "expected 5 channels on axis 1, got 3"),
    ("wrong channels, plain", lambda: BatchNorm1d(5, affine=False, track_running_stats=False)(X), e.ShapeError, "got 3"),
    ("one channel for many", lambda: BatchNorm1d(1)(X), e.ShapeError, "expected 1 channels on axis 1, got 3"),
    ("wrong stack", lambda: BatchNorm((2, 3), channel_axis=(0, 1))(X), e.ShapeError, r"expected \(2, 3\) .* got \(4, 3\)"),
    ("weight", lambda: batch_norm(X, torch.ones(4)), e.ShapeError, r"weight must have .*\(3,\), .*\(4, 3\).* got \(4,\)"),
    ("bias", lambda: batch_norm(X, None, torch.ones(1, 3)), e.ShapeError, r"bias must have .* got \(1, 3\)"),
    ("scalar weight", lambda: batch_norm(X, torch.ones(())), e.ShapeError, r"weight must have .* got \(\)"),
    ("mean", lambda: batch_norm(X, moments=Running(torch.ones(4), torch.ones(3))), e.ShapeError, "moments.mean must"),
    ("var", lambda: batch_norm(X, moments=Running(torch.ones(3), torch.ones(4))), e.ShapeError, "moments.var must"),
    ("NumPy moments", lambda: batch_norm(X, moments=Moments.of(X.numpy(), 0)), e.DtypeError, "mean must be a tensor"),
    # rank
    ("1d: 1D", lambda: BatchNorm1d(3)(X[0]), e.ShapeError, r"BatchNorm1d expected 2D or 3D input.*got 1D.*\(3,\)"),
    ("1d: 4D", lambda: BatchNorm1d(3)(IMAGE), e.ShapeError, "expected 2D or 3D input.*got 4D.*BatchNorm2d"),
    ("2d: 3D", lambda: BatchNorm2d(3)(IMAGE[0]), e.ShapeError, "BatchNorm2d expected 4D input.*got 3D"),
    ("3d: 4D", lambda: BatchNorm3d(3)(IMAGE), e.ShapeError, "BatchNorm3d expected 5D input.*got 4D"),
    ("no such axis", lambda: batch_norm(X, channel_axis=2), e.ShapeError, r"channel axis 2 is out of range.*\(4, 3\)"),
    ("no such axis -3", lambda: batch_norm(X, channel_axis=-3), e.ShapeError, "channel axis -3 is out of range"),
    ("a vector", lambda: batch_norm(X[0]), e.ShapeError, "channel axis 1 is out of range"),
    ("a scalar", lambda: batch_norm(X[0, 0], channel_axis=0), e.ShapeError, "channel axis 0 is out of range"),
    ("layer, no such axis", lambda: BatchNorm(3, channel_axis=3)(X), e.ShapeError, "axis 3, which an input of shape"),
    ("axis twice", lambda: batch_norm(X, channel_axis=(1, -1)), e.ArgumentError, "none twice"),
    ("no axis", lambda: batch_norm(X, channel_axis=()), e.ArgumentError, "at least one axis"),
    ("int and tuple", lambda: BatchNorm(3, channel_axis=(0, 1)), e.ArgumentError, "both be ints or both be tuples"),
    ("tuple and int", lambda: BatchNorm((3, 4)), e.ArgumentError, r"got \(3, 4\) and 1"),
    # one value a channel
    ("one value", lambda: batch_norm(X[:1]), e.ShapeError, r"Expected more than 1 value per channel.*\(1, 3\)"),
    ("one value, 4D", lambda: BatchNorm2d(3)(IMAGE[:1, :, :1, :1]), e.ShapeError, r"drop_last=True.*eval\(\)"),
    ("one value by mask", lambda: batch_norm(X, mask=torch.arange(4) == 2), e.ShapeError, "more than 1 value"),
    ("all axes", lambda: batch_norm(X, channel_axis=(0, 1)), e.ShapeError, "more than 1 value"),
    # mask
    ("mask dtype", lambda: batch_norm(X, mask=_mask(4, dtype=torch.int64)), e.DtypeError, "got torch.int64: pass mask != 0"),
    ("mask float", lambda: BatchNorm1d(3)(X, mask=_mask(4).float()), e.DtypeError, "mask must be bool"),
    ("mask NumPy", lambda: batch_norm(X, mask=np.ones(4, bool)), e.DtypeError, "bool tensor, got ndarray"),
    ("mask list", lambda: batch_norm(X, mask=[True] * 4), e.DtypeError, "bool tensor, got list"),
    ("mask shape", lambda: batch_norm(X, mask=_mask(3)), e.ShapeError, r"mask of shape \(3,\).*\(4, 3\).*\(4,\)"),
    ("mask as input", lambda: batch_norm(X, mask=_mask(4, 3)), e.ShapeError, r"mask of shape \(4, 3\) does not fit"),
    ("mask 4D", lambda: BatchNorm2d(3)(IMAGE, mask=_mask(2, 5, 4)), e.ShapeError, r"without its channel axis, \(2, 4, 5\)"),
    ("mask in eval", lambda: BatchNorm2d(3).eval()(IMAGE, mask=_mask(2, 5, 4)), e.ShapeError, "does not fit"),
    # residual
    ("residual shape", lambda: batch_norm(X, residual=X[:1]), e.ShapeError, r"residual must .*\(4, 3\); got \(1, 3\)"),
    ("residual dtype", lambda: batch_norm(X, residual=X.double()), e.DtypeError, "residual must .*float32; got .*float64"),
    # options
    ("activation", lambda: batch_norm(X, activation="swish"), e.ArgumentError, "one of relu, .*got 'swish'"),
    ("activation, layer", lambda: BatchNorm1d(3, activation="ReLU"), e.ArgumentError, "one of relu, .*got 'ReLU'"),
    ("eps", lambda: batch_norm(X, eps=-1e-5), e.ArgumentError, "eps must be at least 0, got -1e-05"),
    ("eps, layer", lambda: BatchNorm1d(3, eps=-1.0)(X), e.ArgumentError, "eps must be at least 0, got -1.0"),
    ("eps, NaN", lambda: batch_norm(X, eps=float("nan")), e.ArgumentError, "eps must be at least 0, got nan"),
    # dtypes that do not go together
    ("float64 input", lambda: BatchNorm1d(3)(X.double()), e.DtypeError, "weight is torch.float32 but the input is torch.float64"),
    ("float32 into bfloat16", lambda: BatchNorm1d(3).bfloat16()(X), e.DtypeError, "weight is torch.bfloat16 .* Convert one"),
    ("float16 into bfloat16", lambda: BatchNorm1d(3).bfloat16()(X.half()), e.DtypeError, "expected torch.float16 or"),
    ("float64 parameters, half", lambda: BatchNorm1d(3).double()(X.half()), e.DtypeError, "or torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), [pytest.param(*c[1:], id=c[0]) for c in CALLS])
def test_error(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call()
    assert isinstance(caught.value, e.BatchNormError)
    assert isinstance(caught.value, TypeError if error is e.DtypeError else ValueError)


def test_what_is_no_error():
    """Limits that are easily drawn one too tight."""
    assert BatchNorm(5, channel_axis=-1)(IMAGE[0]).shape == (3, 4, 5)
    assert batch_norm(X, eps=0)[0].isfinite().all()
    assert batch_norm(X[:1], moments=Running(torch.zeros(3), torch.ones(3)))[0].shape == (1, 3)
    assert batch_norm(X[:2])[0].shape == (2, 3)
    assert BatchNorm1d(3).half()(X.half()).dtype == torch.float16
    assert BatchNorm1d(3)(X.bfloat16()).dtype == torch.bfloat16


def test_errors_stay_clear_under_no_grad_and_in_a_network():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), BatchNorm1d(5))
    with torch.no_grad(), pytest.raises(e.ShapeError, match="BatchNorm1d expected 5 channels"):
        network(X)


def test_the_warning_is_a_user_warning():
    assert issubclass(e.StatisticsWarning, UserWarning)
