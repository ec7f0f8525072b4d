"""convert(): the same function in other layers, nothing lost, and a way back."""

from __future__ import annotations

import copy
import doctest
import pickle
import re
from pathlib import Path

import pytest
import torch
from norm_act import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn

import batchnorm
from batchnorm import convert, freeze, unfreeze
from batchnorm.errors import ArgumentError
from batchnorm.surgery import building, conversion, recognition

KEEPING = ["batchnorm", "sync", "ghost", "renorm", "frozen"]
LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(6, momentum=0.3), (5, 6)),
    "1d-length": (lambda: nn.BatchNorm1d(6, eps=1e-3), (5, 6, 4)),
    "2d": (lambda: nn.BatchNorm2d(6), (5, 6, 3, 4)),
    "2d-cumulative": (lambda: nn.BatchNorm2d(6, momentum=None), (5, 6, 3, 4)),
    "2d-plain": (lambda: nn.BatchNorm2d(6, affine=False), (5, 6, 3, 4)),
    "2d-double": (lambda: nn.BatchNorm2d(6, dtype=torch.float64), (5, 6, 3, 4)),
    "3d": (lambda: nn.BatchNorm3d(6), (5, 6, 2, 3, 2)),
    "sync": (lambda: nn.SyncBatchNorm(6), (5, 6, 3)),
    "timm": (lambda: BatchNormAct2d(6), (5, 6, 3, 4)),
    "timm-relu": (lambda: BatchNormAct2d(6, act=nn.ReLU(inplace=True)), (5, 6, 3, 4)),
    "timm-leaky": (lambda: BatchNormAct2d(6, act=nn.LeakyReLU()), (5, 6, 3, 4)),
    "timm-hardswish": (lambda: BatchNormAct2d(6, act=nn.Hardswish(inplace=True)), (5, 6, 3, 4)),
    "timm-prelu": (lambda: BatchNormAct2d(6, act=nn.PReLU(6)), (5, 6, 3, 4)),
    "timm-drop": (lambda: BatchNormAct2d(6, act=nn.SiLU(), drop=nn.Dropout2d(0.4)), (5, 6, 3, 4)),
    "timm-sync": (lambda: _sync_act(), (5, 6, 3, 4)),
    "timm-frozen": (lambda: FrozenBatchNormAct2d(6, act=nn.GELU()), (5, 6, 3, 4)),
    "torchvision-frozen": (lambda: FrozenBatchNorm2d(6, eps=1e-4), (5, 6, 3, 4)),
}


def _sync_act():
    layer = SyncBatchNormAct(6)
    layer.act = nn.Tanh()
    return layer


def _trained(layer):
    """With numbers that none of which is a default."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if "var" in name else -0.3))
            else:
                tensor.fill_(7)
    return layer


def _x(shape, layer):
    home = next(tensor for tensor in (*layer.parameters(), *layer.buffers()) if tensor.is_floating_point())
    return torch.randn(shape, dtype=home.dtype)


def _step(layer, x):
    """Output, gradients and state after a training step."""
    layer = copy.deepcopy(layer).train()
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y, x.grad, {name: p.grad for name, p in layer.named_parameters()}, layer.state_dict()


def _kind(module):
    """The class, or that of which a parametrization made one at run time."""
    kind = type(module)
    return (kind.__name__, kind.__bases__) if kind.__module__ == "torch.nn.utils.parametrize" else kind


def _assert_same(before, after):
    """The same classes, names, numbers, settings and modes."""
    assert list(before.state_dict()) == list(after.state_dict())
    torch.testing.assert_close(dict(after.state_dict()), dict(before.state_dict()), rtol=0, atol=0)
    for (name, old), (twin, new) in zip(before.named_modules(), after.named_modules(), strict=True):
        assert (name, _kind(old), old.training) == (twin, _kind(new), new.training)
        assert set(vars(old)) == set(vars(new))
        assert repr(old) == repr(new)
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert (old.dtype, old.requires_grad) == (new.dtype, new.requires_grad)


@pytest.mark.parametrize("name", LAYERS)
def test_to_batchnorm_is_the_same_function_in_training_and_evaluation(name):
    make, shape = LAYERS[name]
    layer = _trained(make())
    x = _x(shape, layer)
    new, report = convert(layer)
    assert report.changed[0].names == ("",)
    assert report.skipped == ()
    assert report.agreement.holds
    assert type(new).__module__.startswith("batchnorm.")
    assert type(layer).__module__.partition(".")[0] in ("torch", "timm", "torchvision")
    torch.testing.assert_close(new.eval()(x), copy.deepcopy(layer).eval()(x))
    old, found = _step(layer, x), _step(new, x)
    torch.testing.assert_close(found[:3], old[:3])
    torch.testing.assert_close({key: found[3][key] for key in old[3]}, dict(old[3]))


@pytest.mark.parametrize("to", KEEPING)
@pytest.mark.parametrize("name", LAYERS)
def test_the_way_back_is_lossless(name, to):
    layer = _trained(LAYERS[name][0]()).eval()
    layer.mark = "mine"
    new, report = convert(layer, to)
    if not report.changed:
        assert "frozen" in name
        assert "fixed" in report.skipped[0].why
        return
    back, report = convert(new, "torch")
    assert report.agreement.holds
    _assert_same(layer, back)
    assert back.mark == "mine"


@pytest.mark.parametrize("to", ["sync", "ghost", "renorm", "frozen"])
@pytest.mark.parametrize("name", ["1d", "2d", "2d-plain", "timm-relu", "timm-prelu"])
def test_batchnorm_and_back_by_way_of_another_kind(name, to):
    first, _ = convert(_trained(LAYERS[name][0]()))
    there, _ = convert(first, to)
    back, report = convert(there)
    assert report.agreement.holds
    _assert_same(first, back)
    _assert_same(convert(first, "torch")[0], convert(back, "torch")[0])


@pytest.mark.parametrize("to", [*KEEPING, "decorrelated"])
@pytest.mark.parametrize("name", ["1d", "2d", "3d", "timm-relu", "timm-hardswish", "timm-prelu"])
def test_evaluation_is_the_same_in_every_family(name, to):
    make, shape = LAYERS[name]
    layer = _trained(make()).eval()
    x = _x(shape, layer)
    new, report = convert(layer, to, example=x)
    assert report.agreement.holds
    torch.testing.assert_close(new(x), layer(x))
    new.train()(x)  # and training runs


def test_state_dicts_of_another_librarys_frozen_layers_load_before_and_after():
    layer = _trained(FrozenBatchNorm2d(3))
    new, _ = convert(layer)
    assert list(new.state_dict()) == list(layer.state_dict())
    new.load_state_dict(layer.state_dict())
    new.load_state_dict(nn.BatchNorm2d(3).state_dict())
    assert new.num_batches_tracked is None


def test_ours_of_every_class():
    for layer in (batchnorm.BatchNorm1d(3), batchnorm.BatchNorm2d(3, activation="relu"), batchnorm.BatchNorm3d(3)):
        for to in ("sync", "ghost", "renorm", "frozen"):
            there, _ = convert(_trained(layer), to)
            back, _ = convert(there)
            _assert_same(layer, back)


def test_a_step_of_an_optimizer_that_was_made_before():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (model, twin)]
    same, _ = convert(model, inplace=True)
    assert same is model
    assert isinstance(model[1], batchnorm.BatchNorm1d)
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(3)
            one(torch.randn(8, 3)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("to", ["batchnorm", "ghost", "group"])
def test_in_place_everything_is_the_very_object(to):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    layer, weight, mean = model[1], model[1].weight, model[1].running_mean
    outside = [layer]  # as models keep lists of their layers beside the tree
    convert(model, to, inplace=True)
    assert model[1] is layer is outside[0]
    assert type(layer) is not nn.BatchNorm2d
    assert layer.weight is weight
    if to != "group":
        assert layer.running_mean is mean


def test_a_copy_leaves_the_model_alone():
    model = nn.Sequential(nn.BatchNorm2d(4))
    before = copy.deepcopy(model)
    new, _ = convert(model)
    assert new is not model
    _assert_same(before, model)
    assert new[0].weight is not model[0].weight


def test_back_from_frozen_the_parameters_are_the_very_ones():
    model = nn.Sequential(nn.BatchNorm2d(4))
    parameter = model[0].weight
    parameter.requires_grad_(False)
    convert(model, "frozen", inplace=True)
    assert list(model.parameters()) == []
    with torch.no_grad():
        model[0].weight += 1
        parameter += 5  # what an optimizer may do to it meanwhile does not count
    convert(model, "torch", inplace=True)
    assert model[0].weight is parameter
    assert parameter.tolist() == [2.0] * 4
    assert not parameter.requires_grad


def test_hooks_of_every_kind_stay():
    model = nn.Sequential(nn.BatchNorm1d(3))
    layer, calls = model[0], []
    handles = [
        layer.register_forward_hook(lambda module, args, kwargs, y: calls.append("after"), with_kwargs=True),
        layer.register_forward_pre_hook(lambda module, args: calls.append("before")),
        layer.register_full_backward_hook(lambda module, dx, dy: calls.append("backward")),
        layer.register_full_backward_pre_hook(lambda module, dy: calls.append("backward pre")),
        layer.register_state_dict_pre_hook(lambda module, prefix, keep: calls.append("saving")),
        layer.register_load_state_dict_post_hook(lambda module, keys: calls.append("loaded")),
    ]
    for to in ("batchnorm", "frozen", "batchnorm", "torch", "group"):
        convert(model, to, inplace=True)
        assert calls == []  # and the checks of convert run none of them
        x = torch.randn(4, 3, requires_grad=True)
        model(x).sum().backward()
        model.load_state_dict(model.state_dict())
        assert calls == ["before", "after", "backward pre", "backward", "saving", "loaded"]
        calls.clear()
    for handle in handles:
        handle.remove()
    model(x)
    assert calls == []


def test_hooks_on_the_activation_keep_it_a_module():
    layer = BatchNormAct2d(3, act=nn.ReLU())
    seen = []
    layer.act.register_forward_hook(lambda module, args, y: seen.append(y))
    new, report = convert(layer)
    assert report.changed[0].what == "timm.BatchNormAct2d -> BatchNorm2d, then drop, then act"
    seen.clear()
    y = new(torch.randn(2, 3, 4, 4))
    assert seen[0] is y


def test_activations_that_fuse_and_those_that_stay():
    model = nn.Sequential(
        BatchNormAct2d(3),
        BatchNormAct2d(3, act=nn.SiLU()),
        BatchNormAct2d(3, act=nn.LeakyReLU(0.2)),
        BatchNormAct2d(3, act=nn.GELU(approximate="tanh")),
        BatchNormAct2d(3, act=nn.PReLU(3)),
    )
    new, report = convert(model, example=torch.randn(2, 3, 4, 4))
    assert [one.what.partition(" -> ")[2] for one in report.changed] == [
        "BatchNorm2d",
        "BatchNorm2d + silu",
        *["BatchNorm2d, then drop, then act"] * 3,
    ]
    assert list(new.state_dict()) == list(model.state_dict())
    assert new[1].activation == "silu"
    assert "act" not in new[1]._modules
    _assert_same(model, convert(copy.deepcopy(new), "torch")[0])


def test_converted_models_are_pickled_with_their_way_back():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False))
    for to in KEEPING:
        new = pickle.loads(pickle.dumps(convert(model, to)[0]))
        _assert_same(model, convert(new, "torch")[0])


def test_a_changed_activation_comes_back_as_a_module():
    layer, _ = convert(BatchNormAct2d(3, act=nn.ReLU()))
    layer.activation = "tanh"
    x = torch.randn(2, 3, 4, 4)
    back, report = convert(layer, "torch", example=x)
    assert report.agreement.holds
    assert [type(one) for one in back] == [nn.BatchNorm2d, nn.Tanh]
    assert report.changed[0].what == "BatchNorm2d -> Sequential(torch.nn.BatchNorm2d -> Tanh)"
    assert "0. before the names" in report.changed[0].note


def test_a_fused_layer_made_by_hand_becomes_a_sequence_with_its_hooks():
    model = nn.Sequential(batchnorm.BatchNorm2d(3, activation="relu"))
    seen = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    model.eval()
    convert(model, "torch", inplace=True)
    assert repr(model[0]) == repr(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    assert not any(module.training for module in model.modules())
    y = model(torch.randn(2, 3, 4, 4))
    assert seen[0] is y
    assert bool((y >= 0).all())


def test_shared_root_and_nested_layers():
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.Sequential(nn.BatchNorm1d(3))), "b": shared})
    new, report = convert(model)
    assert [one.names for one in report.changed] == [("a.0", "b"), ("a.1.0",)]
    assert new["a"][0] is new["b"]
    some, report = convert(model, layers="b")
    assert [one.names for one in report.changed] == [("a.0", "b")]
    assert type(some["a"][1][0]) is nn.BatchNorm1d
    some, report = convert(model, layers=[model["a"][1]])
    assert [one.names for one in report.changed] == [("a.1.0",)]
    root, report = convert(nn.BatchNorm1d(3), inplace=True)
    assert type(root) is batchnorm.BatchNorm1d
    with pytest.raises(ArgumentError, match="'c' is or contains no batch normalization layer"):
        convert(model, layers="c")


def test_parametrized_weights_stay_parametrized():
    layer = nn.BatchNorm2d(3)
    nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(2, 3, 4, 4)
    for to in ("batchnorm", "sync", "ghost", "renorm"):
        new, report = convert(layer, to, example=x)
        assert report.agreement.holds
        assert nn.utils.parametrize.is_parametrized(new, "weight")
        assert list(new.state_dict()) == list(layer.state_dict())
        _step(new, x)
        _assert_same(layer, convert(new, "torch")[0])
        nn.utils.parametrize.remove_parametrizations(new, "weight")
        assert type(new).__name__ in ("BatchNorm2d", "SyncBatchNorm", "GhostBatchNorm", "BatchRenorm")
        assert isinstance(new.weight, nn.Parameter)
    for to in ("frozen", "decorrelated", "group", "layer"):
        _, report = convert(layer, to)
        assert "parametrized" in report.skipped[0].why


def test_weight_norm_by_hook_in_place():
    layer = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer[0])
    x = torch.randn(2, 3, 4, 4)
    y = layer(x)
    with pytest.raises(ArgumentError, match=r"cannot be copied .*pass inplace=True"):
        convert(layer)
    _, report = convert(layer, inplace=True, example=x)
    assert report.agreement.holds
    assert any("cannot be copied" in note for note in report.notes)
    torch.testing.assert_close(layer(x), y)
    with torch.no_grad():
        layer[0].weight_g += 1
    assert not torch.allclose(layer(x), y)


def test_dtypes_stay_and_half_precision_statistics_become_float32():
    layer = _trained(nn.BatchNorm2d(4)).bfloat16()
    new, report = convert(layer)
    assert report.agreement.holds
    assert new.weight.dtype == torch.bfloat16
    assert new.running_mean.dtype == torch.float32
    assert "its running statistics are float32 now" in report.changed[0].note
    back, _ = convert(new, "torch")
    _assert_same(layer, back)
    back(torch.randn(2, 4, 3, 3, dtype=torch.bfloat16))


def test_meta_models_convert_without_a_comparison():
    model = nn.Sequential(nn.BatchNorm2d(4, device="meta"))
    new, report = convert(model)
    assert report.agreement is None
    assert any("meta" in note for note in report.notes)
    assert new[0].weight.is_meta


class Own(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


class Renamed(nn.BatchNorm2d):
    """Other defaults, no other behaviour."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-3, momentum=0.01)
        self.channels = channels


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        return x


def _patched():
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    return layer


def _with_child():
    layer = BatchNormAct2d(3, act=nn.ReLU())
    layer.aa = nn.AvgPool2d(2)
    return layer


def _quantized():
    import torch.ao.nn.quantized as quantized

    return quantized.BatchNorm2d(3)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Own(3), r"Own has a behaviour of its own \(forward\)"),
        (_patched, "forward was replaced on this very layer"),
        (_with_child, r"submodules that convert does not know \(drop, act, aa\)"),
        (lambda: nn.LazyBatchNorm2d(), "does not know its number of channels yet"),
        (lambda: torch.jit.script(nn.BatchNorm2d(3)), "compiled by TorchScript"),
        (lambda: batchnorm.DomainBatchNorm(3, domains=("a", "b")), "statistics for each domain"),
        (lambda: batchnorm.FrozenBatchNorm(3), "made with fixed statistics"),
        (lambda: batchnorm.BatchNorm2d(3), "it is a BatchNorm2d already"),
        (Strange, "Strange has a behaviour of its own"),
        (_quantized, "BatchNorm2d has a behaviour of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_is_left_alone_is_named_with_the_reason(make, why):
    model = nn.Sequential(make(), nn.BatchNorm2d(3))
    before = list(model[0].state_dict())
    kind = type(model[0])
    _, report = convert(model, inplace=True)
    assert [one.names for one in report.changed] == [("1",)]
    (skipped,) = report.skipped
    assert skipped.name == "0"
    assert re.search(why, skipped.why), skipped.why
    assert type(model[0]) is kind
    assert list(model[0].state_dict()) == before


def test_a_subclass_without_a_behaviour_of_its_own_converts_and_comes_back():
    layer = _trained(Renamed(3))
    new, report = convert(layer)
    assert report.agreement.holds
    assert (new.eps, new.momentum, new.channels) == (1e-3, 0.01, 3)
    _assert_same(layer, convert(new, "torch")[0])


def test_an_open_transaction_is_not_disturbed():
    model = nn.Sequential(batchnorm.BatchNorm2d(3))
    with batchnorm.transaction(model):
        _, report = convert(model, "ghost", inplace=True)
    assert report.skipped[0].why == "a transaction is open"


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(3), lambda: BatchNormAct2d(3, act=nn.Hardswish())])
def test_frozen_by_freeze_stays_frozen_and_comes_free(make):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), _trained(make())).train()
    plain = copy.deepcopy(model)
    freeze(model)
    for to in ("batchnorm", "sync", "ghost", "torch"):
        _, report = convert(model, to, inplace=True, example=torch.randn(2, 3, 4, 4))
        assert report.agreement.holds
        assert "freeze() holds it as before" in report.changed[0].note
        model.train()
        assert not model[1].training
        assert not model[1].weight.requires_grad
    _, report = unfreeze(model)
    assert report.nothing_moved
    _assert_same(plain, model)
    freeze(model)
    for to in ("frozen", "group", "decorrelated"):
        _, report = convert(model, to)
        assert report.skipped[0].why == "freeze() holds it: unfreeze it first"


@pytest.mark.parametrize(
    ("channels", "arguments", "groups"), [(64, {}, 32), (24, {}, 12), (3, {}, 1), (40, {"num_groups": 16}, 10)]
)
def test_group_norm_takes_weights_and_drops_statistics_and_says_so(channels, arguments, groups):
    layer = _trained(nn.BatchNorm2d(channels, eps=1e-3)).eval()
    new, report = convert(layer, "group", **arguments)
    assert type(new) is nn.GroupNorm
    assert (new.num_groups, new.eps, new.training) == (groups, 1e-3, False)
    torch.testing.assert_close(dict(new.state_dict()), {"weight": layer.weight.data, "bias": layer.bias.data})
    assert report.agreement is None
    assert report.changed[0].note.startswith("set aside: running_mean, running_var, num_batches_tracked")
    assert "cannot compute what BatchNorm did" in report.notes[0]


def test_dense_layers_get_groups_of_sixteen():
    new, _ = convert(nn.BatchNorm1d(64), "group")
    assert new.num_groups == 4


def test_layer_norm_over_all_axes_but_the_batchs():
    layer = nn.BatchNorm2d(6)
    new, _ = convert(layer, "layer")
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(new(x), nn.functional.layer_norm(x, (6, 3, 3)))


def test_activations_stand_behind_group_norm():
    model = nn.Sequential(
        BatchNormAct2d(4, act=nn.PReLU()), BatchNormAct2d(4, act=nn.SiLU()), batchnorm.BatchNorm2d(4, activation="tanh")
    )
    new, report = convert(model, "group")
    x = torch.randn(2, 4, 3, 3)
    for one, act in zip(new, (nn.PReLU(), nn.SiLU(), nn.Tanh()), strict=True):
        assert isinstance(one, nn.GroupNorm)
        y = nn.functional.group_norm(x, one.num_groups, one.weight, one.bias, one.eps)
        torch.testing.assert_close(one(x), act(y))
    assert report.changed[1].what.endswith("then act")


@pytest.mark.parametrize("to", ["group", "layer", "decorrelated"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(12, eps=1e-3, momentum=None),
        nn.BatchNorm1d(12, affine=False),
        nn.BatchNorm3d(12, track_running_stats=False),
        nn.SyncBatchNorm(12),
        BatchNormAct2d(12, act=nn.SiLU()),
        BatchNormAct2d(12, act=nn.PReLU()),
        nn.BatchNorm2d(12).half(),
        nn.BatchNorm2d(12).double(),
    ],
    ids=["2d", "no-weights", "no-statistics", "sync", "act", "own-act", "half", "double"],
)
def test_there_and_back_bit_for_bit(to, layer):
    for one in layer.state_dict().values():
        one.copy_(torch.rand(one.shape) + 2)
    layer.eval().own = "a user's"
    layer.register_buffer("users", torch.ones(2))
    model = nn.Sequential(layer, layer)
    new, _ = convert(model, to)
    assert new[0] is new[1]
    assert type(new[0]) is not type(layer)
    back, _ = convert(copy.deepcopy(new), "torch")
    _assert_same(model, back)
    assert list(back.state_dict()) == list(model.state_dict())
    assert vars(back[0]).keys() == vars(layer).keys()


def test_back_from_group_norm_weights_are_those_of_now_and_statistics_those_of_before():
    model = nn.Sequential(_trained(nn.BatchNorm2d(12)))
    new, _ = convert(model, "group")
    new.double()
    new[0].weight.data += 1
    for to in ("batchnorm", "sync", "frozen"):
        assert "it is group normalization, another function" in convert(new, to)[1].skipped[0].why
    assert "6 groups already" in convert(new, "group")[1].skipped[0].why
    whole, _ = convert(new, "layer")
    assert whole[0].num_groups == 1
    back, report = convert(whole, "torch", example=torch.randn(2, 12, 3, 3).double())
    assert report.agreement is None
    assert "statistics are those from before it was GroupNorm: recalibrate()" in report.changed[0].note
    expected = copy.deepcopy(model).double()
    expected[0].weight.data += 1
    _assert_same(expected, back)
    with pytest.raises(ArgumentError, match="no batch normalization layer"):
        convert(nn.GroupNorm(2, 4), "torch")


def test_whitening_that_was_learned_has_no_way_back_and_says_so():
    model = nn.Sequential(nn.BatchNorm2d(12))
    new, _ = convert(model, "decorrelated")
    new(torch.randn(8, 12, 3, 3))
    same, report = convert(new, "torch")
    assert report.skipped[0].why == "it whitens by covariances that it has learned, which no other layer does"
    _assert_same(new, same)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = batchnorm.BatchNorm2d(3), batchnorm.BatchNorm2d(3, activation="relu")

    def forward(self, x):
        return self.second(self.first(x), x)


def test_layers_that_torch_cannot_express_are_refused_by_name():
    model = nn.ModuleDict(
        {
            "last": batchnorm.BatchNorm(3, channel_axis=-1),
            "any": batchnorm.BatchNorm(3),
            "ghost": batchnorm.GhostBatchNorm(3),
            "fixed": batchnorm.FrozenBatchNorm(3),
        }
    )
    _, report = convert(model, "torch")
    assert {one.name: one.why for one in report.skipped} == {
        "last": "its channels are on axis -1, and torch.nn's layers have them on axis 1",
        "any": "it takes inputs of any rank and torch.nn has a class for each: pass an example that shows which",
        "ghost": "it takes inputs of any rank and torch.nn has a class for each: pass an example that shows which",
        "fixed": "torch.nn has no layer with fixed statistics",
    }
    _, report = convert(model, "group", layers="last")
    assert "axis -1" in report.skipped[0].why


def test_an_example_shows_ranks_and_residuals():
    model = Residual()
    x = torch.randn(2, 3, 4, 4)
    new, report = convert(model, "torch", example=x)
    assert [one.names for one in report.changed] == [("first",)]
    assert "residual or a mask" in report.skipped[0].why
    assert report.agreement.holds
    graph = torch.fx.symbolic_trace(model)
    _, report = convert(graph, "torch")  # a graph shows its calls without one
    assert [one.name for one in report.skipped] == ["second"]
    stack = nn.Sequential(batchnorm.GhostBatchNorm(3), nn.Flatten(), batchnorm.BatchNorm(48))
    new, report = convert(stack, "torch", example=x)
    assert [type(new[0]), type(new[2])] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert report.agreement.holds


def test_sync_keeps_its_process_group_and_torchs_twin_has_it():
    group = object()
    layer = nn.SyncBatchNorm(3)
    layer.process_group = group
    new, _ = convert(nn.Sequential(layer), inplace=True)
    assert type(new[0]) is batchnorm.SyncBatchNorm
    assert new[0].process_group is group
    back, _ = convert(new, "torch", inplace=True)
    assert back[0].process_group is group
    other, _ = convert(nn.BatchNorm2d(3), "sync", process_group=group)
    assert other.process_group is group
    plain, report = convert(batchnorm.SyncBatchNorm(3))
    assert type(plain) is batchnorm.BatchNorm
    assert "this rank's batch alone" in report.changed[0].note


def test_options_reach_the_layers():
    layer = nn.BatchNorm1d(12)
    ghost, _ = convert(layer, "ghost", ghost_size=8)
    assert ghost.ghost_size == 8
    assert convert(ghost, "ghost", ghost_size=4)[0].ghost_size == 4
    assert convert(ghost, "ghost")[1].skipped[0].why == "it is a GhostBatchNorm already"
    renorm, _ = convert(layer, "renorm", r_max=[(0, 2.0)], d_max=[(0, 1.0)])
    assert (renorm.r_max, renorm.d_max, renorm.momentum) == (((0, 2.0),), ((0, 1.0),), 0.1)
    white, _ = convert(layer, "decorrelated", group_size=5)
    assert white.group_size == 4


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"to": "instance"}, "to must be one of batchnorm, torch, .*; got 'instance'"),
        ({"ghost_size": 4}, "ghost_size goes with to='ghost' only, got to='batchnorm'"),
        ({"to": "group", "num_groups": 0}, "num_groups must be at least 1, got 0"),
        ({"example": torch.randn(2, 7, 3, 3)}, "the model cannot be run on the example: .*Error"),
        ({"to": "torch", "example": 3}, "the model cannot be run on the example"),
    ],
)
def test_bad_arguments(arguments, match):
    model = nn.Sequential(nn.BatchNorm2d(3), batchnorm.BatchNorm2d(3))
    before = copy.deepcopy(model)
    with pytest.raises(ArgumentError, match=match):
        convert(model, inplace=True, **arguments)
    _assert_same(before, model)


def test_models_without_layers_and_things_that_are_no_models():
    with pytest.raises(ArgumentError, match="Linear has no batch normalization layer"):
        convert(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match=r"must be a torch.nn.Module, got dict"):
        convert({})
    with pytest.raises(ArgumentError, match="hold no tensor"):
        convert(Silent(), example=torch.randn(2, 3))


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        self.norm(x)
        return "done"


def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = nn.Sequential(nn.BatchNorm2d(3), BatchNormAct2d(3, act=nn.ReLU()), nn.BatchNorm2d(3))
    before, layers = copy.deepcopy(model), list(model)
    become, calls = conversion.become, []

    def failing(module, new):
        calls.append(module)
        if len(calls) == 3:
            raise MemoryError("no more")
        become(module, new)

    monkeypatch.setattr(conversion, "become", failing)
    with pytest.raises(MemoryError):
        convert(model, "frozen", inplace=True)
    _assert_same(before, model)
    assert all(one is other for one, other in zip(model, layers, strict=True))


def test_a_wrong_conversion_is_found_out(monkeypatch):
    def wrong(fresh):
        return {**recognition_settings(fresh), "eps": 0.1}

    recognition_settings = building.settings_of
    monkeypatch.setattr(building, "settings_of", wrong)
    x = torch.randn(4, 3, 5, 5)
    for example in (None, x):
        _, report = convert(nn.Sequential(nn.BatchNorm2d(3)), example=example)
        assert not report.agreement.holds
        assert "NOT EQUAL" in str(report)


def test_neither_statistics_nor_random_state_move():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 3, 6, 6)
    example, state = x.clone(), torch.get_rng_state()
    for inplace in (False, True):
        new, report = convert(model, inplace=inplace, example={"input": x})
        assert report.agreement.inputs == 2
        assert report.agreement.holds
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(dict(new.state_dict()), dict(before), rtol=0, atol=0)
        assert torch.equal(x, example)


def test_rounding_that_a_network_amplifies_is_told_from_an_error():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return torch.sin(self.norm(x) * 1e4)

    _, report = convert(Steep(), example=torch.randn(16, 4))
    assert report.agreement.holds
    assert any("compared in float64" in note for note in report.notes)


def test_a_model_that_fails_in_training_is_compared_in_evaluation_and_by_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    _, report = convert(model, example=torch.randn(1, 3))  # one value a channel has no variance
    assert report.agreement.inputs == 1
    assert any("training was not compared" in note and "more than 1 value" in note for note in report.notes)
    assert any("each layer by itself" in note and "verified" in note for note in report.notes)


def test_nothing_to_do_is_no_error():
    _, report = convert(nn.Sequential(batchnorm.BatchNorm2d(3)), example=torch.randn(2, 3, 4, 4))
    assert report.changed == ()
    assert report.agreement is None
    assert [one.name for one in report.skipped] == ["0"]


def test_compiled_traced_and_wrapped_models():
    x = torch.randn(4, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    y = model(x)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    compiled(x)
    _, report = convert(compiled, inplace=True, example=x)
    assert report.changed[0].names == ("_orig_mod.1",)
    torch.testing.assert_close(compiled(x), y)
    assert type(compiled._orig_mod[1]) is batchnorm.BatchNorm2d
    graph = torch.fx.symbolic_trace(model)
    new, report = convert(graph, example=x)
    assert report.agreement.holds
    torch.testing.assert_close(new(x), y)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    new, report = convert(averaged, example=x)
    assert report.changed[0].names == ("module.1",)


def test_data_parallel_models(tmp_path):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        for to in ("batchnorm", "sync", "torch"):
            _, report = convert(model, to, inplace=True, example=torch.randn(4, 3))
            assert report.agreement.holds
            model(torch.randn(4, 3)).sum().backward()
        with pytest.raises(ArgumentError, match="convert before wrapping"):
            convert(model, "frozen", inplace=True)
    finally:
        dist.destroy_process_group()


def test_every_setting_of_our_layers_is_known():
    """An attribute that a constructor sets and convert does not know would be dragged into other classes."""
    made = [
        batchnorm.BatchNorm(3),
        batchnorm.BatchNorm1d(3),
        batchnorm.SyncBatchNorm(3),
        batchnorm.GhostBatchNorm(3),
        batchnorm.BatchRenorm(3),
        batchnorm.DecorrelatedBatchNorm(3),
        batchnorm.FrozenBatchNorm(3),
        nn.BatchNorm2d(3),
        nn.SyncBatchNorm(3),
    ]
    for layer in made:
        assert set(vars(layer)) <= recognition.MODULE_STATE | recognition.SETTINGS


@pytest.mark.filterwarnings("ignore")
def test_real_layers_of_timm():
    try:
        from timm.layers import BatchNormAct2d as Real
    except (ImportError, RuntimeError) as error:  # a wheel for another build of torch raises the latter
        pytest.skip(f"timm cannot be imported: {error}")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Real(8), Real(8, act_layer="mish"), Real(8, apply_act=False))
    new, report = convert(model, example=torch.randn(4, 3, 16, 16))
    assert [one.what.partition(" -> ")[2] for one in report.changed] == [
        "BatchNorm2d + relu",
        "BatchNorm2d, then drop, then act",
        "BatchNorm2d",
    ]
    assert report.agreement.holds
    _assert_same(model, convert(new, "torch")[0])


def test_the_examples_of_the_guide_run():
    guide = Path(__file__).parent.parent / "docs" / "convert.md"
    found = doctest.testfile(str(guide), module_relative=False)
    assert found.attempted >= 8
    assert found.failed == 0
