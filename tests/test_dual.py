"""Two layers added up in one pass: kernels against the float64 oracle, the layers against one after the other.

The kernels are interpreted on the CPU (tests/conftest.py); tests/gpu runs them, test_kernels_triton.py compiles them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from cases import ACTIVATIONS, DTYPES, VIEW_PARAMS, close, make_like, make_parameters
from torch import nn

import batchnorm
from batchnorm import BatchNorm, BatchNorm2d, convert, dual_batch_norm, fold, freeze, fuse_activations
from batchnorm.errors import DtypeError, ShapeError
from batchnorm.kernels import dispatch
from batchnorm.kernels.contract import Affine, Branch
from batchnorm.stats.running import Running

pytest.importorskip("triton", reason="Triton is not installed")
from batchnorm.kernels.triton import backend, layout

pytestmark = pytest.mark.usefixtures("quiet_interpreter")


@pytest.fixture
def passes(monkeypatch):
    """By Triton's kernels; the list has a word for each pass that was done for both layers at once."""
    found = []

    def noted(name):
        function = getattr(backend, name)
        return lambda *args, **named: (found.append((name, named.get("wants_sums"))), function(*args, **named))[1]

    for name in ("apply_both", "backward_both"):
        monkeypatch.setattr(backend, name, noted(name))
    dispatch.set_backend("triton")
    yield found
    dispatch.set_backend("auto")


def _branches(x, activation, statistics=(None, None), *, mean=0.0, is_affine=True):
    """The two, the second one `mean` away from 0 and laid out as it comes, and dy."""
    branches = []
    for i, given in enumerate(statistics):
        values = x if i == 0 else (make_like(x, 3).double() * 2 + mean).to(x.dtype)
        parameters = make_parameters((x.shape[1],), x.dtype, 7 + i) if is_affine else (None, None)
        affine = Affine(*parameters, (1e-5, 1e-3)[i], None if i else activation)
        branches.append(Branch(values, backend.stats(values) if given is None else given, affine))
    return *branches, make_like(x, 1)


def _numpy(tensor):
    return None if tensor is None else tensor.double().numpy()


def _expected(first, second, dy):
    """One after the other, and back."""

    def train(branch, dy, residual=None):
        x, statistics, affine = branch
        given = [_numpy(s) for s in statistics] if isinstance(statistics, Running) else None
        return oracle.train(
            _numpy(x), dy, _numpy(affine.weight), _numpy(affine.bias), eps=affine.eps, activation=affine.activation,
            residual=residual, given=given,
        )  # fmt: skip

    inner = train(second, _numpy(dy))
    outer = train(first, _numpy(dy), inner.y)
    return outer, train(second, outer.dresidual)


def _compare(first, second, dy, is_estimated=(True, True)):
    y = backend.apply_both(first, second)
    found = backend.backward_both(dy, first, second, is_estimated=is_estimated, wants_sums=True)
    expected = _expected(first, second, dy)
    dtype = first.x.dtype
    assert y.dtype == dtype
    assert y.shape == first.x.shape
    # Gradients grow with 1 / sqrt(var + eps) where a channel hardly varies, and their errors with them.
    scales = [max(1.0, float(1 / np.sqrt(one.var.min() + 1e-5))) for one in expected]
    close(y, expected[0].y, dtype, max(scales))
    values = (y.numel() / y.shape[1]) ** 0.5
    for one, wanted, scale in zip(found, expected, scales, strict=True):
        assert one.x.dtype == dtype
        close(one.x, wanted.dx, dtype, 2 * scale)
        close(one.sums.dz, wanted.dbias, dtype, 2 * values)
        close(one.sums.dz_xhat, wanted.dweight, dtype, 2 * scale * values)
    return y, found


FEW = [view for view in VIEW_PARAMS if view.id != "many-channels"]


@pytest.mark.parametrize(
    ("view", "dtype", "activation"),
    [
        pytest.param(view.values[0], DTYPES[i % 4].values[0], ("relu", None, "relu")[i % 3], id=view.id)
        for i, view in enumerate(FEW)
    ],
)
def test_views(view, dtype, activation):
    _compare(*_branches(view.make(dtype), activation, is_affine=activation is not None))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_statistics_that_are_given(activation):
    x = VIEW_PARAMS[2].values[0].make(torch.float32)
    given = Running(torch.linspace(-1, 1, 3), torch.linspace(0.1, 4, 3))
    is_first = len(activation or "") % 2 == 0
    statistics = (given, None) if is_first else (None, given)
    _compare(*_branches(x, activation, statistics), is_estimated=(not is_first, is_first))


def _channels_last(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize(
    ("shape", "arrange"),
    [((40, 24, 8), _channels_last), ((72, 8, 5), lambda x: x), ((3, 2, 1160), lambda x: x)],
    ids=["rows", "small planes", "planes"],
)
def test_cut_among_programs_at_a_large_mean(monkeypatch, shape, arrange):
    """Several programs a group; what the one sum loses the other one must not hide; and the same bits again."""
    monkeypatch.setattr(layout, "_PROGRAMS", 9)
    x = arrange(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4).float()
    first, second, dy = _branches(x, "relu", mean=-1e4)
    # What the two inputs go along with: only then much flows through the variances.
    dy += sum(one.x - one.statistics.mean[:, None].float() for one in (first, second))
    seen = layout.layout_of(x, is_masked=False)
    assert seen.tiling(1).splits(seen, seen.tiling(1).number) > 1
    y, found = _compare(first, second, dy)
    again = backend.backward_both(dy, first, second, is_estimated=(True, True), wants_sums=True)
    assert torch.equal(backend.apply_both(first, second), y)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.sums.dz_xhat, other.sums.dz_xhat)


def test_no_values_at_all():
    x = torch.zeros(0, 3, 4)
    first, second, dy = _branches(x, "relu")
    assert backend.apply_both(first, second).shape == x.shape
    found = backend.backward_both(dy, first, second, is_estimated=(True, True), wants_sums=True)
    assert [one.x.shape for one in found] == [x.shape] * 2
    assert [one.sums.dz.tolist() for one in found] == [[0.0] * 3] * 2


def _pair(first=None, second=None):
    """Two layers with parameters and statistics of their own."""
    torch.manual_seed(0)
    layers = first or BatchNorm2d(3, activation="relu", eps=1e-3), second or BatchNorm2d(3, momentum=None)
    for layer in layers:
        for name, values in (*layer.named_parameters(), *layer.named_buffers()):
            if values.is_floating_point():
                nn.init.uniform_(values, 0.5, 2.0) if "var" in name else nn.init.normal_(values)
    return layers


def _images(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(4, 3, 3, 2, generator=generator, dtype=dtype) for _ in range(2))
    return [x.to(memory_format=torch.channels_last) for x in made]


def in_turn(first, x, second, other):
    return first(x, second(other))


def _step(function, layers, images):
    """Output, gradients, gradients of gradients, and statistics after a step."""
    first, second = copy.deepcopy(layers)
    x, other = (image.clone().requires_grad_() for image in images)
    y = function(first, x, second, other)
    (gradient,) = torch.autograd.grad(y.square().sum(), other, create_graph=True)
    twice = torch.autograd.grad(gradient.square().sum(), (x, other))
    function(first, x, second, other).sin().sum().backward()
    parameters = [*first.parameters(), *second.parameters()]
    found = [y, gradient, *twice, x.grad, other.grad, *(p.grad for p in parameters)]
    return [*found, *first.buffers(), *second.buffers()]


@pytest.mark.parametrize("modes", list(itertools.product((True, False), repeat=2)), ids=str)
def test_modes(passes, modes):
    layers = _pair()
    for layer, mode in zip(layers, modes, strict=True):
        layer.train(mode)
    found = _step(dual_batch_norm, layers, _images())
    assert passes == [("apply_both", None), ("backward_both", True)] * 2
    expected = _step(in_turn, layers, _images())
    assert len(passes) == 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_axes_layouts_and_dtypes(passes):
    """Channels on two axes; branches that lie differently; half precision with parameters of single."""
    several = [BatchNorm((3, 2), channel_axis=(0, 2), activation="relu"), BatchNorm((3, 2), channel_axis=(0, 2))]
    images = torch.randn(2, 3, 5, 2).unbind(0)
    torch.testing.assert_close(
        *(_step(f, _pair(*several), images) for f in (dual_batch_norm, in_turn)), rtol=1e-4, atol=1e-4
    )
    x, other = _images(torch.float16)
    x, other = x.requires_grad_(), other.contiguous().requires_grad_()
    first, second = _pair()
    gradients = []
    for function in (dual_batch_norm, in_turn):
        y = function(first, x, second, other)
        assert y.dtype == torch.float16
        assert y.is_contiguous(memory_format=torch.channels_last)
        gradients.append(torch.autograd.grad(y.square().sum(), (x, other, first.weight, second.weight)))
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=2e-2)
    assert [name for name, _ in passes] == ["apply_both", "backward_both"] * 3


def test_gradients_in_float64(passes):
    first, second = (layer.double() for layer in _pair(BatchNorm(2, activation="silu"), BatchNorm(2, bias=False)))
    x, other = (torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x, other, _: dual_batch_norm(first, x, second, other), (x, other, second.weight), fast_mode=True
    )
    assert ("backward_both", True) in passes


def test_kept_for_backward_are_the_two_inputs(passes):
    kept = []
    x, other = _images()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dual_batch_norm(_pair()[0], x.requires_grad_(), _pair()[1], other.requires_grad_())
    assert [t.data_ptr() for t in kept if t.ndim == 4] == [x.data_ptr(), other.data_ptr()]
    assert len(passes) == 1
    y.add_(1).sum().backward()


def test_an_output_is_computed_again_in_one_pass(passes):
    """save_memory(): the gradients' last bits stay, and the output that a convolution would keep goes."""
    layers, convolution, gradients = _pair(), nn.Conv2d(3, 2, 1), []
    for block in (contextlib.nullcontext(), batchnorm.save_memory()):
        first, second = copy.deepcopy(layers)
        x, other = (image.requires_grad_() for image in _images())
        with block:
            y = dual_batch_norm(first, x, second, other)
            result = convolution(y)
        convolution.zero_grad()
        result.square().sum().backward()
        gradients.append([x.grad, other.grad, first.weight.grad, second.bias.grad, convolution.weight.grad])
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine, theirs)
    assert [name for name, _ in passes] == ["apply_both", "backward_both", "apply_both", "apply_both", "backward_both"]


def test_frozen_layers_need_no_sums(passes):
    layers, _ = freeze(nn.ModuleList(_pair()))
    x, other = (image.requires_grad_() for image in _images())
    dual_batch_norm(layers[0], x, layers[1], other).square().sum().backward()
    assert passes == [("apply_both", None), ("backward_both", False)]
    mine = x.grad, other.grad
    x.grad = other.grad = None
    in_turn(layers[0], x, layers[1], other).square().sum().backward()
    torch.testing.assert_close(mine, (x.grad, other.grad), rtol=1e-5, atol=1e-5)
    x.grad = other.grad = None
    y = dual_batch_norm(layers[0], x, layers[1], other)
    for layer in layers:  # statistics that move on before backward are not those of the forward
        layer.running_var.mul_(4)
    y.square().sum().backward()
    torch.testing.assert_close(mine, (x.grad, other.grad), rtol=1e-5, atol=1e-5)


def test_each_layer_has_its_own_rules_about_a_batch(passes):
    """One input is not finite; one layer has no statistics; a segment is computed again in backward."""
    (first, second), (x, other) = _pair(), _images()
    before = copy.deepcopy(first.state_dict())
    x[1, 1] = float("nan")
    torch.utils.checkpoint.checkpoint(
        lambda x: dual_batch_norm(first, x, second, other), x.requires_grad_(), use_reentrant=False
    ).sum().backward()
    torch.testing.assert_close(first.state_dict(), before)
    assert second.num_batches_tracked.item() == 1
    dual_batch_norm(BatchNorm2d(3, track_running_stats=False), x, second, other)
    with batchnorm.transaction(second):
        dual_batch_norm(first, x, second, other)
        assert second.num_batches_tracked.item() == 2
    assert second.num_batches_tracked.item() == 3
    assert [name for name, _ in passes] == ["apply_both"] * 2 + ["backward_both"] + ["apply_both"] * 2


def _hooked(layers):
    layers[1].register_forward_hook(lambda module, args, output: output * 2)


def _replaced(layers):
    layers[1].forward = lambda x: x * 2


class Own(BatchNorm2d):
    def forward(self, input, residual=None, *, mask=None, out=None):
        return super().forward(input, residual) + 1


class OwnCommit(BatchNorm2d):
    def _by_batch(self, input, residual, mask):
        y, moments = super()._by_batch(input, residual, mask)
        return y * 2, moments


OTHERWISE = {
    "a hook": (_pair, _hooked),
    "another forward": (_pair, _replaced),
    "another class": (lambda: _pair(Own(3)), None),
    "another way of training": (lambda: _pair(second=OwnCommit(3)), None),
    "an activation between": (lambda: _pair(second=BatchNorm2d(3, activation="tanh")), None),
    "ghost batches": (lambda: _pair(second=batchnorm.GhostBatchNorm(3, ghost_size=2)), None),
    "fixed": (lambda: _pair(second=batchnorm.FrozenBatchNorm(3)), None),
    "torch.nn's": (lambda: _pair(second=nn.BatchNorm2d(3)), None),
    "no layer": (lambda: (BatchNorm2d(3), nn.Identity()), None),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_otherwise_one_after_the_other(passes, name):
    make, change = OTHERWISE[name]
    results = []
    for function in (dual_batch_norm, in_turn):
        layers, (x, other) = make(), _images()
        if change is not None:
            change(layers)
        results.append([function(layers[0], x, layers[1], other), *layers[0].buffers(), *layers[1].buffers()])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert passes == []


def test_somebody_looks_inside(passes):
    (first, second), (x, other) = _pair(), _images()
    expected = in_turn(*(copy.deepcopy(first), x, copy.deepcopy(second), other))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    found = [dual_batch_norm(copy.deepcopy(first), x, copy.deepcopy(second), other)]
    handle.remove()
    dispatch.set_backend("auto")
    block = SimpleNamespace(first=copy.deepcopy(first), second=copy.deepcopy(second))
    run = torch.compile(lambda x, other: dual_batch_norm(block.first, x, block.second, other), backend="eager")
    found.append(run(x, other))
    found.append(torch.func.vmap(lambda x: dual_batch_norm(first.eval(), x, second.eval(), x))(torch.stack([x, other])))
    assert passes == []
    torch.testing.assert_close(found[:2], [expected] * 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2][0], in_turn(first, x, second, x), rtol=1e-5, atol=1e-5)


def test_errors_are_the_layers(passes):
    (first, second), (x, other) = _pair(), _images()
    with pytest.raises(ShapeError, match="residual must have the shape of the input"):
        dual_batch_norm(first, x, second, other[:2])
    with pytest.raises(DtypeError, match="residual must have the dtype of the input"):
        dual_batch_norm(first, x, second.double(), other.double())
    second.float()
    with pytest.raises(ShapeError, match="expected 3 channels on axis 1"):
        dual_batch_norm(first, x[:, :2], second, other[:, :2])
    with pytest.raises(ShapeError, match="Expected more than 1 value per channel"):
        dual_batch_norm(first, x[:1, :, :1, :1], second, other[:1, :, :1, :1])
    assert passes == []


class Shortcut(nn.Module):
    """The end of a residual block."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4))

    def forward(self, x):
        y = self.norm(self.conv(x))
        y += self.shortcut(x)
        return torch.relu(y)


def test_fused_blocks_take_this_way(passes):
    """What they compute, tests/test_fuse.py compares: outputs, gradients, buffers, state_dict."""
    dispatch.set_backend("auto")
    model = Shortcut()
    fused, report = fuse_activations(model, torch.randn(2, 3, 4, 4))
    assert "shortcut.1: torch.nn.BatchNorm2d -> BatchNorm2d in one pass with norm" in str(report)
    assert list(fused.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 4, 4)
    folded, folding = fold(copy.deepcopy(fused).eval(), x)
    assert folding.agreement.holds
    assert isinstance(folded.shortcut[1], nn.Identity)
    again, _ = fuse_activations(fused, x)
    dispatch.set_backend("triton")
    expected = model(x)
    for one in (fused, copy.deepcopy(again)):
        torch.testing.assert_close(one(x), expected, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in passes] == ["apply_both"] * 2


def test_a_graph_keeps_it_and_shows_what_is_called_with_a_residual():
    x = torch.randn(2, 3, 4, 4)
    graph, _ = fuse_activations(torch.fx.symbolic_trace(Shortcut()), x)
    assert "dual_batch_norm" in graph.code
    _, report = convert(graph, "torch")
    assert [one.names for one in report.changed] == [("shortcut.1",)]
    assert [(one.name, "a residual" in one.why) for one in report.skipped] == [("norm", True)]
    plain = torch.fx.symbolic_trace(graph)
    assert "dual_batch_norm" not in plain.code
    torch.testing.assert_close(plain.eval()(x), graph.eval()(x))


def test_layers_of_other_kinds_are_added_as_before():
    _, report = fuse_activations(Shortcut(batchnorm.SyncBatchNorm), torch.randn(2, 3, 4, 4))
    assert [one.names for one in report.changed] == [("norm",)]
    assert "an addition to norm, which takes the activation" in str(report)
