"""FrozenBatchNorm: what a trained layer is in evaluation, whatever happens to it."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from cases import close

from batchnorm import BatchNorm, BatchNorm2d, FrozenBatchNorm


def _trained():
    layer = torch.nn.BatchNorm2d(3)
    for _ in range(3):
        layer(torch.randn(4, 3, 5, 5) * 3 + 1)
    layer.weight.data.uniform_(0.5, 2)
    layer.bias.data.normal_()
    return layer.eval()


def _frozen(trained=None):
    layer = FrozenBatchNorm(3)
    layer.load_state_dict((trained or _trained()).state_dict())
    return layer


def test_checkpoints_of_torch_nn_load_and_go_back():
    trained = _trained()
    frozen = _frozen(trained)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(frozen(x), trained(x))
    back = torch.nn.BatchNorm2d(3)
    back.load_state_dict(frozen.state_dict())
    assert int(back.num_batches_tracked) == 3
    assert torch.equal(back.eval()(x), trained(x))


def test_values_and_gradients_are_the_oracles():
    frozen = _frozen().to(torch.float64)
    x, dy = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = frozen(leaf)
    y.backward(dy)
    state = {k: v.numpy() for k, v in frozen.state_dict().items()}
    expected = oracle.train(x, dy, state["weight"], state["bias"], given=(state["running_mean"], state["running_var"]))
    close(y, expected.y, torch.float64)
    close(leaf.grad, expected.dx, torch.float64)


def test_nothing_moves_in_training():
    frozen = _frozen()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), frozen, torch.nn.ReLU()).train()
    before = copy.deepcopy(frozen.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5, 5)).square().sum().backward()
        optimizer.step()
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, 5, 5) * 9], model)
    torch.testing.assert_close(frozen.state_dict(), before, rtol=0, atol=0)
    assert list(frozen.parameters()) == []


def test_one_value_a_channel_is_enough_in_training():
    assert _frozen().train()(torch.randn(1, 3)).shape == (1, 3)


def test_checkpoints_without_a_count_load_as_those_of_other_libraries():
    state = _trained().state_dict()
    del state["num_batches_tracked"]
    assert str(FrozenBatchNorm(3).load_state_dict(state)) == "<All keys matched successfully>"


@pytest.mark.parametrize("arguments", [{"affine": False}, {"bias": False}], ids=str)
def test_has_the_keys_of_the_layer_it_stands_for(arguments):
    theirs = BatchNorm(3, **arguments)
    frozen = FrozenBatchNorm(3, **arguments)
    frozen.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(frozen.state_dict())


def test_exported_as_torchs_operator():
    program = torch.export.export(_frozen(), (torch.randn(2, 3, 4, 4),))
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)


def test_gives_bit_for_bit_what_our_layer_gives_in_evaluation():
    trained = _trained()
    ours = BatchNorm2d(3, activation="relu")
    ours.load_state_dict(trained.state_dict())
    frozen = FrozenBatchNorm(3, activation="relu")
    frozen.load_state_dict(trained.state_dict())
    x, residual = torch.randn(2, 4, 3, 5, 5)
    assert torch.equal(frozen.train()(x, residual), ours.eval()(x, residual))
