"""out=: inference written to a tensor that is there, the input itself included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DTYPES

from batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, GhostBatchNorm, batch_norm
from batchnorm.errors import ArgumentError, DtypeError, ShapeError
from batchnorm.kernels import dispatch
from batchnorm.stats.running import Running


def _given(channels, dtype=torch.float32):
    return Running(torch.randn(channels).to(dtype), torch.rand(channels).to(dtype) + 0.5)


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    before = dispatch.get_backend()
    dispatch.set_backend(request.param)
    yield request.param
    dispatch.set_backend(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_in_place_is_what_it_would_be(dtype, memory_format, backend):
    x = torch.randn(3, 5, 4, 4).to(dtype).contiguous(memory_format=memory_format)
    given, residual = _given(5), torch.randn_like(x)
    weight, bias = torch.rand(5).to(dtype), torch.rand(5).to(dtype)
    expected, _ = batch_norm(x, weight, bias, moments=given, activation="relu", residual=residual)
    address, version = x.data_ptr(), x._version
    with torch.no_grad():
        y, used = batch_norm(x, weight, bias, moments=given, activation="relu", residual=residual, out=x)
    assert y is x
    assert x.data_ptr() == address
    assert x._version > version  # autograd finds out
    assert used is given
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


def test_another_tensor_of_another_layout_and_a_residual_that_is_the_input(backend):
    x, given = torch.randn(3, 5, 4, 4), _given(5)
    expected, _ = batch_norm(x, moments=given, residual=x)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    y, _ = batch_norm(x, moments=given, residual=x, out=out)
    assert y is out
    torch.testing.assert_close(out, expected)
    batch_norm(x, moments=given, residual=x, out=x)
    torch.testing.assert_close(x, expected)


def test_memory_that_overlaps_the_input_is_written_after_it_was_read(backend):
    whole, given = torch.randn(9, 5), _given(5)
    expected, _ = batch_norm(whole[:8], moments=given)
    batch_norm(whole[:8], moments=given, out=whole[1:])
    torch.testing.assert_close(whole[1:], expected)


def test_with_mask_and_other_channel_axes(backend):
    x, given = torch.randn(4, 6, 5), _given(5)
    mask = torch.rand(4, 6) > 0.5
    expected, _ = batch_norm(x, moments=given, channel_axis=-1, mask=mask)
    assert batch_norm(x, moments=given, channel_axis=-1, mask=mask, out=x)[0] is x
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_layers_in_evaluation(context):
    for layer in (BatchNorm2d(5, activation="relu"), BatchNorm(5), GhostBatchNorm(5)):
        layer.eval()
        x = torch.randn(3, 5, 4, 4)
        with context():
            x = x.clone()
            expected = layer(x)
            assert layer(x, out=x) is x
        torch.testing.assert_close(x, expected)


def test_under_compile():
    torch._dynamo.reset()
    x, layer = torch.randn(6, 3), BatchNorm1d(3).eval()
    with torch.no_grad():
        expected = layer(x)
        torch.compile(lambda x: layer(x, out=x), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(x, expected)


def test_where_it_cannot_be():
    x, given = torch.randn(6, 3), _given(3)
    with pytest.raises(ArgumentError, match="out= needs moments="):
        batch_norm(x, out=x)
    with pytest.raises(ArgumentError, match=r"call eval\(\)"), torch.no_grad():
        BatchNorm1d(3)(x, out=x)
    with pytest.raises(ArgumentError, match=r"under torch\.no_grad"):
        batch_norm(x, torch.ones(3, requires_grad=True), moments=given, out=x)
    with pytest.raises(ArgumentError, match=r"under torch\.no_grad"):
        batch_norm(x.clone().requires_grad_(), moments=given, out=x)
    with pytest.raises(ShapeError, match="out must have the shape of the input"):
        batch_norm(x, moments=given, out=torch.empty(3, 6))
    with pytest.raises(DtypeError, match="out must have dtype and device"):
        batch_norm(x, moments=given, out=torch.empty(6, 3, dtype=torch.float64))
    with pytest.raises(DtypeError, match="out= takes tensors"):
        batch_norm(x.numpy(), moments=Running(np.zeros(3), np.ones(3)), out=x.numpy())
