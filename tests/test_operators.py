"""The operators that compiled code calls: sound by torch's own checks, and used where they should be."""

from __future__ import annotations

import pytest
import torch
from cases import ACTIVATIONS, DTYPES
from torch.library import opcheck

from batchnorm import BatchNorm1d, BatchNorm2d, batch_norm
from batchnorm.kernels import dispatch
from batchnorm.kernels.contract import ACTIVATION_CODES

pytest.importorskip("batchnorm.kernels._cpu", reason="installed without the CPU core")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

FORWARD, BACKWARD = torch.ops.batchnorm.forward.default, torch.ops.batchnorm.backward.default
LAYOUTS = {
    "N,C": torch.randn(6, 3),
    "N,C,L": torch.randn(4, 3, 5),
    "channels-first": torch.randn(4, 3, 5, 2),
    "channels-last": torch.randn(4, 3, 5, 2).contiguous(memory_format=torch.channels_last),
    "transposed": torch.randn(3, 6).t(),
    "N,L,C": torch.randn(4, 5, 3).transpose(1, 2),
    "3-D": torch.randn(2, 3, 2, 2, 2),
}


def _operands(layout, dtype=torch.float32, affine=True, residual=False, masked=False):
    x = LAYOUTS[layout].detach().to(dtype).requires_grad_()
    weight, bias = (torch.rand(3).to(dtype).requires_grad_() for _ in range(2)) if affine else (None, None)
    length = x[0, 0].numel()
    mask = (torch.arange(x.shape[0] * length) % 3 > 0).reshape(-1, 1, length) if masked else None
    return x, weight, bias, torch.randn_like(x).requires_grad_() if residual else None, mask


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [{}, {"affine": False}, {"residual": True}, {"masked": True}], ids=str)
def test_forward_is_sound(layout, form):
    opcheck(FORWARD, (*_operands(layout, **form), 1e-5, ACTIVATION_CODES["relu"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_is_sound_for_each_dtype_and_activation(dtype, activation):
    tolerances = {} if dtype in (torch.float32, torch.float64) else {"atol": 0.1, "rtol": 0.05}
    operands = _operands("channels-first", dtype, residual=True)
    opcheck(FORWARD, (*operands, 1e-5, ACTIVATION_CODES[activation]), **tolerances)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", [[True] * 4, [True, False, False, False], [False, True, True, False]], ids=str)
def test_backward_is_sound(layout, wanted):
    operands = [None if t is None else t.detach() for t in _operands(layout, residual=True, masked=True)]
    mean = torch.zeros(3, dtype=torch.float64)
    dy = torch.randn_like(operands[0])
    opcheck(BACKWARD, (dy, *operands, mean, mean + 1, 1e-5, ACTIVATION_CODES["relu"], wanted))


def _names(function, *inputs):
    """The operators of the forward graph that a compiler gets."""
    found = []

    def backend(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    return " ".join(found)


def test_compiled_training_calls_the_core_and_inference_stays_open_to_fusion():
    layer, x = BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    assert "batchnorm.forward" in _names(layer, x)
    assert "batchnorm.forward" not in _names(layer.eval(), x)


def test_without_the_core_compiled_code_does_without_it():
    before = dispatch.get_backend()
    dispatch.set_backend("reference")
    try:
        assert "batchnorm.forward" not in _names(BatchNorm2d(3), torch.randn(4, 3, 5, 5))
    finally:
        dispatch.set_backend(before)


def test_an_operator_runs_without_the_core_too():
    x, weight, bias, residual, mask = _operands("channels-first", residual=True)
    expected = FORWARD(x, weight, bias, residual, mask, 1e-5, 1)
    before = dispatch.get_backend()
    dispatch.set_backend("reference")
    try:
        for y, wanted in zip(FORWARD(x, weight, bias, residual, mask, 1e-5, 1), expected, strict=True):
            torch.testing.assert_close(y, wanted)
    finally:
        dispatch.set_backend(before)


@pytest.mark.parametrize("train", [True, False])
def test_exported_programs_call_torchs_own_operations(train):
    layer = BatchNorm1d(3).train(train)
    program = torch.export.export(layer, (torch.randn(6, 3),))
    names = " ".join(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert "batchnorm." not in names.replace("aten.", "")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_values_gradients_and_strides(layout, dynamic):
    torch._dynamo.reset()

    def function(x, weight, bias, residual):
        return batch_norm(x, weight, bias, residual=residual, activation="relu")[0]

    x, weight, bias, residual, _ = _operands(layout, residual=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for f in (function, compiled):
        y = f(x, weight, bias, residual)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, bias, residual))))
        assert y.stride() == results[0][0].stride()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_vmap_inside_of_compiled_code_goes_without_the_operator():
    torch._dynamo.reset()
    x = torch.randn(2, 6, 3)

    def function(x):
        return torch.func.vmap(lambda x: batch_norm(x)[0])(x)

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))
