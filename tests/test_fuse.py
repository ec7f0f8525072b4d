"""fuse_activations(): what is fused, what is left and why, and that everything else of a network stays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_fold import Net, settled
from torch import nn
from torchvision_like import BasicBlock, ResNet

import batchnorm
from batchnorm import freeze, fuse_activations
from batchnorm.errors import ArgumentError


def step(model, x):
    """Outputs in evaluation; outputs, gradients and buffers after a step in training; in float64."""
    model = copy.deepcopy(model).double()
    x = x.double().requires_grad_()
    with torch.no_grad():
        quiet = model.eval()(x)
    y = model.train()(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "eval": quiet,
        "train": y.detach(),
        "dx": x.grad,
        "gradients": gradients,
        "buffers": dict(model.named_buffers()),
    }


def check(model, x, *, fused=(), left=None):
    """Fuses and compares here too; `fused` says what each layer has now, `left` why others have nothing."""
    model = settled(model).train()
    before, keys = step(model, x), list(model.state_dict())
    new, report = fuse_activations(model, x)
    assert report.agreement.holds, str(report)
    assert report.agreement.max_relative < 1e-10
    torch.testing.assert_close(step(new, x), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(step(model, x), before, rtol=0, atol=0)
    assert list(new.state_dict()) == keys
    found = {change.names[0]: change.what.rpartition("2d")[2].strip(" +") for change in report.changed}
    assert found == dict(fused)
    for name in dict(fused):
        assert isinstance(new.get_submodule(name), batchnorm.BatchNorm2d)
    reasons = {skip.name: skip.why for skip in report.skipped}
    assert reasons.keys() == (left or {}).keys()
    for name, why in (left or {}).items():
        assert why in reasons[name]
    return new, report


def images(*shape):
    return torch.randn(*(shape or (3, 4, 6, 5)))


def pair(activation, *more):
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), activation, *more)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.LeakyReLU(0.01), "leaky_relu"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Tanh(), "tanh"),
    ],
)
def test_modules_in_a_sequence(activation, name):
    new, _ = check(pair(activation), images(), fused={"1": name})
    assert type(new) is nn.Sequential
    assert type(new[2]) is nn.Identity
    assert new[1].activation == name


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.Hardtanh(), nn.LeakyReLU(0.2), nn.GELU("tanh"), nn.PReLU()])
def test_activations_that_no_layer_has_are_named(activation):
    why = f"after it comes {type(activation).__name__}, which no layer fuses"
    check(pair(activation), images(), left={"1": why})


FUNCTIONS = {
    "F.relu": (lambda self, x: F.relu(self.norm(x)), "relu"),
    "F.relu in place": (lambda self, x: F.relu(self.norm(x), inplace=True), "relu"),
    "F.relu, True": (lambda self, x: F.relu(self.norm(x), True), "relu"),
    "torch.relu": (lambda self, x: torch.relu(self.norm(x)), "relu"),
    "method": (lambda self, x: self.norm(x).relu(), "relu"),
    "method in place": (lambda self, x: self.norm(x).relu_(), "relu"),
    "F.leaky_relu": (lambda self, x: F.leaky_relu(self.norm(x)), "leaky_relu"),
    "F.silu": (lambda self, x: F.silu(self.norm(x)), "silu"),
    "F.gelu": (lambda self, x: F.gelu(self.norm(x)), "gelu"),
    "torch.sigmoid": (lambda self, x: torch.sigmoid(self.norm(x)), "sigmoid"),
    "tanh": (lambda self, x: self.norm(x).tanh(), "tanh"),
    "added": (lambda self, x: F.relu(self.norm(x) + x), "addition + relu"),
    "added the other way round": (lambda self, x: F.relu(x + self.norm(x)), "addition + relu"),
    "added in place": (lambda self, x: F.relu(self.norm(x).add_(x)), "addition + relu"),
    "torch.add": (lambda self, x: torch.add(self.norm(x), x).relu(), "addition + relu"),
    "through Identity": (lambda self, x: F.relu(self.rest(self.norm(x))), "relu"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    forward, what = FUNCTIONS[name]
    check(Net(forward, norm=nn.BatchNorm2d(4), rest=nn.Identity()), images(), fused={"norm": what})


REFUSED = {
    "another slope": (lambda self, x: F.leaky_relu(self.norm(x), 0.2), "after it comes leaky_relu"),
    "approximate": (lambda self, x: F.gelu(self.norm(x), approximate="tanh"), "after it comes gelu"),
    "F.relu6": (lambda self, x: F.relu6(self.norm(x)), "after it comes relu6"),
    "a number": (lambda self, x: F.relu(self.norm(x) + 1), "an addition of a number"),
    "another shape": (lambda self, x: F.relu(self.norm(x) + x.mean((2, 3), keepdim=True)), "of another shape or dtype"),
    "a factor": (lambda self, x: torch.add(self.norm(x), x, alpha=2).relu(), "after it comes add"),
    "used twice": (lambda self, x: (lambda y: F.relu(y) + y)(self.norm(x)), "goes to several places (add, relu)"),
    "no activation": (lambda self, x: self.norm(x) + x, "an addition, then the end of its block"),
    "called twice": (lambda self, x: F.relu(self.norm(F.relu(self.norm(x)))), "it is called 2 times"),
    "values": (lambda self, x: F.relu(self.norm(x)) if x.sum() > 0 else x, "cannot be traced"),
    "the mode": (lambda self, x: F.relu(self.norm(x)) + int(self.training), "something else in training"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_and_why(name):
    forward, why = REFUSED[name]
    check(Net(forward, norm=nn.BatchNorm2d(4)), images(), left={"norm": why})


def test_residual_blocks_with_one_relu_module():
    model = ResNet()
    new, _ = check(
        model,
        images(3, 3, 12, 12),
        fused={
            "bn1": "relu",
            **{f"layer{n}.bn1": "relu" for n in ("1.0", "1.1", "2.0")},
            **{f"layer{n}.bn2": "addition + relu" for n in ("1.0", "1.1", "2.0")},
            "layer2.0.downsample.1": "in one pass with layer2.0.bn2",
        },
    )
    assert type(new) is ResNet
    assert type(new.relu) is nn.Identity
    block = new.layer1[0]
    assert isinstance(block, BasicBlock)
    assert type(block).__name__ == "BasicBlock"
    assert isinstance(block.relu, nn.ReLU)
    assert "torch.nn.functional" not in block.forward_source
    x = images(2, 3, 12, 12)
    expected = new.eval()(x)
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        other.train()
        assert all(module.training for module in other.modules())
    assert isinstance(torch.fx.symbolic_trace(new), torch.fx.GraphModule)
    new.load_state_dict(ResNet().state_dict())


def test_an_end_of_a_nested_sequence():
    def forward(self, x):
        return self.relu(self.body(x) + x)

    def body():
        return nn.Sequential(pair(nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))

    check(
        Net(forward, body=body(), relu=nn.ReLU()), images(), fused={"body.0.1": "relu", "body.1.1": "addition + relu"}
    )
    hooked = body()
    hooked[1].register_forward_hook(lambda module, args, output: None)
    check(
        Net(forward, body=hooked, relu=nn.ReLU()), images(), fused={"body.0.1": "relu"}, left={"body.1.1": "end of its"}
    )


def test_an_activation_module_that_others_call_too():
    relu = nn.ReLU()
    new, _ = check(
        nn.Sequential(pair(relu), nn.Conv2d(4, 4, 1), relu),
        images(),
        left={"0.1": "the activation after it is called elsewhere too"},
    )
    assert new[2] is new[0][2]


def test_several_layers_share_one_activation_module():
    relu = nn.ReLU()
    new, _ = check(nn.Sequential(pair(relu), pair(relu)), images(), fused={"0.1": "relu", "1.1": "relu"})
    assert type(new[0][2]) is nn.Identity


def test_optional_arguments_keep_names_and_defaults():
    def block():
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm2d(4)

            def forward(self, x, shortcut=None, *, scale=None):
                if shortcut is None:
                    shortcut = x
                return F.relu(self.norm(x) + shortcut)

        return Block()

    model = settled(block())
    x = images()
    new, report = fuse_activations(model, x)
    assert len(report.changed) == 1
    torch.testing.assert_close(new(x=x, scale=None), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match="shortcut has been specialized to have value None"):
        new(x, shortcut=x)


def test_hooks_are_respected_and_kept():
    calls = []
    model = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
    model[0].register_forward_hook(lambda module, args, output: calls.append("block"))
    model[0].bn1.register_forward_hook(lambda module, args, output: calls.append("bn1"))
    new, _ = check(
        model,
        images(),
        fused={"0.bn2": "addition + relu", "1.bn1": "relu", "1.bn2": "addition + relu"},
        left={"0.bn1": "BatchNorm2d has hooks"},
    )
    calls.clear()
    new(images())
    assert calls == ["bn1", "block"]


def test_frozen_layers_and_ours_and_modes():
    model = settled(nn.Sequential(pair(nn.ReLU()), pair(nn.ReLU()), batchnorm.BatchNorm2d(4, activation="relu")))
    freeze(model[0])
    model[1][1].eval()
    model.train()
    model[1].eval()
    new, report = fuse_activations(model, images())
    assert [change.names for change in report.changed] == [("0.1",), ("1.1",)]
    assert "it has an activation already, relu" in str(report)
    assert [module.training for module in new.modules()] == [module.training for module in model.modules()]
    assert new[0][1].activation == "relu"


def test_a_graph_module():
    model = torch.fx.symbolic_trace(
        settled(nn.Sequential(BasicBlock(4, 4), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())))
    )
    new, report = fuse_activations(model, images())
    assert report.agreement.holds
    assert len(report.changed) == 3
    assert isinstance(new, torch.fx.GraphModule)
    assert "relu" not in new.code.replace("_relu", "")
    x = images()
    torch.testing.assert_close(pickle.loads(pickle.dumps(new))(x), model(x), rtol=1e-5, atol=1e-5)


def test_inplace_keeps_objects_and_an_optimizer():
    model = settled(BasicBlock(4, 4)).train()
    norm, weight = model.bn1, model.bn1.weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    new, _ = fuse_activations(model, images(), inplace=True)
    assert new is model
    assert model.bn1 is norm
    assert model.bn1.weight is weight
    before = weight.clone()
    model(images()).sum().backward()
    optimizer.step()
    assert not torch.equal(before, weight)


def test_control_flow_elsewhere_does_not_matter():
    def forward(self, x):
        for _ in range(int(x.abs().sum() > 0) + 1):
            x = self.block(x)
        return x

    check(
        Net(forward, block=BasicBlock(4, 4)),
        images(),
        fused={"block.bn1": "relu", "block.bn2": "addition + relu"},
    )


def test_a_layer_that_is_not_called():
    model = Net(lambda self, x: self.a(x), a=pair(nn.ReLU()), unused=nn.BatchNorm2d(4))
    _, report = fuse_activations(settled(model), images())
    assert [(skip.name, skip.why) for skip in report.skipped] == [("unused", "it is not called with this example")]


def test_training_that_fails_on_the_example_is_said():
    model = settled(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()))
    _, report = fuse_activations(model, torch.randn(1, 4))
    assert report.agreement.holds
    assert "training was not compared: in training mode the example gives ValueError" in str(report)


def test_a_network_that_differs_afterwards_is_given_back():
    class Nosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            return self.relu(self.norm(x)) * (2 if type(self.norm) is nn.BatchNorm2d else 1)

    model = settled(Nosy())
    new, report = fuse_activations(model, images())
    assert not report.agreement.holds
    assert type(new.norm) is nn.BatchNorm2d
    assert "refused: before and after differ" in str(report)
    assert fuse_activations(model, images(), inplace=True)[0] is model
    assert type(model.norm) is nn.BatchNorm2d


class Looking(nn.Module):
    """Its second layer's kind, which torch.fx does not see, goes into the output."""

    def __init__(self, fails=False):
        super().__init__()
        self.norm, self.relu, self.fails = nn.BatchNorm2d(4), nn.ReLU(), fails

    def forward(self, x):
        is_plain = type(self.norm) is nn.BatchNorm2d
        if self.fails and self.training and not is_plain:
            raise RuntimeError("another layer was here")
        return self.relu(self.norm(x)) * (2 if is_plain else 1)


@pytest.mark.parametrize("nosy", [Looking(), Looking(fails=True)], ids=["differs", "fails"])
def test_a_layer_that_cannot_be_fused_does_not_keep_the_others_from_it(nosy):
    last = pair(nn.ReLU(), nn.BatchNorm2d(4), nn.Tanh())
    model = settled(nn.Sequential(pair(nn.ReLU()), nosy, pair(nn.SiLU()), last))
    new, report = fuse_activations(model, images())
    assert report.agreement.holds
    assert [one.names[0] for one in report.changed] == ["0.1", "2.1", "3.1", "3.3"]
    (left,) = report.skipped
    assert left.name == "1.norm"
    assert "fused, the network computes something else" in left.why
    assert type(new[1].norm) is nn.BatchNorm2d
    x = images()
    torch.testing.assert_close(step(new, x), step(model, x), rtol=1e-9, atol=1e-9)
    same, _ = fuse_activations(model, images(), inplace=True)
    assert type(same[1].norm) is nn.BatchNorm2d
    assert same[2][1].activation == "silu"


def test_layers_in_lists_are_those_of_the_block_that_calls_them():
    """They were left alone with the words that they are not called with this example."""

    def forward(self, x):
        for norm, conv in zip(self.norms, self.parts["convs"], strict=True):
            x = x + conv(F.relu(norm(x)))
        for outer in self.outer:
            x = self.relu(x + outer(x))
        return x

    def convs(count):
        return nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(count))

    norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
    outer = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(4)) for conv in convs(2))
    model = Net(forward, norms=norms, parts=nn.ModuleDict({"convs": convs(3)}), outer=outer, relu=nn.ReLU())
    fused = {f"norms.{i}": "relu" for i in range(3)} | {f"outer.{i}.1": "addition + relu" for i in range(2)}
    check(model, images(), fused=fused)


def test_it_compiles():
    new, _ = fuse_activations(settled(BasicBlock(4, 4)), images())
    x = images()
    torch.testing.assert_close(torch.compile(new, backend="eager", fullgraph=True)(x), new(x))


@pytest.mark.parametrize(
    ("model", "example", "match"),
    [
        (nn.ReLU(), torch.zeros(1), "ReLU has no batch normalization layer"),
        (nn.BatchNorm1d(2), 3, "example must be what the network is called with"),
    ],
)
def test_errors(model, example, match):
    with pytest.raises(ArgumentError, match=match):
        fuse_activations(model, example)
