"""fold(): what goes into what, what is refused and why, on networks with every trap that folding has."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm
from batchnorm import fold
from batchnorm.errors import ArgumentError


def settled(model: nn.Module) -> nn.Module:
    """The model with random statistics, gamma and beta, in evaluation mode."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                with torch.no_grad():
                    module.weight.uniform_(0.5, 1.5)
                    if module.bias is not None:
                        module.bias.normal_()
    return model.eval()


def check(model, example, *, folded=(), frozen=(), left=None):
    """Folds, compares outputs here too, and checks what became of which layer; returns network and report."""
    args = example if isinstance(example, tuple) else (example,)
    keys = list(model.state_dict())
    before = copy.deepcopy(model)
    new, report = fold(model, example)
    assert report.agreement.holds, str(report)
    assert report.agreement.inputs == 3
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        old = before.eval()(*args)
        scale = old.abs().max()
        assert (new(*args) - old).abs().max() <= 1e-5 * scale
    gone = {change.names[0] for change in report.changed if "-> FrozenBatchNorm" not in change.what}
    alone = {change.names[0] for change in report.changed if "-> FrozenBatchNorm" in change.what}
    assert gone == set(folded)
    assert alone == set(frozen)
    for name in folded:
        assert not hasattr(new.get_submodule(name), "running_mean")
    for name in frozen:
        assert isinstance(new.get_submodule(name), batchnorm.FrozenBatchNorm)
    reasons = {skip.name: skip.why for skip in report.skipped}
    assert reasons.keys() == (left or {}).keys()
    for name, why in (left or {}).items():
        assert why in reasons[name]
    return new, report


class Net(nn.Module):
    """Modules by name, and a forward."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.way = forward

    def forward(self, x):
        return self.way(self, x)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3), 1),
    "2d": (nn.Conv2d(4, 6, 3, padding=1, bias=False), 2),
    "3d": (nn.Conv3d(4, 6, 2), 3),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), 2),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), 2),
    "dilation, stride": (nn.Conv2d(4, 6, 3, dilation=2, stride=2, padding=2), 2),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), 2),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 2),
    "replicate": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), 2),
    "circular": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), 1),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), 1),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, output_padding=1, bias=False), 2),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2), 3),
    "transposed, groups": (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), 2),
}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def sizes(rank):
    return torch.randn(3, 4, *([9, 7, 6][:rank]))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_into_the_convolution_before(name):
    convolution, rank = CONVOLUTIONS[name]
    model = settled(nn.Sequential(copy.deepcopy(convolution), NORMS[rank](convolution.out_channels), nn.ReLU()))
    new, _ = check(model, sizes(rank), folded=["1"])
    assert type(new[1]) is nn.Identity
    assert type(new[0]) is type(convolution)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_into_the_convolution_after_unless_zero_padding_comes_between(name):
    convolution, rank = CONVOLUTIONS[name]
    model = settled(nn.Sequential(nn.ReLU(), NORMS[rank](4), copy.deepcopy(convolution)))
    is_padded = convolution.padding_mode == "zeros" and convolution.padding not in ((0,) * rank,)
    if is_padded or "transposed" in name:
        _, report = check(model, sizes(rank), frozen=["1"])
        assert "zero padding does not have its shift" in str(report) or "not every output has a share" in str(report)
    else:
        check(model, sizes(rank), folded=["1"])


def test_zero_padding_is_no_hindrance_without_a_shift():
    model = settled(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, groups=2)))
    model[1].running_mean.zero_()
    nn.init.zeros_(model[1].bias)
    check(model, sizes(2), folded=["1"])
    transposed = settled(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, groups=2)))
    transposed[1].running_mean.zero_()
    nn.init.zeros_(transposed[1].bias)
    check(transposed, sizes(2), folded=["1"])


def test_a_pointwise_transposed_convolution_takes_the_shift():
    model = settled(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2)))
    check(model, sizes(2), folded=["1"])


def test_into_linear_maps_before_and_after():
    model = settled(
        nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.BatchNorm1d(7), nn.Linear(7, 2))
    )
    new, _ = check(model, torch.randn(4, 5), folded=["1", "3"])
    assert new[0].bias is not None


def test_one_after_the_other_into_the_same_convolution():
    model = settled(
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Dropout(0.5))
    )
    check(model, sizes(2), folded=["0", "2", "3"])


def test_channels_that_are_no_features_of_the_linear_map():
    """BatchNorm1d on (N, L, F) has L for channels."""
    model = settled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    _, report = check(model, torch.randn(3, 4, 4), frozen=["1"])
    assert "its channels are on axis 1, the features of the linear map on 2" in str(report)


def test_features_that_are_moved_to_the_channels():
    def forward(self, x):
        x = self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)
        return self.last(self.flat(self.first(x).flatten(0, 1)).reshape_as(x))

    modules = {
        "linear": nn.Linear(4, 6),
        "norm": nn.BatchNorm1d(6),
        "first": nn.Linear(6, 6),
        "flat": nn.BatchNorm1d(6),
    }
    model = settled(Net(forward, **modules, last=nn.ReLU()))
    check(model, torch.randn(3, 5, 4), folded=["norm", "flat"])


def test_channels_on_the_last_axis():
    model = settled(nn.Sequential(nn.Linear(4, 6), batchnorm.BatchNorm(6, channel_axis=-1), nn.Tanh()))
    check(model, torch.randn(3, 5, 4), folded=["1"])


def test_a_convolution_that_is_used_twice():
    """torch's own fx fuse is off by 3.46 here."""
    modules = {"conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)}
    model = settled(Net(lambda self, x: self.conv(F.relu(self.norm(self.conv(x)))), **modules))
    _, report = check(model, sizes(2), frozen=["norm"])
    assert "called 2 times, not always followed by it" in str(report)


def test_a_pair_that_is_used_twice_is_folded():
    modules = {"conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)}
    model = settled(Net(lambda self, x: self.norm(self.conv(F.relu(self.norm(self.conv(x))))), **modules))
    check(model, sizes(2), folded=["norm"])


def test_a_layer_that_follows_two_convolutions_goes_into_both():
    modules = {"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4)}
    model = settled(Net(lambda self, x: self.norm(self.b(F.relu(self.norm(self.a(x))))), **modules))
    _, report = check(model, sizes(2), folded=["norm"])
    assert report.changed[0].names == ("norm", "b", "a") or report.changed[0].names == ("norm", "a", "b")


def test_a_shared_layer_that_stands_elsewhere_too():
    modules = {"a": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)}
    model = settled(Net(lambda self, x: self.norm(F.relu(self.norm(self.a(x)))), **modules))
    check(model, sizes(2), frozen=["norm"])


def test_an_output_that_goes_elsewhere_too():
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + torch.sigmoid(y)

    model = settled(Net(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)))
    _, report = check(model, sizes(2), frozen=["norm"])
    assert "the output of the conv2d before it goes elsewhere too (BatchNorm2d, sigmoid)" in str(report)


def test_an_output_that_is_returned_too():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return {"early": y, "late": self.norm(y)}

    _, report = fold(settled(Two()), sizes(2))
    assert report.agreement.holds
    assert "goes elsewhere too (BatchNorm2d, the network's output)" in str(report)


def test_one_layer_before_several_convolutions_goes_into_all():
    def forward(self, x):
        y = self.norm(F.relu(x))
        return self.a(y) + self.b(y)

    model = settled(Net(forward, norm=nn.BatchNorm2d(4), a=nn.Conv2d(4, 3, 1), b=nn.Conv2d(4, 3, 1, bias=False)))
    _, report = check(model, sizes(2), folded=["norm"])
    assert report.changed[0].names == ("norm", "a", "b")


def test_weights_that_are_tied_or_read_by_something_else():
    model = settled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)))
    model[3].weight = model[0].weight
    _, report = check(model, torch.randn(3, 4), frozen=["1"])
    assert "parameters are used elsewhere too" in str(report)
    reads = settled(
        Net(lambda self, x: self.n(self.l(x)) + self.l.weight.sum(), l=nn.Linear(4, 4), n=nn.BatchNorm1d(4))
    )
    _, report = check(reads, torch.randn(3, 4), frozen=["n"])
    assert "parameters are used elsewhere too" in str(report)


def test_a_functional_convolution():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.norm = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.BatchNorm2d(6)

        def forward(self, x):
            return self.norm(F.conv2d(x, self.kernel))

    _, report = check(settled(Functional()), sizes(2), frozen=["norm"])
    assert "the weight of the conv2d is no parameter of a module" in str(report)


def test_hooks_and_parametrizations_are_named():
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[3].register_forward_pre_hook(lambda module, args: None)
    _, report = check(model, sizes(2), folded=["1"], left={"3": "BatchNorm2d has hooks"})
    assert "following" in report.changed[0].what
    normed = settled(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)))
    _, report = check(normed, sizes(2), frozen=["1"])
    assert "the weight of the conv2d is no parameter of a module" in str(report)


def test_layers_that_are_no_scale_and_shift():
    class Doubling(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    def pair(norm):
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm)

    model = nn.Sequential(
        pair(nn.BatchNorm2d(4, track_running_stats=False)), pair(Doubling(4)), pair(batchnorm.DecorrelatedBatchNorm(4))
    )
    check(
        settled(model),
        sizes(2),
        left={"0.1": "keeps no running statistics", "1.1": "behaviour of its own (forward)", "2.1": "it whitens"},
    )


def test_statistics_that_are_not_finite():
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model[1].running_var[0] = float("nan")
    _, report = fold(model, sizes(2))
    assert "its weights or statistics are not finite" in str(report)


def test_our_layers_keep_activation_and_residual():
    def forward(self, x):
        y = self.first(self.a(x))
        return self.second(self.b(y), x)

    modules = {"a": nn.Conv2d(4, 4, 3, padding=1), "first": batchnorm.BatchNorm2d(4, activation="silu")}
    modules |= {"b": nn.Conv2d(4, 4, 3, padding=1), "second": batchnorm.BatchNorm2d(4, activation="relu")}
    new, _ = check(settled(Net(forward, **modules)), sizes(2), folded=["first", "second"])
    assert repr(new.first) == "Activated('silu')"
    pickle.loads(pickle.dumps(new.first))


@pytest.mark.parametrize("layer", [batchnorm.GhostBatchNorm, batchnorm.BatchRenorm, batchnorm.SyncBatchNorm])
def test_the_family_is_a_scale_and_shift_at_inference(layer):
    check(settled(nn.Sequential(nn.Conv2d(4, 4, 3), layer(4))), sizes(2), folded=["1"])


def test_frozen_layers():
    model = settled(
        nn.Sequential(nn.Conv2d(4, 4, 3), batchnorm.FrozenBatchNorm(4), nn.ReLU(), batchnorm.FrozenBatchNorm(4))
    )
    check(model, sizes(2), folded=["1"], left={"3": "before it stands relu; after it comes the network's output"})


def test_a_layer_alone_becomes_frozen_with_the_same_buffers():
    model = settled(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()))
    new, report = check(model, sizes(2), frozen=["1"])
    assert report.changed[0].note == "before it stands relu; after it comes relu"
    torch.testing.assert_close(new.state_dict(), model.state_dict())
    assert not list(new.parameters())


def test_the_model_itself_is_a_layer():
    new, _ = fold(settled(nn.BatchNorm2d(4)), sizes(2))
    assert isinstance(new, batchnorm.FrozenBatchNorm)


def test_control_flow_that_reads_values_is_said():
    def forward(self, x):
        y = self.norm(self.conv(x))
        return y * 2 if bool(y.sum() > 0) else y

    model = settled(Net(forward, conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)))
    _, report = check(model, sizes(2), folded=["norm"])
    assert "reads numbers out of tensors" in str(report)


def test_a_layer_that_the_example_does_not_reach():
    net = settled(
        Net(lambda self, x: self.n(self.c(x)), c=nn.Conv2d(4, 4, 3), n=nn.BatchNorm2d(4), unused=nn.BatchNorm2d(4))
    )
    check(net, sizes(2), folded=["n"], left={"unused": "not called with this example"})


def test_training_mode_is_said_and_the_model_keeps_it():
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).train()
    new, report = fold(model, sizes(2))
    assert "the model was in training mode" in str(report)
    assert not new.training
    assert model[1].training


def test_inplace_keeps_parameters_and_objects():
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    x = sizes(2)
    before = model(x)
    convolution, weight = model[0], model[0].weight
    new, report = fold(model, x, inplace=True)
    assert new is model
    assert model[0] is convolution
    assert model[0].weight is weight
    assert isinstance(model[3], batchnorm.FrozenBatchNorm)
    assert report.agreement.holds
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_the_class_is_the_users_and_the_result_can_be_copied_and_saved():
    from torchvision_like import ResNet

    model = settled(ResNet())
    new, report = fold(model, torch.randn(2, 3, 16, 16))
    assert type(new) is ResNet
    assert len(report.changed) == 8
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(pickle.loads(pickle.dumps(new))(x), copy.deepcopy(new)(x))
    torch.fx.symbolic_trace(new)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = settled(
        nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
        )
    )
    new, report = fold(model.to(dtype), sizes(2).to(dtype))
    assert report.agreement.holds
    assert len(report.changed) == 2
    assert {tensor.dtype for tensor in new.parameters()} == {dtype}


def test_weights_that_would_overflow_stay():
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model[1].running_var.fill_(1e-5)
    with torch.no_grad():
        model[1].weight.fill_(6e4)
    _, report = fold(model.half(), sizes(2).half() * 1e-4)
    assert "new weights would not be finite in torch.float16" in str(report)


def test_a_network_that_differs_afterwards_is_given_back():
    class Nosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return y if isinstance(self.norm, nn.BatchNorm2d) else y + 1

    model = settled(Nosy())
    new, report = fold(model, sizes(2))
    assert not report.agreement.holds
    assert report.changed == ()
    assert "refused: the outputs differ" in str(report)
    assert isinstance(new.norm, nn.BatchNorm2d)
    same, _ = fold(model, sizes(2), inplace=True)
    assert same is model
    assert isinstance(model.norm, nn.BatchNorm2d)


def test_a_network_that_does_not_run_afterwards_is_given_back():
    model = settled(Net(lambda self, x: self.n(self.c(x)) * self.n.eps, c=nn.Conv2d(4, 4, 3), n=nn.BatchNorm2d(4)))
    _, report = fold(model, sizes(2))
    assert not report.agreement.holds
    assert "the folded network does not run, AttributeError" in str(report)


def test_a_network_that_amplifies_rounding_is_decided_in_float64():
    _, report = fold(amplifying(1000), sizes(2))
    assert report.agreement.holds
    assert 1e-5 < report.agreement.tolerance == 3 * report.agreement.own_rounding < 1e-3
    assert "off its own outputs in float64 by rounding alone" in str(report)
    assert "; the network's own rounding error is " in str(report)


def test_a_tolerance_that_is_given_does_not_give_way_to_rounding():
    new, report = fold(amplifying(1000), sizes(2), tolerance=1e-7)
    assert (report.agreement.holds, report.agreement.tolerance) == (False, 1e-7)
    assert type(new.n) is nn.BatchNorm2d


def test_a_network_that_is_all_rounding_is_not_folded_unless_one_says_how_far_off_it_may_be():
    """The tolerance used to be three times the network's own rounding error, however large that was."""
    new, report = fold(amplifying(1e5), sizes(2))
    assert (report.agreement.holds, report.agreement.tolerance) == (False, pytest.approx(1e-3))
    assert report.agreement.own_rounding > 1e-3
    assert "pass a tolerance to have it folded all the same" in str(report)
    assert type(new.n) is nn.BatchNorm2d
    assert fold(amplifying(1e5), sizes(2), tolerance=2.0)[1].agreement.holds


def amplifying(factor):
    """A network that multiplies rounding errors."""
    modules = {"c": nn.Conv2d(4, 4, 3), "n": nn.BatchNorm2d(4)}
    return settled(Net(lambda self, x: torch.sin(self.n(self.c(x)) * factor), **modules))


def test_several_arguments_and_names():
    modules = {"c": nn.Conv2d(4, 4, 3), "n": nn.BatchNorm2d(4)}

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.n = modules["c"], modules["n"]

        def forward(self, x, index, *, scale):
            return self.n(self.c(x))[index] * scale

    model = settled(Two())
    example = {"x": sizes(2), "index": torch.tensor([0, 2]), "scale": 2.0}
    _, report = fold(model, example)
    assert report.agreement.holds
    assert len(report.changed) == 1


@pytest.mark.parametrize(
    ("model", "example", "match"),
    [
        (nn.Linear(2, 2), torch.zeros(1, 2), "Linear has no batch normalization layer to fold"),
        (nn.BatchNorm1d(2), None, "example must be what the network is called with"),
        (torch.zeros(1), torch.zeros(1), "model must be a torch.nn.Module, got Tensor"),
        (
            Net(lambda self, x: None, n=nn.BatchNorm1d(2)),
            torch.zeros(1, 2),
            "returns no numbers that could be compared",
        ),
    ],
)
def test_errors(model, example, match):
    with pytest.raises(ArgumentError, match=match):
        fold(model, example)


def test_a_model_that_cannot_be_copied():
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model.generator = (i for i in ())
    with pytest.raises(ArgumentError, match="Sequential cannot be copied"):
        fold(model, sizes(2))
