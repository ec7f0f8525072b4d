"""The direct way through the core, and everything that must not take it."""

from __future__ import annotations

import copy
import multiprocessing
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, batch_norm
from batchnorm.errors import ShapeError
from batchnorm.kernels import direct, dispatch
from batchnorm.stats.running import Running

pytest.importorskip("batchnorm.kernels._cpu", reason="installed without the CPU core")


def _is_direct(y):
    return type(y.grad_fn).__name__ in ("DirectBackward", "CudnnBatchNormBackward0")  # the second: tests/test_node.py


def test_the_common_case_is_direct():
    x = torch.randn(6, 3, requires_grad=True)
    layer = BatchNorm1d(3)
    assert _is_direct(layer(x))
    assert _is_direct(layer.eval()(x))
    assert _is_direct(batch_norm(x, activation="relu")[0])
    channels_last = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    assert _is_direct(BatchNorm2d(3)(channels_last))


class _Own(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "x",
    [
        torch.complex(torch.randn(6, 3), torch.randn(6, 3)).conj().imag,
        torch.randn(6, 3).as_subclass(_Own),
    ],
    ids=["negative", "subclass"],
)
def test_what_is_rare_takes_the_general_way_and_is_right(x):
    layer, twin = BatchNorm1d(3), nn.BatchNorm1d(3)
    y = layer(x)
    assert not _is_direct(y)
    expected = twin(x.as_subclass(torch.Tensor).contiguous().clone())
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.running_var, twin.running_var)


LAYOUTS = {
    "rows": lambda a: a.contiguous(),
    "channels last": lambda a: a.contiguous(memory_format=torch.channels_last) if a.ndim == 4 else a.mT.contiguous().mT,
    "backwards": lambda a: a.permute(*reversed(range(a.ndim))).contiguous().permute(*reversed(range(a.ndim))),
    "every second": lambda a: torch.stack([a, a], -1).flatten(-2)[..., ::2],
    "part of rows": lambda a: nn.functional.pad(a, (1, 2))[..., 1:-2],
    "pooled": lambda a: a.mean(-1, keepdim=True).expand_as(a),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_dy", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 3), (4, 8, 5), (2, 16, 4, 6)], ids=str)
def test_whatever_lies_otherwise_is_laid_out_first(shape, of_x, of_dy, dtype, monkeypatch):
    """Tokens (N, L, C) that were transposed, and gradients as they come from global pooling."""
    x, dy = LAYOUTS[of_x](torch.randn(shape).to(dtype)), LAYOUTS[of_dy](torch.randn(shape).to(dtype))
    x.requires_grad_()
    layer = BatchNorm(shape[1], dtype=dtype)
    nn.init.normal_(layer.weight)
    found = []
    for backend in ("auto", "reference"):
        with monkeypatch.context() as patch:
            if backend == "auto":
                patch.delattr(direct, "_work")  # the general way of backward
            dispatch.set_backend(backend)
            try:
                twin = copy.deepcopy(layer)
                y = twin(x)
                grads = torch.autograd.grad(y, [x, *twin.parameters()], dy)
            finally:
                dispatch.set_backend("auto")
        assert _is_direct(y) == (backend == "auto")
        assert y.stride() == nn.BatchNorm2d(shape[1]).to(dtype)(x).stride() if x.ndim == 4 else y.is_contiguous()
        found.append([y, *grads, twin.running_mean, twin.running_var])
    off = 0.02 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=off, atol=off)


def test_a_parametrized_weight_is_followed():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, x = BatchNorm1d(3), torch.randn(6, 3)
    parametrize.register_parametrization(layer, "weight", Twice())
    torch.testing.assert_close(layer(x), 2 * BatchNorm1d(3)(x))


def test_a_subclass_with_its_own_check_is_asked():
    class Picky(BatchNorm1d):
        def _check_input_dim(self, input):
            raise ShapeError("no")

    for layer in (Picky(3), Picky(3).eval()):
        with pytest.raises(ShapeError, match="no"):
            layer(torch.randn(6, 3))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("train", [True, False])
def test_one_gradient_alone_is_that_of_the_reference(wanted, train):
    inputs = {"x": torch.randn(6, 3), "weight": torch.rand(3), "bias": torch.rand(3), "residual": torch.randn(6, 3)}
    inputs[wanted].requires_grad_()
    given = None if train else Running(torch.zeros(3), torch.ones(3))
    for activation in (None, "relu", "silu"):
        grads = []
        for name in ("auto", "reference"):
            dispatch.set_backend(name)
            try:
                y, _ = batch_norm(**inputs, moments=given, activation=activation)
                assert _is_direct(y) == (name == "auto")
                grads.append(torch.autograd.grad(y, inputs[wanted], torch.arange(18.0).reshape(6, 3)))
            finally:
                dispatch.set_backend("auto")
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_backward_that_the_core_leaves_to_the_general_way():
    x = torch.randn(6, 3, requires_grad=True)
    y = BatchNorm1d(3, activation="silu")(x)
    assert _is_direct(y)
    expected = torch.autograd.grad(y, x, torch.ones(6, 3), retain_graph=True)[0]
    (expanded,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.testing.assert_close(expanded, expected)
    (batched,) = torch.autograd.grad(y, x, torch.ones(2, 6, 3), retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(batched[1], expected)
    (again,) = torch.autograd.grad(y, x, torch.ones(6, 3), create_graph=True)
    torch.testing.assert_close(again, expected)
    assert torch.autograd.grad(again.square().sum(), x)[0].isfinite().all()


def test_half_precision_parameters_get_gradients_of_their_dtype():
    layer = BatchNorm1d(3).bfloat16()
    y = layer(torch.randn(6, 3, dtype=torch.bfloat16))
    assert _is_direct(y)
    y.sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.bfloat16


def test_autograd_notices_what_was_changed_in_place():
    layer, x = BatchNorm1d(3), torch.randn(6, 3, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    product = (layer.running_mean * x).sum()  # autograd keeps the running mean for x's gradient
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_saved_tensors_may_be_packed():
    x = torch.randn(6, 3, requires_grad=True)
    expected = torch.autograd.grad(BatchNorm1d(3)(x).square().sum(), x)[0]
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = BatchNorm1d(3)(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)


def test_the_backend_may_change_before_backward():
    x = torch.randn(6, 3, requires_grad=True)
    y = BatchNorm1d(3)(x)
    expected = torch.autograd.grad(y, x, torch.eye(6, 3), retain_graph=True)
    dispatch.set_backend("reference")
    try:
        torch.testing.assert_close(torch.autograd.grad(y, x, torch.eye(6, 3)), expected, rtol=1e-4, atol=1e-5)
    finally:
        dispatch.set_backend("auto")


def test_hooks_copies_and_pickles():
    layer, seen = BatchNorm1d(3), []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer(torch.randn(6, 3, requires_grad=True)).sum().backward()
    assert seen == ["forward", "backward"]
    x = torch.randn(6, 3)
    plain = BatchNorm1d(3)
    plain(x)
    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        torch.testing.assert_close(twin.eval()(x), plain.eval()(x))


def test_buffers_of_inference_mode_are_torchs_to_refuse():
    with torch.inference_mode():
        layer = BatchNorm1d(3)
        layer(torch.randn(6, 3))
    assert layer.num_batches_tracked == 1
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        layer(torch.randn(6, 3))


def _in_a_child(layer, x, pipe):
    pipe.send(layer(x).detach().numpy())


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # JAX's, where another test has loaded it
def test_a_forked_worker_normalises():
    layer, x = BatchNorm2d(8), torch.randn(16, 8, 32, 32)
    expected = copy.deepcopy(layer)(x)
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(layer, x, there))
    child.start()
    assert here.poll(60)
    torch.testing.assert_close(torch.from_numpy(here.recv()), expected.detach())
    child.join(60)
    assert child.exitcode == 0


def test_nothing_is_done_where_anything_is_wrong():
    mean, var, tracked = torch.zeros(3), torch.ones(3), torch.tensor(0)
    for x in (torch.randn(1, 3), torch.randn(6, 4), torch.ones(6, 3, dtype=torch.int64), torch.randn(3)):
        assert direct.train(x, None, None, None, 1e-5, None, 3, mean, var, tracked, 0.1) is None
    x = torch.randn(6, 3)
    assert direct.train(x, torch.ones(4), None, None, 1e-5, None, 3, mean, var, tracked, 0.1) is None
    assert direct.train(x, None, None, torch.randn(6, 4), 1e-5, None, 3, mean, var, tracked, 0.1) is None
    assert direct.train(x, None, None, None, -1.0, None, 3, mean, var, tracked, 0.1) is None
    assert direct.train(x, None, None, None, 1e-5, "softmax", 3, mean, var, tracked, 0.1) is None
    assert (mean.tolist(), var.tolist(), tracked.item()) == ([0.0] * 3, [1.0] * 3, 0)
