"""Small layers in training: their node of autograd's graph is torch's own, in C++, with kernels of ours."""

from __future__ import annotations

import subprocess
import sys

import oracle
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d
from batchnorm.errors import StatisticsWarning
from batchnorm.kernels import direct

pytest.importorskip("batchnorm.kernels._cpu", reason="installed without the CPU core")


def _has_node(y):
    return type(y.grad_fn).__name__ == "CudnnBatchNormBackward0"


pytestmark = pytest.mark.skipif(
    not _has_node(BatchNorm1d(2)(torch.randn(3, 2, requires_grad=True))), reason="torch before 2.13"
)

SHAPES = [(64, 256), (2, 1), (4, 8), (256, 100), (6, 3, 5), (8, 16, 8, 8), (3, 1, 7, 7), (9, 5, 1, 1), (2, 3, 4, 5, 6)]


def _both(function, monkeypatch):
    """What `function` gives with torch's node and with ours in Python, from the same random numbers."""
    found = []
    for is_followed in (direct._is_followed, lambda: False):
        with monkeypatch.context() as patch:
            patch.setattr(direct, "_is_followed", is_followed)
            torch.manual_seed(0)
            found.append(function())
    return found


def _input(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).mul_(2).add_(1).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("dtype", "of_weight"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),  # as in autocast
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_gives_what_our_node_gives_to_the_last_bit(shape, dtype, of_weight, momentum, bias, monkeypatch):
    def passes():
        x = _input(*shape, dtype=dtype)
        layer = BatchNorm(shape[1], momentum=momentum, bias=bias, dtype=of_weight)
        torch.nn.init.normal_(layer.weight)
        results = []
        for _ in range(2):
            y = layer(x)
            y.backward(torch.randn_like(y))
            results += [y, *layer.buffers()]
        nodes.append(_has_node(y))
        return [*results, x.grad, *(p.grad for p in layer.parameters())]

    nodes = []
    ours, theirs = _both(passes, monkeypatch)
    assert nodes == [True, False]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("shape", [(6, 4), (5, 3, 4, 4)], ids=str)
def test_it_is_exact(shape):
    torch.manual_seed(0)
    x, dy = _input(*shape), torch.randn(shape)
    layer = BatchNorm(shape[1])
    y = layer(x)
    assert _has_node(y)
    y.backward(dy)
    right = oracle.train(x.detach().numpy(), dy.numpy())
    found = (y.detach(), x.grad, layer.weight.grad, layer.bias.grad)
    for one, expected in zip(found, (right.y, right.dx, right.dweight, right.dbias), strict=True):
        assert abs(one.numpy() - expected).max() < 1e-6 * max(1, abs(expected).max())


def test_second_derivatives():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    layer = BatchNorm1d(3, dtype=torch.float64)
    assert _has_node(layer(x))
    parameters = tuple(layer.parameters())
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), (x, *parameters))


@pytest.mark.parametrize("mean", [0, 10])
def test_second_derivatives_in_bfloat16(mean):
    """Their dtype is that of the input, and they are off by roundings of it alone."""
    torch.manual_seed(0)
    values = (torch.randn(64, 4) + mean).bfloat16()

    def second(x, layer):
        first = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])

    x = values.clone().requires_grad_()
    assert _has_node(BatchNorm1d(4)(x))
    found = second(x, BatchNorm1d(4))
    expected = second(values.double().requires_grad_(), BatchNorm1d(4, dtype=torch.float64))
    assert [one.dtype for one in found] == [torch.bfloat16, torch.float32, torch.float32]
    for one, right in zip(found, expected, strict=True):
        assert (one - right).abs().max() < 0.03 * right.abs().max()


@pytest.mark.parametrize("mean", [0, 10, 1e3, 1e4])
def test_second_derivatives_do_not_lose_the_mean(mean):
    """Torch's formula rounds it to float32: far from 0 the node is ours."""

    def second(x, layer):
        first = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.manual_seed(0)
    values = torch.randn(16, 4) + mean
    assert _has_node(BatchNorm1d(4)(values.clone().requires_grad_())) == (mean <= 10)
    found = second(values.clone().requires_grad_(), BatchNorm1d(4))
    expected = second(values.double().requires_grad_(), BatchNorm1d(4, dtype=torch.float64))
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


GRADIENTS = {
    "expanded": lambda y: y.sum().backward(),
    "transposed": lambda y: y.backward(torch.randn(y.shape[::-1]).permute(3, 2, 1, 0)),
    "negative": lambda y: y.backward(torch.complex(torch.randn(y.shape), torch.randn(y.shape)).conj().imag),
    "in place after": lambda y: y.relu_().sum().backward(),
    "twice": lambda y: [y.sin().sum().backward(retain_graph=True), y.cos().sum().backward()],
    "zero": lambda y: (y * torch.zeros(())).sum().backward(),
    "not at all": lambda y: None,
}


@pytest.mark.parametrize("backward", GRADIENTS.values(), ids=GRADIENTS)
def test_any_gradient(backward, monkeypatch):
    def passed():
        x, layer = _input(6, 4, 3, 5), BatchNorm2d(4)
        backward(layer(x))
        return x.grad, layer.weight.grad, layer.bias.grad

    torch.testing.assert_close(*_both(passed, monkeypatch), rtol=1e-5, atol=1e-5)


WAYS = {
    "checkpoint": lambda layer, x: checkpoint(lambda x: layer(2 * x).sin(), x, use_reentrant=False).sum(),
    "reentrant checkpoint": lambda layer, x: checkpoint(lambda x: layer(2 * x).sin(), x, use_reentrant=True).sum(),
    "two views": lambda layer, x: (layer(x) + layer(3 * x)).sin().sum(),
    "frozen parameters": lambda layer, x: layer.requires_grad_(False)(x).sin().sum(),
    "no running statistics": lambda layer, x: BatchNorm1d(4, track_running_stats=False)(x).sin().sum(),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_any_forward(way, monkeypatch):
    def passed():
        x, layer = _input(6, 4), BatchNorm1d(4)
        way(layer, x).backward()
        return x.grad, layer.weight.grad, *layer.buffers()

    ours, theirs = _both(passed, monkeypatch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_statistics_may_change_before_backward():
    x, layer = _input(6, 4), BatchNorm1d(4)
    y = layer(x)
    layer.reset_running_stats()
    y.sin().sum().backward()
    assert x.grad.isfinite().all()


def test_an_input_that_changes_before_backward_is_an_error():
    x, layer = _input(6, 4), BatchNorm1d(4)
    z = x * 1
    y = layer(z)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1)])
def test_batched_gradients(shape, form, monkeypatch):
    def passed():
        x = torch.randn(shape).contiguous(memory_format=form).requires_grad_()
        y = BatchNorm2d(4)(x)
        many = torch.randn(3, *shape)
        one = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)[0]
        return one, torch.vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(many)

    torch.testing.assert_close(*_both(passed, monkeypatch), rtol=1e-5, atol=1e-5)


def test_a_batch_that_is_not_finite_stays_out_of_the_statistics():
    x, layer = torch.tensor([[1.0, 2.0], [float("nan"), 3.0]], requires_grad=True), BatchNorm1d(2)
    with pytest.warns(StatisticsWarning, match="not finite"):
        layer(x)
    assert layer.running_mean.tolist() == [0, 0]
    assert layer.num_batches_tracked == 0


def test_who_does_not_take_it():
    x = _input(6, 4)
    assert not _has_node(BatchNorm1d(4, activation="relu")(x))
    assert not _has_node(BatchNorm1d(4)(x, x))
    assert not _has_node(BatchNorm1d(4, affine=False)(x))
    assert not _has_node(BatchNorm1d(4)(x.detach()))
    assert not _has_node(BatchNorm1d(4).eval()(x))
    assert not _has_node(BatchNorm1d(4, dtype=torch.float16)(x.half()))
    channels_last = _input(6, 4, 3, 3).to(memory_format=torch.channels_last)
    assert not _has_node(BatchNorm2d(4)(channels_last))  # torch's formula fails there for batched gradients
    assert not _has_node(BatchNorm2d(4)(_input(1 << 9, 4, 32, 32)))  # large: outputs come from the pool
    with torch.no_grad():
        assert BatchNorm1d(4)(x).grad_fn is None


@pytest.mark.parametrize(
    ("x", "others"),
    [
        (torch.randn(4, 3), (None, torch.zeros(3), torch.ones(3), True)),
        (torch.randn(4, 3), (None, None, None, False)),
        (torch.randn(1, 3), (None, None, None, True)),
        (torch.randn(4, 3), (torch.ones(2), None, None, True)),
        (torch.randn(3, 4).t(), (None, None, None, True)),
        (torch.ones(4, 3, dtype=torch.int64), (None, None, None, True)),
    ],
    ids=["running statistics", "evaluation", "one value", "bias", "strides", "integers"],
)
def test_the_operator_refuses_what_is_not_for_it(x, others):
    with pytest.raises(RuntimeError, match=r"use torch\.nn\.functional\.batch_norm"):
        torch.cudnn_batch_norm(x, torch.ones(3), *others, 0.1, 1e-5)


def test_where_another_library_has_the_operator_our_own_node_is_used():
    code = """
import torch
library = torch.library.Library("aten", "IMPL")
library.impl("cudnn_batch_norm", lambda *_: None, "CPU")
from batchnorm import BatchNorm1d
x = torch.randn(6, 4, requires_grad=True)
y = BatchNorm1d(4)(x)
y.sin().sum().backward()
print(type(y.grad_fn).__name__)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "DirectBackward"
