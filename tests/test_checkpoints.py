"""Checkpoints of torch.nn's layers into each layer of the family and back, by state_dict alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm import (
    BatchNorm,
    BatchRenorm,
    DecorrelatedBatchNorm,
    DomainBatchNorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    SyncBatchNorm,
)

C = 6
FAMILY = {
    "BatchNorm": lambda **options: BatchNorm(C, **options),
    "SyncBatchNorm": lambda **options: SyncBatchNorm(C, **options),
    "GhostBatchNorm": lambda **options: GhostBatchNorm(C, ghost_size=4, **options),
    "BatchRenorm": lambda **options: BatchRenorm(C, **options),
    "DecorrelatedBatchNorm": lambda **options: DecorrelatedBatchNorm(C, group_size=3, **options),
    "FrozenBatchNorm": lambda **options: FrozenBatchNorm(C, **options),
    "DomainBatchNorm": lambda **options: DomainBatchNorm(C, domains=("source", "target"), **options),
}
THEIRS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]


def _trained(theirs, **options):
    layer = theirs(C, **options)
    with torch.no_grad():
        for value in layer.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
            else:
                value.fill_(7)
    return layer.eval()


def _input(theirs):
    rank = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: 2}[theirs]
    return torch.randn(5, C, *(3,) * rank)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("theirs", THEIRS)
@pytest.mark.parametrize("name", FAMILY)
def test_a_torch_checkpoint_loads_by_state_dict_and_evaluates_the_same(name, theirs, affine):
    old, x = _trained(theirs, affine=affine), _input(theirs)
    ours = FAMILY[name](affine=affine)
    assert str(ours.load_state_dict(old.state_dict())) == "<All keys matched successfully>"
    torch.testing.assert_close(ours.eval()(x), old(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("theirs", THEIRS)
@pytest.mark.parametrize("name", FAMILY)
def test_and_goes_back_by_state_dict_but_for_whitening(name, theirs):
    old, x = _trained(theirs), _input(theirs)
    ours = FAMILY[name]()
    ours.load_state_dict(old.state_dict())
    state = ours.domains["target"].state_dict() if name == "DomainBatchNorm" else ours.state_dict()
    back = theirs(C).eval()
    if name == "DecorrelatedBatchNorm":
        with pytest.raises(RuntimeError, match=r"(?s)Missing key.*running_var"):
            back.load_state_dict(state)
        return
    assert str(back.load_state_dict(state)) == "<All keys matched successfully>"
    torch.testing.assert_close(back.state_dict(), old.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(back(x), old(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILY)
def test_a_checkpoint_of_a_whole_network_loads_with_other_layers_in_it(name):
    old = nn.Sequential(nn.Conv2d(3, C, 3), _trained(nn.BatchNorm2d), nn.ReLU(), nn.Conv2d(C, 2, 1)).eval()
    ours = nn.Sequential(nn.Conv2d(3, C, 3), FAMILY[name](), nn.ReLU(), nn.Conv2d(C, 2, 1)).eval()
    ours.load_state_dict(old.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours(x), old(x), rtol=1e-5, atol=1e-5)
