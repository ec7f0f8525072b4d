"""What every layer of the family promises: compilers, copies, checkpointing, bad batches, half precision, errors."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import (
    BatchNorm,
    BatchRenorm,
    DecorrelatedBatchNorm,
    DomainBatchNorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    SyncBatchNorm,
)
from batchnorm.errors import ArgumentError, DtypeError, ShapeError, StatisticsWarning

C = 4


def _renorm(**arguments):
    return BatchRenorm(C, r_max=[(0, 3.0)], d_max=[(0, 5.0)], **arguments)


def _domain(**arguments):
    return DomainBatchNorm(C, domains=("source", "target"), **arguments)


def _ghost(**arguments):
    return GhostBatchNorm(C, ghost_size=4, **arguments)


def _zca(**arguments):
    return DecorrelatedBatchNorm(C, group_size=2, **arguments)


def _newton(**arguments):
    return DecorrelatedBatchNorm(C, group_size=2, method="newton", **arguments)


LAYERS = {
    "sync": lambda **arguments: SyncBatchNorm(C, **arguments),
    "ghost": _ghost,
    "renorm": _renorm,
    "zca": _zca,
    "newton": _newton,
    "frozen": lambda **arguments: FrozenBatchNorm(C, **arguments),
    "domain": _domain,
}
TRAINED = [name for name in LAYERS if name != "frozen"]


def _input(*shape, **options):
    return torch.randn(*(shape or (10, C, 3)), **options) * 2 + 1


def _warmed(name, **arguments):
    """A layer with statistics and weights that are not the initial ones."""
    layer = LAYERS[name](**arguments)
    dtype = next(t.dtype for t in layer.state_dict().values() if t.is_floating_point())
    for _ in range(3):
        layer(_input(dtype=dtype))
    with torch.no_grad():
        for key, value in layer.state_dict().items():
            if key.endswith(("weight", "bias")):
                value.uniform_(0.5, 1.5)
            if name == "frozen" and "running" in key:
                value.uniform_(0.5, 1.5)
    return layer


def _state(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does it
@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_without_a_graph_break(name, is_training):
    torch._dynamo.reset()
    plain = _warmed(name, dtype=torch.float64, activation="relu").train(is_training)
    compiled = copy.deepcopy(plain)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=False)
    x, mask = _input(dtype=torch.float64), torch.rand(10, 3) > 0.3
    results = []
    for function in (plain, call):
        leaf = x.clone().requires_grad_()
        y = function(leaf, x, mask=mask)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(_state(compiled), _state(plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_pickles_are_whole(name):
    layer = _warmed(name)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    x = _input()
    expected = layer(x)
    for found in copies:
        assert repr(found) == repr(layer)
        torch.testing.assert_close(found(x), expected)
        torch.testing.assert_close(found.state_dict(), layer.state_dict())


@pytest.mark.parametrize("name", LAYERS)
def test_checkpointing_changes_nothing(name):
    plain = _warmed(name, dtype=torch.float64)
    segmented = copy.deepcopy(plain)
    x = _input(dtype=torch.float64)
    grads = []
    for layer, forward in ((plain, plain), (segmented, lambda x: checkpoint(segmented, x, use_reentrant=False))):
        leaf = x.clone().requires_grad_()
        forward(leaf).pow(3).sum().backward()
        grads.append(leaf.grad)
        assert layer is plain or torch.equal(grads[0], grads[1])
    torch.testing.assert_close(_state(segmented), _state(plain), rtol=0, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", TRAINED)
def test_a_batch_that_is_not_finite_leaves_the_statistics_and_warns_once(name, poison):
    layer = _warmed(name)
    before = _state(layer)
    x = _input()
    x[1, 2, 0] = poison
    with pytest.warns(StatisticsWarning, match=r"not finite.*stay as they were"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    torch.testing.assert_close(_state(layer), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", TRAINED)
def test_an_empty_batch_moves_no_statistics(name):
    layer = _warmed(name)
    before = _state(layer)
    y = layer(torch.empty(0, C, 3, requires_grad=True))
    assert y.shape == (0, C, 3)
    y.sum().backward()
    for key, value in layer.state_dict().items():
        if "running" in key:
            assert torch.equal(value, before[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_keeps_float32_statistics(name, dtype):
    layer = _warmed(name)
    before = _state(layer)
    layer.to(dtype)
    for key, value in layer.state_dict().items():
        if "running" in key:
            assert value.dtype == torch.float32
            assert torch.equal(value, before[key]), "digits are lost"
    x = _input().to(dtype)
    assert layer(x).dtype == dtype
    assert layer.eval()(x).dtype == dtype
    made = LAYERS[name](dtype=dtype)
    assert all(v.dtype == torch.float32 for k, v in made.state_dict().items() if "running" in k)


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_the_mask_leaves_out_does_not_count(name, is_training):
    """In output at the other positions, gradients, and statistics; padding may even be NaN."""
    layers = [_warmed(name, dtype=torch.float64).train(is_training)]
    layers.append(copy.deepcopy(layers[0]))
    mask = torch.rand(10, 3) > 0.3
    x = _input(dtype=torch.float64)
    padded = x.masked_fill(~mask[:, None], float("nan"))
    found = []
    for layer, values in zip(layers, (x, padded), strict=True):
        leaf = values.clone().requires_grad_()
        y = layer(leaf, mask=mask).movedim(1, 2)[mask]
        y.pow(2).sum().backward()
        found.append((y.detach(), leaf.grad.movedim(1, 2)[mask]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(_state(layers[1]), _state(layers[0]))
    assert not found[1][0].isnan().any()


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_by_differences(name, is_training):
    layer = _warmed(name, dtype=torch.float64, activation="tanh").train(is_training)
    if name == "renorm":  # r and d are constants to the gradient, which differences do not know: see test_renorm.py
        layer.r_max, layer.d_max = ((0, 1.0),), ((0, 0.0),)
    x = _input(9, C, 2, dtype=torch.float64).requires_grad_()
    residual = torch.randn(9, C, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(9)[:, None] % 3 > 0
    parameters = dict(layer.named_parameters())

    def forward(x, residual, *values):
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, given, (x, residual), {"mask": mask})

    assert torch.autograd.gradcheck(forward, (x, residual, *parameters.values()), atol=1e-6, nondet_tol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_residual_and_activation_are_those_of_separate_operations(name):
    fused = _warmed(name, dtype=torch.float64, activation="gelu")
    apart = LAYERS[name](dtype=torch.float64)
    apart.load_state_dict(fused.state_dict())
    x, residual = _input(dtype=torch.float64), _input(dtype=torch.float64)
    torch.testing.assert_close(fused(x, residual), nn.functional.gelu(apart(x) + residual))


@pytest.mark.parametrize("name", LAYERS)
def test_channels_on_the_last_axis(name):
    first = _warmed(name, dtype=torch.float64)
    last = LAYERS[name](dtype=torch.float64, channel_axis=-1)
    last.load_state_dict(first.state_dict())
    x = _input(dtype=torch.float64)
    torch.testing.assert_close(last(x.movedim(1, -1)), first(x).movedim(1, -1))
    torch.testing.assert_close(last.state_dict(), first.state_dict())


@pytest.mark.parametrize("name", LAYERS)
def test_networks_in_channels_last_memory_stay_so(name):
    layer = _warmed(name)
    x = torch.randn(6, C, 5, 4)
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    other = _warmed(name)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), other.eval()(x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("name", LAYERS)
def test_momentum_none_is_the_plain_average(name):
    if name == "frozen":
        return
    layer, batches = LAYERS[name](momentum=None, dtype=torch.float64), [_input(dtype=torch.float64) for _ in range(3)]
    for batch in batches:
        layer(batch)
    expected = torch.stack([batch.mean((0, 2)) for batch in batches]).mean(0)
    found = next(value for key, value in layer.state_dict().items() if key.endswith("running_mean"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_fx_keeps_the_layer_whole(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = _warmed(name)

        def forward(self, x):
            return torch.relu(self.norm(x))

    model = Model().eval()
    traced = torch.fx.symbolic_trace(model)
    assert "call_module" in [node.op for node in traced.graph.nodes]
    x = _input()
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("name", LAYERS)
def test_bad_input_gets_a_clear_error(name):
    layer = LAYERS[name]()
    with pytest.raises(ShapeError, match=r"expected 4 channels on axis 1, got 3.*\(8, 3\)"):
        layer(torch.randn(8, 3))
    with pytest.raises(ShapeError, match=r"axis 1, which an input of shape \(4,\) does not have"):
        layer(torch.randn(4))
    with pytest.raises(DtypeError, match="must be a float tensor"):
        layer(torch.ones(8, C, dtype=torch.int64))
    with pytest.raises(DtypeError, match="mask must be bool"):
        layer(_input(), mask=torch.ones(10, 3))
    with pytest.raises(ShapeError, match="does not fit an input"):
        layer(_input(), mask=torch.ones(7, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="residual must have the shape"):
        layer(_input(), torch.randn(10, C, 1))
    with pytest.raises(ArgumentError, match="activation must be one of"):
        LAYERS[name](activation="swish")
    if name != "frozen":
        with pytest.raises(ShapeError, match="more than 1 value per channel"):
            layer(torch.randn(1, C))


def test_layers_of_the_family_are_found_by_torch_tools_or_hidden_on_purpose():
    """update_bn and others look for _BatchNorm: those that it would treat rightly are, the others are not."""
    base = nn.modules.batchnorm._BatchNorm
    for name in ("sync", "ghost", "renorm"):
        assert isinstance(LAYERS[name](), base)
        assert isinstance(LAYERS[name](), BatchNorm)
    for name in ("zca", "frozen", "domain"):
        assert not isinstance(LAYERS[name](), base)
