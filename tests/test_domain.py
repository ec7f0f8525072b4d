"""DomainBatchNorm: statistics by domain, one weight and bias."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from cases import close
from torch import nn

from batchnorm import BatchNorm, DomainBatchNorm, use_domain
from batchnorm.errors import ArgumentError

DOMAINS = ("source", "target")


def _layer(**arguments):
    return DomainBatchNorm(3, domains=DOMAINS, dtype=torch.float64, **arguments)


def test_each_domain_keeps_its_own_statistics():
    layer = _layer()
    batches = {"source": torch.randn(8, 3).double(), "target": torch.randn(8, 3).double() * 5 + 10}
    for name in ("source", "target", "target"):
        dy = torch.randn(8, 3).double()
        leaf = batches[name].clone().requires_grad_()
        y = layer(leaf, domain=name)
        y.backward(dy)
        expected = oracle.train(batches[name], dy)
        close(y, expected.y, torch.float64)
        close(leaf.grad, expected.dx, torch.float64)
    for name, count in (("source", 1), ("target", 2)):
        mean, var = oracle.running([oracle.moments(batches[name])] * count)
        close(layer.domains[name].running_mean, mean, torch.float64)
        close(layer.domains[name].running_var, var, torch.float64)
    layer.eval()
    for name, x in batches.items():
        found = layer.domains[name]
        close(layer(x, domain=name), oracle.normalise(x, found.running_mean, found.running_var), torch.float64)


def test_weights_are_one():
    layer = _layer()
    assert [name for name, _ in layer.named_parameters()] == ["domains.source.weight", "domains.source.bias"]
    for name in DOMAINS:
        layer(torch.randn(8, 3).double(), domain=name).square().sum().backward()
    a, b = layer.domains["source"], layer.domains["target"]
    assert a.weight is b.weight
    assert a.bias is b.bias
    expected = 2 * 2 * 8 * torch.ones(3).double()  # of each domain 2 * sum(x_hat^2)
    torch.testing.assert_close(a.weight.grad, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.to(torch.float32),
        lambda layer: copy.deepcopy(layer),
        lambda layer: layer.to("meta").to_empty(device="cpu"),
        lambda layer: _loaded(layer, assign=True),
        lambda layer: _loaded(layer, assign=False),
    ],
    ids=["to", "deepcopy", "to_empty", "assign", "load"],
)
def test_weights_stay_one(change):
    layer = change(_layer())
    assert layer.domains["source"].weight is layer.domains["target"].weight
    assert layer.domains["source"].bias is layer.domains["target"].bias


def _loaded(layer, assign):
    layer.load_state_dict(_layer().state_dict(), assign=assign)
    return layer


def test_checkpoints_of_torch_nn_load_into_every_domain_and_go_back():
    old = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    for value in old.state_dict().values():
        value.copy_(torch.rand(value.shape) + 3)
    new = nn.Sequential(DomainBatchNorm(3, domains=DOMAINS), nn.ReLU())
    assert str(new.load_state_dict(old.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(2, 3, 4, 4)
    for name in DOMAINS:
        with use_domain(new, name):
            torch.testing.assert_close(new.eval()(x), old.eval()(x))
        nn.BatchNorm2d(3).load_state_dict(new[0].domains[name].state_dict())


def test_use_domain_holds_for_a_whole_model_and_ends_after_errors():
    model = nn.Sequential(nn.Linear(2, 3), _layer(), nn.ReLU(), _layer()).double()
    model[3].domain = "target"
    with use_domain(model, "target"):
        assert [model[1].domain, model[3].domain] == ["target", "target"]
    assert [model[1].domain, model[3].domain] == ["source", "target"]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), use_domain(model, "target"):
        model(torch.randn(4, 7).double())
    assert [model[1].domain, model[3].domain] == ["source", "target"]


def test_compiled_for_each_domain():
    torch._dynamo.reset()
    layer, plain = _layer(), _layer()
    call = torch.compile(layer, fullgraph=True, backend="eager")
    for name in ("source", "target", "source"):
        layer.domain = plain.domain = name
        x = torch.randn(6, 3).double()
        torch.testing.assert_close(call(x), plain(x))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


def test_bad_names_get_clear_errors():
    for domains in ((), ("a", "a"), "source", None):
        with pytest.raises(ArgumentError, match="at least one name and none twice"):
            DomainBatchNorm(3, domains=domains)
    for name in ("a.b", "", "pop"):
        with pytest.raises(ArgumentError, match="must be a plain word"):
            DomainBatchNorm(3, domains=[name])
    layer = _layer()
    with pytest.raises(ArgumentError, match="must be one of 'source', 'target'; got 'dusk'"):
        layer.domain = "dusk"
    with pytest.raises(ArgumentError, match="must be one of 'source', 'target'; got 'dusk'"):
        layer(torch.randn(4, 3).double(), domain="dusk")
    with (
        pytest.raises(ArgumentError, match="there is no DomainBatchNorm in this BatchNorm"),
        use_domain(BatchNorm(3), "a"),
    ):
        pass
