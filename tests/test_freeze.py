"""freeze() and unfreeze(): nothing moves, and everything comes back. parameter_groups()."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import freeze, parameter_groups, unfreeze
from batchnorm.errors import ArgumentError

NORMS = [nn.BatchNorm2d, batchnorm.BatchNorm2d]


def _model(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4, momentum=None))


def _train(model, optimizer, steps=3, **zero_grad):
    for _ in range(steps):
        optimizer.zero_grad(**zero_grad)
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()


def _layers(model):
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith(("1.", "4."))}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_freezing_that_does_not_freeze(norm, set_to_none, optimizer):
    """After train(), with momentum and weight decay left over in the optimizer: bit for bit the same."""
    model = _model(norm)
    arguments = {"SGD": {"momentum": 0.9}, "AdamW": {}}[optimizer]
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3, weight_decay=0.1, **arguments)
    _train(model, optimizer)
    same, report = freeze(model)
    assert same is model
    assert [layer.name for layer in report.layers] == ["1", "4"]
    before, conv = _layers(model), model[0].weight.detach().clone()
    model.train()
    assert not model[1].training
    _train(model, optimizer, set_to_none=set_to_none)
    torch.testing.assert_close(_layers(model), before, rtol=0, atol=0)
    assert not torch.equal(model[0].weight, conv)
    _, report = unfreeze(model)
    assert report.nothing_moved
    assert "2 layers unfrozen, 0 left alone; 0 moved while frozen" in str(report)
    _train(model, optimizer)
    after = _layers(model)
    assert all(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("norm", NORMS)
def test_every_setting_comes_back(norm):
    model = _model(norm)
    model[4].weight.requires_grad_(False)
    model[4].eval()
    plain = copy.deepcopy(model)
    freeze(model)
    freeze(model)
    unfreeze(model)
    for mine, other in zip(model.modules(), plain.modules(), strict=True):
        assert type(mine) is type(other)
        assert set(mine.__dict__) == set(other.__dict__)
        assert mine.training == other.training
    for name, parameter in plain.named_parameters():
        assert model.get_parameter(name).requires_grad == parameter.requires_grad
    assert model[4].momentum is None


def test_the_mode_is_the_one_of_a_layer_that_was_never_frozen():
    model = _model(nn.BatchNorm2d).eval()
    freeze(model)
    model.train()
    unfreeze(model, layers="1")
    assert (model[1].training, model[4].training) == (True, False)
    model.eval()
    unfreeze(model)
    assert not model[4].training


@pytest.mark.parametrize("norm", NORMS)
def test_copies_pickles_and_files_are_frozen_too(norm):
    model = _model(norm)
    freeze(model)
    x = torch.randn(2, 3, 8, 8)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        twin.train()
        torch.testing.assert_close(twin(x), model(x))
        assert not twin[1].training
        assert isinstance(twin[1], norm)
        _, report = unfreeze(twin)
        assert report.nothing_moved
        assert twin[1].training
        assert type(twin[1]) is norm
    assert not model[1].training  # the copy's mode is its own


def test_called_again_it_changes_nothing_and_says_what_moved():
    model = _model(nn.BatchNorm2d)
    freeze(model)
    with torch.no_grad():
        model[1].running_mean += 0.5
    _, report = freeze(model)
    assert not report.nothing_moved
    assert [layer.largest_change for layer in report.layers] == [0.5, 0.0]
    assert "1: moved by 0.5" in str(report)


def test_parameters_can_stay_trainable():
    model = _model(nn.BatchNorm2d)
    freeze(model, parameters=False)
    assert model[1].weight.requires_grad
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _train(model.train(), optimizer)
    _, report = unfreeze(model)
    assert report.nothing_moved  # the statistics; gamma and beta were not held
    assert not torch.equal(model[1].weight, torch.ones(4))


def test_some_layers_and_those_that_cannot_be_held():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    _, report = freeze(model)
    assert [(one.name, one.why) for one in report.skipped] == [
        ("1", "it keeps no running statistics and always uses the batch's")
    ]
    _, report = unfreeze(model)
    assert [(one.name, one.why) for one in report.skipped] == [("1", "it was not frozen")]
    with pytest.raises(ArgumentError, match="'head' is or contains no batch normalization layer"):
        freeze(model, layers=["head"])
    with pytest.raises(ArgumentError, match="Linear has no batch normalization layer"):
        unfreeze(nn.Linear(2, 2))


def test_frozen_models_compile_whole_and_are_traced_whole():
    model = _model(batchnorm.BatchNorm2d)
    freeze(model)
    x = torch.randn(2, 3, 8, 8)
    model.train()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    targets = [node.target for node in torch.fx.symbolic_trace(_frozen(nn.BatchNorm2d)).graph.nodes]
    assert "1" in targets


def _frozen(norm):
    model = _model(norm)
    freeze(model)
    return model


def test_state_dicts_do_not_know_about_freezing():
    model, plain = _frozen(nn.BatchNorm2d), _model(nn.BatchNorm2d)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())


def test_gamma_and_beta_are_kept_out_of_weight_decay():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        batchnorm.BatchNorm2d(4),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    model.append(nn.LayerNorm(2))
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    norms = (model[1], model[2], model[3], model[6])
    assert {id(p) for p in kept["params"]} == {id(p) for norm in norms for p in norm.parameters()}
    assert {id(p) for p in decayed["params"]} == {id(p) for layer in (model[0], model[5]) for p in layer.parameters()}
    decayed, kept = parameter_groups(model, 0.1, decays_biases=False)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[5].weight)}
    assert len(kept["params"]) == 10
    torch.optim.AdamW([decayed, kept])


def test_shared_parameters_are_in_one_group_once():
    first, second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    second.weight = first.weight
    decayed, kept = parameter_groups(nn.Sequential(first, second, first), 0.1)
    assert (len(decayed["params"]), len(kept["params"])) == (0, 3)
    with pytest.raises(ArgumentError, match="weight_decay must be a number of at least 0, got -1"):
        parameter_groups(first, -1)
    with pytest.raises(ArgumentError, match=r"model must be a torch.nn.Module, got list"):
        parameter_groups([first], 0.1)
