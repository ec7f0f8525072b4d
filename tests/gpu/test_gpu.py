"""What a GPU alone can show: `make test-gpu` runs it where there is one, with the PyTorch and Triton found there."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import oracle
from cases import ACTIVATIONS, DTYPES, LAYOUT_PARAMS, VIEW_PARAMS, close, make_like, make_parameters

import batchnorm
from batchnorm import BatchNorm1d, BatchNorm2d, batch_norm
from batchnorm.kernels import dispatch, reference
from batchnorm.kernels.contract import Affine


def _why_not():
    if not torch.cuda.is_available():
        return "needs a GPU"
    pytest.importorskip("triton", reason="Triton is not installed")
    from batchnorm.kernels.triton import backend

    if backend.IS_INTERPRETED:
        return "TRITON_INTERPRET is set: make test-gpu"
    return dispatch.why_no_triton(torch.device("cuda", torch.cuda.current_device()))


_WHY = _why_not()
pytestmark = [pytest.mark.skipif(bool(_WHY), reason=_WHY), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture
def backend():
    from batchnorm.kernels.triton import backend

    return backend


def _on_gpu(layout, dtype, seed=0, **numbers):
    """The layout's values on the GPU, with the strides they have on the CPU."""
    x = layout.make(dtype, seed, **numbers)
    moved = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda")
    return x.cuda() if 0 in x.stride() else moved.copy_(x)


def _numpy(x):
    return None if x is None else x.double().cpu().numpy()


def test_a_cuda_tensor_takes_this_backend(backend):
    assert dispatch.backend_for(torch.ones(2, 3, device="cuda")) is backend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEW_PARAMS)
@pytest.mark.parametrize("form", ["plain", "affine", "affine-relu", "affine-residual-relu", "masked-residual-gelu"])
def test_contract(backend, view, dtype, form):
    x = _on_gpu(view, dtype)
    dy, extra = make_like(x.cpu(), 1).cuda(), make_like(x.cpu(), 2).cuda()
    weight, bias = (None, None) if form == "plain" else (p.cuda() for p in make_parameters((x.shape[1],), dtype))
    activation = {"relu": "relu", "gelu": "gelu"}.get(form.split("-")[-1])
    residual = extra if "residual" in form else None
    mask = None
    if "masked" in form:
        mask = torch.rand(x.shape[0], 1, x.shape[2], generator=torch.Generator().manual_seed(3)) < 0.7
        mask[:1, :, :1] = True
        mask = mask.cuda()
    affine = Affine(weight, bias, 1e-5, activation)
    expected = oracle.train(
        _numpy(x), _numpy(dy), _numpy(weight), _numpy(bias), eps=1e-5, activation=activation,
        mask=None if mask is None else mask[:, 0].cpu().numpy(), residual=_numpy(residual),
    )  # fmt: skip
    moments = backend.stats(x, mask)
    y = backend.apply(x, moments, affine, residual)
    found = backend.backward(dy, x, moments, affine, residual, is_estimated=True, mask=mask)
    scale = max(1.0, float(1 / (expected.var.min() + 1e-5) ** 0.5))
    values = (x.numel() / x.shape[1]) ** 0.5
    close(y.cpu(), expected.y, dtype, scale)
    close(found.x.cpu(), expected.dx, dtype, scale)
    close(found.sums.dz.cpu(), expected.dbias, dtype, values)
    close(found.sums.dz_xhat.cpu(), expected.dweight, dtype, scale * values)
    if residual is not None:
        close(found.residual.cpu(), expected.dresidual, dtype)
    if form == "affine-residual-relu":
        packed = backend.apply_packing(x, moments, affine, residual)
        if packed is not None:
            again = backend.backward(dy, x, moments, affine, packed[1], is_estimated=True)
            assert torch.equal(packed[0], y)
            assert torch.equal(again.x, found.x)
            assert torch.equal(again.residual, found.residual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
def test_layers_agree_with_the_reference(layout, activation):
    x = _on_gpu(layout, torch.float32)
    residual = torch.randn_like(x)
    results = []
    for name in ("auto", "reference"):
        dispatch.set_backend(name)
        try:
            mine, added = x.detach().clone().requires_grad_(), residual.clone().requires_grad_()
            weight, bias = (torch.linspace(0.5, 1.5, x.shape[1], device="cuda").requires_grad_() for _ in range(2))
            y, moments = batch_norm(mine, weight, bias, activation=activation, residual=added)
            y.square().sum().backward()
            results.append([y, moments.mean, moments.var, mine.grad, added.grad, weight.grad, bias.grad])
        finally:
            dispatch.set_backend("auto")
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradcheck_in_float64(activation, with_residual):
    x = torch.randn(4, 3, 5, dtype=torch.float64, device="cuda", requires_grad=True)
    operands = [x, *(torch.randn(3, dtype=torch.float64, device="cuda", requires_grad=True) for _ in range(2))]
    if with_residual:
        operands.append(torch.randn_like(x).requires_grad_())

    def normalised(x, weight, bias, residual=None):
        return batch_norm(x, weight, bias, activation=activation, residual=residual)[0]

    assert torch.autograd.gradcheck(normalised, operands, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(normalised, operands)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_large_mean(backend, dtype, memory_format):
    """Mean 1e4 and standard deviation 1 (64 in bfloat16, whose numbers are 64 apart there), against float64."""
    std = {torch.bfloat16: 64.0, torch.float16: 8.0, torch.float32: 1.0}[dtype]
    x = (torch.randn(64, 96, 14, 14, device="cuda", dtype=torch.float64) * std + 1e4).to(dtype)
    x = x.to(memory_format=memory_format)
    folded, exact = x.reshape(64, 96, 196), x.double().reshape(64, 96, 196)
    moments = backend.stats(folded)
    mean, var = exact.mean((0, 2)), exact.var((0, 2), correction=0)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(moments.var, var, rtol=1e-5, atol=0)
    y = backend.apply(folded, moments, Affine(None, None, 1e-5, None))
    expected = (exact - mean[:, None]) * (var[:, None] + 1e-5).rsqrt()
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(256, 64, 56, 56), (64, 512, 7, 7), (33, 100, 13, 11), (1024, 300)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_run_gives_the_same_bits(shape, memory_format, dtype):
    if len(shape) == 2 and memory_format is torch.channels_last:
        pytest.skip("(N, C) has one layout")
    x, dy, residual = (torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=memory_format) for _ in range(3))
    layer = (BatchNorm2d if len(shape) == 4 else BatchNorm1d)(shape[1], activation="relu", device="cuda")

    def step():
        mine = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(mine, residual)
        y.backward(dy)
        return y, mine.grad, layer.weight.grad.clone(), layer.bias.grad.clone()

    first = step()
    for _ in range(3):
        for one, other in zip(first, step(), strict=True):
            assert torch.equal(one, other)
    reference_y = reference.apply(
        x.reshape(*shape[:2], -1), reference.stats(x.reshape(*shape[:2], -1)),
        Affine(layer.weight, layer.bias, 1e-5, "relu"), residual.reshape(*shape[:2], -1),
    )  # fmt: skip
    close(first[0].reshape(reference_y.shape).cpu(), reference_y.detach().double().cpu(), dtype)


def test_a_cuda_graph_replayed_100_times():
    """Each replay is a training step on new data: outputs, gradients, running statistics and their count follow."""
    captured = nn.Sequential(nn.Conv2d(3, 16, 3), BatchNorm2d(16, activation="relu")).cuda()
    eager = copy.deepcopy(captured)
    eager.load_state_dict(captured.state_dict())
    x = torch.empty(8, 3, 16, 16, device="cuda")

    def step(model, x):
        model.zero_grad(set_to_none=False)
        y = model(x)
        y.square().mean().backward()
        return y

    batches = torch.randn(103, *x.shape, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in batches[:3]:
            x.copy_(batch)
            step(captured, x)
            step(eager, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(captured, x)
    for batch in batches[3:]:
        x.copy_(batch)
        graph.replay()
        expected = step(eager, batch)
        torch.testing.assert_close(y, expected)
    for mine, theirs in zip(captured.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(captured.state_dict(), eager.state_dict())
    assert captured[1].num_batches_tracked.item() == 103


@pytest.mark.parametrize(
    ("shape", "activation"),  # among millions of values some are so near 0 that ReLU may take either side
    [((64, 256, 28, 28), "silu"), ((72, 512, 7, 7), "silu"), ((9, 20, 13, 11), "relu")],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_branches_in_one_pass(backend, monkeypatch, shape, activation, memory_format, dtype):
    """Against one after the other in float64; the same bits again, and nothing waits for the GPU."""
    passes, whole = [], backend.backward_both
    monkeypatch.setattr(backend, "backward_both", lambda *args, **named: (passes.append(1), whole(*args, **named))[1])
    layers = [BatchNorm2d(shape[1], activation=name, device="cuda") for name in (activation, None)]
    images = [torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=memory_format) for _ in range(2)]
    dy = torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=memory_format)

    def step(function, layers, images, dy):
        first, second = copy.deepcopy(layers)
        x, other = (image.clone().requires_grad_() for image in images)
        y = function(first, x, second, other)
        y.backward(dy)
        found = [y, x.grad, other.grad, *(p.grad for layer in (first, second) for p in layer.parameters())]
        return [*found, first.running_var, second.running_mean]

    found = step(batchnorm.dual_batch_norm, layers, images, dy)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step(batchnorm.dual_batch_norm, layers, images, dy)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert len(passes) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    wide = [image.double() for image in images]
    exact = step(
        lambda a, x, b, other: a(x, b(other)), [copy.deepcopy(layer).double() for layer in layers], wide, dy.double()
    )
    values = (dy.numel() / shape[1]) ** 0.5
    for i, (one, other) in enumerate(zip(found, exact, strict=True)):
        close(one.cpu(), other.detach().cpu(), dtype, values if 3 <= i < 7 else 1)


def test_nothing_waits_for_the_gpu():
    layer = BatchNorm2d(16, activation="relu", device="cuda")
    x = torch.randn(8, 16, 9, 9, device="cuda", requires_grad=True)
    mask = torch.rand(8, 9, 9, device="cuda") < 0.5
    layer(x, x).sum().backward()
    layer(x, mask=mask).sum().backward()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, x).sum().backward()
        layer(x, mask=mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), BatchNorm2d(16, activation="relu"), nn.Conv2d(16, 4, 3)).cuda()
    exact = copy.deepcopy(model)
    x = torch.randn(8, 3, 12, 12, device="cuda")
    with torch.autocast("cuda", dtype):
        y = model(x)
    y.float().square().mean().backward()
    exact(x).square().mean().backward()
    assert y.dtype == dtype
    for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.1, atol=2e-2)
    torch.testing.assert_close(model[1].running_var, exact[1].running_var, rtol=2e-2, atol=2e-2)


def test_compiled_whole():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), BatchNorm2d(16, activation="relu")).cuda()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(8, 3, 12, 12, device="cuda")
    for _ in range(3):
        y, expected = compiled(x), eager(x)
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        y.square().mean().backward()
        expected.square().mean().backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-4)


def test_operators_are_sound():
    x = torch.randn(4, 3, 5, 2, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.rand(3, device="cuda").requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.batchnorm.forward.default, (x, weight, bias, x.detach(), None, 1e-5, 1))


def test_exported_programs_run_on_the_gpu():
    layer = BatchNorm2d(4, device="cuda").eval()
    x = torch.randn(2, 4, 5, 5, device="cuda")
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_more_than_2_to_the_31_elements(memory_format):
    shape = (72, 64, 688, 688)
    needed = 6 * 2 * 72 * 64 * 688 * 688
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    assert 72 * 64 * 688 * 688 > 2**31
    x = torch.empty(shape, device="cuda", dtype=torch.bfloat16, memory_format=memory_format).normal_(3.0, 2.0)
    layer = BatchNorm2d(64, activation="relu", device="cuda", momentum=1.0)
    y = layer(x.requires_grad_())
    last = x.detach()[-1].float()
    mean, std = layer.running_mean[:, None, None], layer.running_var.sqrt()[:, None, None]
    torch.testing.assert_close(mean.flatten(), torch.full((64,), 3.0, device="cuda"), rtol=0, atol=1e-2)
    torch.testing.assert_close(y[-1].float(), ((last - mean) / std).relu(), rtol=2e-2, atol=2e-2)
    y.backward(torch.ones((), device="cuda", dtype=torch.bfloat16).expand(shape))
    passed = (y[-1] > 0).float()
    inv_std = 1 / std
    # Sums of dz and dz * x_hat for half of a normal distribution: N / 2 and N / sqrt(2 pi).
    expected = inv_std * (passed - 0.5 - (last - mean) * inv_std * 0.3989)
    torch.testing.assert_close(x.grad[-1].float(), expected, rtol=2e-2, atol=2e-2)


def test_save_memory_leaves_the_gradients_as_they_are():
    norms = [BatchNorm2d(32, activation="relu") for _ in range(2)]
    plain = nn.Sequential(nn.Conv2d(3, 32, 3), norms[0], nn.Dropout(0.1), nn.Conv2d(32, 32, 3), norms[1]).cuda()
    frugal = copy.deepcopy(plain)
    x = torch.randn(16, 3, 40, 40, device="cuda")
    for model, memory in ((plain, nullcontext()), (frugal, batchnorm.save_memory())):
        torch.manual_seed(0)
        with memory:
            model(x).square().mean().backward()
    for mine, theirs in zip(frugal.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
