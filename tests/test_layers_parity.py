"""BatchNorm1d, 2d, 3d beside torch.nn's own: outputs, gradients, buffers, state_dict, and whole networks."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import DTYPES, LAYOUT_PARAMS, LAYOUTS, TOLERANCES, make_like
from torch import nn

import batchnorm

PAIRS = {
    2: (batchnorm.BatchNorm1d, nn.BatchNorm1d),
    3: (batchnorm.BatchNorm1d, nn.BatchNorm1d),
    4: (batchnorm.BatchNorm2d, nn.BatchNorm2d),
    5: (batchnorm.BatchNorm3d, nn.BatchNorm3d),
}
RANKS = [
    pytest.param(*PAIRS[rank], shape, id=str(shape))
    for rank, shape in ((2, (6, 3)), (3, (6, 3, 5)), (4, (4, 3, 5, 2)), (5, (2, 3, 2, 3, 2)))
]

ARGUMENTS = [
    {},
    {"eps": 0.5},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"momentum": 0.7},
    {"affine": False},
    {"bias": False},
    {"affine": False, "bias": False},
    {"track_running_stats": False},
    {"track_running_stats": False, "momentum": None, "affine": False},
    {"track_running_stats": False, "bias": False},
    {"momentum": None, "affine": False},
    {"momentum": None, "bias": False, "eps": 1e-3},
    {"dtype": torch.float64},
    {"device": "cpu", "dtype": torch.float32},
]


def _pair(ours, theirs, channels, **arguments):
    """Our layer and torch's with the same random state."""
    a, b = ours(channels, **arguments), theirs(channels, **arguments)
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.copy_(torch.rand(channels, generator=torch.Generator().manual_seed(channels)) + 0.5)
    a.load_state_dict(b.state_dict())
    return a, b


def _assert_same_state(a, b, rtol=1e-5, atol=1e-6):
    mine, theirs = a.state_dict(), b.state_dict()
    assert list(mine) == list(theirs)
    assert mine._metadata == theirs._metadata
    for name, value in theirs.items():
        if name.rsplit(".", 1)[-1] not in ("running_mean", "running_var"):
            assert mine[name].dtype == value.dtype, name
        torch.testing.assert_close(mine[name], value.to(mine[name].dtype), rtol=rtol, atol=atol)


def _step(layer, x, dy):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, [p.grad.clone() for p in layer.parameters()]


def _assert_same_step(a, b, x, dy, dtype):
    rtol, atol = TOLERANCES[dtype]
    mine, theirs = _step(a, x, dy), _step(b, x, dy)
    assert mine[0].dtype == theirs[0].dtype
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=10 * atol)
    return mine[0], theirs[0]


@pytest.mark.parametrize(("ours", "theirs", "shape"), RANKS)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_every_constructor_argument(ours, theirs, shape, arguments):
    a, b = _pair(ours, theirs, shape[1], **arguments)
    dtype = arguments.get("dtype", torch.float32)
    assert repr(a) == repr(b)
    assert [n for n, _ in a.named_parameters()] == [n for n, _ in b.named_parameters()]
    assert [n for n, _ in a.named_buffers()] == [n for n, _ in b.named_buffers()]
    _assert_same_state(a, b)
    generator = torch.Generator().manual_seed(0)
    steps = 100 if len(shape) in (2, 4) else 10
    for step in range(steps):
        x = torch.randn(shape, generator=generator, dtype=dtype) * (1 + step % 3) + step % 5
        if step in (0, 1, steps - 1):
            _assert_same_step(a, b, x, make_like(x, step), dtype)
            _assert_same_state(a, b)
        else:
            a(x), b(x)
    a.eval(), b.eval()
    _assert_same_step(a, b, x, make_like(x, 1), dtype)
    _assert_same_state(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
@pytest.mark.parametrize("mode", ["train", "eval", "eval-of-batch"])
def test_every_input(layout, dtype, mode):
    arguments = {"track_running_stats": mode != "eval-of-batch"}
    a, b = _pair(*PAIRS[len(layout.shape)], layout.shape[1], dtype=dtype, **arguments)
    if mode == "eval":
        warm_up = layout.make(torch.float32, seed=9)
        for layer in (a, b):
            layer.float()(warm_up)
            layer.to(dtype)
        a.load_state_dict(b.state_dict())
    a.train(mode == "train"), b.train(mode == "train")
    x = layout.make(dtype)
    y, reference = _assert_same_step(a, b, x, make_like(x, 1), dtype)
    # Half precision: torch.nn rounds its buffers and we do not.
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    _assert_same_state(a, b, tolerance, tolerance)
    if "expanded" not in layout.name and "sliced" not in layout.name:
        assert y.stride() == reference.stride()
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        if memory_format == torch.contiguous_format or y.ndim == {torch.channels_last: 4}.get(memory_format, 5):
            assert y.is_contiguous(memory_format=memory_format) or not reference.is_contiguous(
                memory_format=memory_format
            )


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_half_precision_input_and_float32_parameters(parameters, training):
    a, b = _pair(*PAIRS[4], 3, dtype=torch.float32)
    x = torch.randn(4, 3, 5, 5).bfloat16()
    a.train(training), b.train(training)
    if parameters == torch.bfloat16:
        a.bfloat16(), b.bfloat16()
    _assert_same_step(a, b, x, make_like(x, 1), torch.bfloat16)


@pytest.mark.parametrize(
    "shape", [(0, 3), (0, 3, 4), (4, 3, 0), (0, 3, 0), (0, 3, 4, 4), (4, 3, 0, 4), (0, 3, 2, 2, 2)], ids=str
)
@pytest.mark.parametrize(
    "arguments", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(shape, arguments, training):
    a, b = _pair(*PAIRS[len(shape)], 3, **arguments)
    if arguments.get("track_running_stats", True):
        full = torch.randn(5, *[3 if axis == 1 else 2 for axis in range(1, len(shape))])
        a(full), b(full)
    a.train(training), b.train(training)
    x = torch.zeros(shape)
    _assert_same_step(a, b, x, x, torch.float32)
    _assert_same_state(a, b)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_between_others(momentum):
    a, b = _pair(*PAIRS[2], 3, momentum=momentum)
    for size in (4, 0, 7, 0, 0, 3):
        x = torch.randn(size, 3) + size
        a(x), b(x)
    _assert_same_state(a, b)


@pytest.mark.parametrize(("ours", "theirs", "shape"), RANKS)
def test_one_value_a_channel(ours, theirs, shape):
    x = torch.randn(1, 3, *[1] * (len(shape) - 2))
    for layer in (
        ours(3),
        theirs(3),
        ours(3, track_running_stats=False).eval(),
        theirs(3, track_running_stats=False).eval(),
    ):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            layer(x)
    _assert_same_state(ours(3), theirs(3))
    a, b = _pair(ours, theirs, 3)
    torch.testing.assert_close(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize(("ours", "theirs", "shape"), RANKS)
def test_wrong_rank(ours, theirs, shape):
    wrong = {batchnorm.BatchNorm1d: [(3,), (2, 3, 4, 4)], batchnorm.BatchNorm2d: [(2, 3), (2, 3, 4), (2, 3, 4, 4, 4)]}
    for bad in wrong.get(ours, [(2, 3, 4, 4), (2, 3)]):
        for layer in (ours(3), theirs(3)):
            with pytest.raises(ValueError, match=r"expected .*D.* input"):
                layer(torch.randn(bad))


def test_class_relations():
    for ours, theirs in PAIRS.values():
        assert issubclass(ours, theirs)
        assert ours.__name__ == theirs.__name__
    for layer in (batchnorm.BatchNorm1d(3), batchnorm.BatchNorm(3), batchnorm.BatchNorm((2, 3), channel_axis=(0, 1))):
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        assert isinstance(layer, batchnorm.BatchNorm)


# State


@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours"])
@pytest.mark.parametrize("arguments", ARGUMENTS[:-2], ids=str)
def test_state_dict_loads_strictly(direction, arguments):
    a, b = batchnorm.BatchNorm2d(3, **arguments), nn.BatchNorm2d(3, **arguments)
    source, target = (a, b) if direction == "ours to torch" else (b, a)
    for _ in range(3):
        source(torch.randn(4, 3, 2, 2) * 3 + 1)
    assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
    _assert_same_state(a, b, 0, 0)
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize("with_metadata", [True, False])
def test_old_state_dict_without_num_batches_tracked(with_metadata):
    """Before version 2 torch's layers did not count: such files load strictly, as in torch.nn."""
    source = nn.Sequential(nn.BatchNorm1d(3))
    for _ in range(3):
        source(torch.randn(4, 3))
    state = source.state_dict()
    del state["0.num_batches_tracked"]
    if with_metadata:
        state._metadata["0"]["version"] = 1
    else:
        del state._metadata
    ours, theirs = nn.Sequential(batchnorm.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    for network in (ours, theirs):
        network(torch.randn(4, 3))
        assert (
            str(network.load_state_dict(dict(state) if not with_metadata else state))
            == "<All keys matched successfully>"
        )
    _assert_same_state(ours, theirs)
    _assert_same_step(ours, theirs, torch.randn(4, 3), torch.randn(4, 3), torch.float32)


def test_a_missing_or_surplus_key_is_told():
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r"Missing key.*num_batches_tracked"):
        batchnorm.BatchNorm1d(3).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        batchnorm.BatchNorm1d(3, bias=False).load_state_dict(nn.BatchNorm1d(3).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        batchnorm.BatchNorm1d(3).load_state_dict(nn.BatchNorm1d(4).state_dict())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_with_assign(device):
    source = nn.BatchNorm1d(3)
    source(torch.randn(5, 3))
    layer = batchnorm.BatchNorm1d(3, device=device)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert isinstance(layer.weight, nn.Parameter)
    _assert_same_state(layer, source, 0, 0)
    _assert_same_step(layer, source, torch.randn(5, 3), torch.randn(5, 3), torch.float32)


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alone(copier):
    layer = batchnorm.BatchNorm1d(3, momentum=None, activation="relu")
    layer(torch.randn(4, 3))
    layer.weight.requires_grad_(False)
    if copier == "deepcopy":
        twin = copy.deepcopy(layer)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    _assert_same_state(twin, layer, 0, 0)
    assert (type(twin), twin.momentum, twin.activation, twin.channel_axis) == (batchnorm.BatchNorm1d, None, "relu", 1)
    assert [p.requires_grad for p in twin.parameters()] == [False, True]
    x = torch.randn(4, 3)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    twin(x)
    assert (int(twin.num_batches_tracked), int(layer.num_batches_tracked)) == (3, 2)


def test_a_state_dict_is_loaded_with_weights_only():
    file = io.BytesIO()
    torch.save(batchnorm.BatchNorm((2, 3), channel_axis=(0, 2)).state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["running_mean"].shape == (2, 3)


def test_meta_device():
    a, b = (layer(3, device="meta") for layer in PAIRS[4])
    assert {n: (p.device.type, p.shape) for n, p in a.state_dict().items()} == {
        n: (p.device.type, p.shape) for n, p in b.state_dict().items()
    }
    x = torch.randn(2, 3, 4, 4, device="meta")
    assert a(x).shape == a.eval()(x).shape == x.shape
    a.to_empty(device="cpu").reset_parameters()
    b.to_empty(device="cpu").reset_parameters()
    a.train()
    _assert_same_step(a, b, torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.float32)


@pytest.mark.parametrize("name", ["reset_parameters", "reset_running_stats"])
def test_reset(name):
    a, b = _pair(*PAIRS[2], 3)
    x = torch.randn(4, 3)
    for layer in (a, b):
        layer(x)
        getattr(layer, name)()
    _assert_same_state(a, b)
    _assert_same_step(a, b, x, x, torch.float32)


# Settings after construction


def _toggle(layer, what):
    if what == "momentum":
        layer.momentum = None
    elif what == "track":
        layer.track_running_stats = False
    elif what == "eps":
        layer.eps = 0.1
    elif what == "no count":
        layer.num_batches_tracked = None
    elif what == "no count, cumulative":
        layer.num_batches_tracked, layer.momentum = None, None
    elif what == "no buffers":
        layer.running_mean = layer.running_var = None
    elif what == "weight":
        layer.weight.requires_grad_(False)
    elif what == "frozen":
        layer.requires_grad_(False)
    elif what == "new buffers":
        layer.running_mean, layer.running_var = torch.ones(3), torch.full((3,), 4.0)


TOGGLES = [
    "momentum",
    "track",
    "eps",
    "no count",
    "no count, cumulative",
    "no buffers",
    "weight",
    "frozen",
    "new buffers",
]


@pytest.mark.parametrize("what", TOGGLES)
@pytest.mark.parametrize("input_needs_grad", [True, False])
def test_set_after_construction(what, input_needs_grad):
    a, b = _pair(*PAIRS[3], 3)
    for training in (True, True, False, True, False):
        x, dy = torch.randn(4, 3, 5) * 2 + 1, torch.randn(4, 3, 5)
        results = []
        for layer in (a, b):
            layer.train(training)
            leaf = x.clone().requires_grad_(input_needs_grad)
            y = layer(leaf)
            assert y.requires_grad == (input_needs_grad or any(p.requires_grad for p in layer.parameters()))
            if y.requires_grad:
                layer.zero_grad()
                y.backward(dy)
            results.append((y.detach(), leaf.grad, [p.grad for p in layer.parameters()]))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
        assert (results[0][1] is None) == (results[1][1] is None)
        if results[0][1] is not None:
            torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(results[0][2], results[1][2], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        if a.running_mean is not None and b.running_mean is not None:
            torch.testing.assert_close(a.running_mean, b.running_mean)
            torch.testing.assert_close(a.running_var, b.running_var)
        if training:
            _toggle(a, what), _toggle(b, what)


def test_gradients_accumulate():
    a, b = _pair(*PAIRS[2], 3)
    for layer in (a, b):
        for seed in range(3):
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
            layer(x).pow(3).sum().backward()
    torch.testing.assert_close(a.weight.grad, b.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.bias.grad, b.bias.grad, rtol=1e-4, atol=1e-4)


def test_one_layer_used_twice_in_a_forward():
    a, b = _pair(*PAIRS[2], 3)
    x = torch.randn(6, 3)
    grads = []
    for layer in (a, b):
        leaf = x.clone().requires_grad_()
        layer(layer(leaf).relu() * 3 + 1).pow(3).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    _assert_same_state(a, b)


def test_backward_twice():
    a, _ = _pair(*PAIRS[2], 3)
    x = torch.randn(6, 3, requires_grad=True)
    loss = a(x).pow(3).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_input_may_not_be_overwritten_before_backward():
    for layer in PAIRS[2]:
        x = torch.randn(6, 3, requires_grad=True) * 1
        y = layer(3)(x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_hooks():
    a, b = _pair(*PAIRS[2], 3)
    seen = {}
    for name, layer in (("a", a), ("b", b)):
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update({name + "pre": len(args)}))
        layer.register_forward_hook(lambda m, args, y, name=name: seen.update({name + "out": y.shape}))
        layer.register_full_backward_hook(lambda m, dx, dy, name=name: seen.update({name + "back": dx[0].shape}))
        layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert seen["apre"] == seen["bpre"] == 1
    assert seen["aout"] == seen["bout"] == seen["aback"] == seen["bback"] == (4, 3)


# Tools of torch


@pytest.mark.parametrize("make", [lambda: batchnorm.BatchNorm2d(3), lambda: batchnorm.BatchNorm(3)], ids=["2d", "any"])
def test_update_bn(make):
    data = [torch.randn(4, 3, 2, 2) + i for i in range(5)]
    ours, theirs = nn.Sequential(make()), nn.Sequential(nn.BatchNorm2d(3))
    for network in (ours, theirs):
        torch.optim.swa_utils.update_bn(data, network)
        assert network[0].momentum == 0.1
    _assert_same_state(ours, theirs)


def test_averaged_model():
    network = nn.Sequential(nn.Linear(3, 3), batchnorm.BatchNorm1d(3))
    averaged = torch.optim.swa_utils.AveragedModel(network, use_buffers=True)
    network(torch.randn(5, 3))
    averaged.update_parameters(network)
    torch.testing.assert_close(averaged.module[1].running_mean, network[1].running_mean)


@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"bias": False}, {"eps": 0.1}], ids=str)
def test_fuse_conv_bn_eval(arguments):
    network = nn.Sequential(nn.Conv2d(2, 3, 3), batchnorm.BatchNorm2d(3, **arguments))
    for _ in range(3):
        network(torch.randn(4, 2, 6, 6) * 2 + 1)
    network.eval()
    if arguments.get("bias") is False:
        network[1].bias = None
    fused = nn.utils.fuse_conv_bn_eval(*network)
    x = torch.randn(4, 2, 6, 6)
    torch.testing.assert_close(fused(x), network(x), rtol=1e-4, atol=1e-5)


def test_state_survives_a_swap_of_layers_in_a_network():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    network(torch.randn(5, 3))
    twin = nn.Sequential(nn.Linear(3, 3), batchnorm.BatchNorm1d(3))
    twin.load_state_dict(network.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(twin(x), network(x))
    torch.testing.assert_close(twin.eval()(x), network.eval()(x))


# Networks


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.a, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
        self.b, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
        self.down, self.bn3 = nn.Conv2d(8, 16, 1, stride=2, bias=False), norm(16)
        self.head = nn.Linear(16, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.bn0(self.stem(x)))
        y = self.relu(self.bn1(self.a(x)))
        y = self.bn2(self.b(y))
        y += x
        y = self.relu(self.bn3(self.down(self.relu(y))))
        return self.head(y.mean((2, 3)))


class Dense(nn.Module):
    """Pre-activation, concatenation: normalises one tensor again and again."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(norm(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3))
        self.final, self.head = norm(18), nn.Linear(18, 4)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(torch.relu_(norm(torch.cat(features, 1)))))
        return self.head(torch.relu(self.final(torch.cat(features, 1))).flatten(2).mean(-1))


class MLP(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * 8 * 8, 20, bias=False),
            norm(20),
            nn.Sigmoid(),
            nn.Linear(20, 20, bias=False),
            norm(20, momentum=None),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(20, 4),
            norm(4, affine=False),
        )

    def forward(self, x):
        return self.layers(x)


class UNet(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm(6), nn.LeakyReLU(0.1))
        self.bottom = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(6, 12, 3, padding=1), norm(12), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(12, 6, 2, stride=2), norm(6), nn.ReLU())
        self.out = nn.Sequential(nn.Conv2d(12, 4, 1), norm(4, track_running_stats=False))

    def forward(self, x):
        skip = self.down(x)
        return self.out(torch.cat([self.up(self.bottom(skip)), skip], 1)).mean((2, 3))


class Sequence(nn.Module):
    """(N, L, C) in between: the transposes that recurrent and attention networks need around BatchNorm1d."""

    def __init__(self, norm):
        super().__init__()
        self.embed, self.norm, self.conv, self.norm2 = nn.Linear(24, 6), norm(6), nn.Conv1d(6, 5, 3), norm(5)
        self.head = nn.Linear(30, 4)

    def forward(self, x):
        x = self.embed(x.transpose(1, 2).reshape(x.shape[0], 8, 24))
        x = self.norm(x.transpose(1, 2))
        x = torch.relu(self.norm2(self.conv(x)))
        return self.head(x.view(x.shape[0], -1))


NETWORKS = [(Residual, 4), (Dense, 4), (MLP, 2), (UNet, 4), (Sequence, 3)]


def _train(build, norm, *, channels_last=False, steps=20):
    torch.manual_seed(0)
    network = build(norm)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        target = torch.randint(0, 4, (8,), generator=generator)
        loss = nn.functional.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    network.eval()
    return torch.tensor(losses), network, network(x)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(("build", "rank"), NETWORKS, ids=lambda v: getattr(v, "__name__", ""))
def test_networks_train_alike(build, rank, channels_last):
    ours, theirs = PAIRS[rank]
    mine, mine_network, mine_out = _train(build, ours, channels_last=channels_last)
    losses, network, out = _train(build, theirs, channels_last=channels_last)
    torch.testing.assert_close(mine, losses, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mine_out, out, rtol=1e-2, atol=1e-3)
    _assert_same_state(mine_network, network, 1e-3, 1e-3)


def test_layout_names_are_unique():
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
