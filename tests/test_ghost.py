"""GhostBatchNorm against the oracle, ghost by ghost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from cases import close

from batchnorm import BatchNorm, GhostBatchNorm
from batchnorm.errors import ArgumentError, ShapeError


def _parts(n, size, values_each):
    """Where the ghosts of a batch begin and end: written from the description."""
    edges = [*range(0, n, size), n]
    if len(edges) > 2 and (edges[-1] - edges[-2]) * values_each == 1:
        del edges[-2]
    return list(pairwise(edges))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    ("shape", "channels", "size"),
    [
        ((12, 3), (1,), 4),
        ((14, 3), (1,), 4),
        ((13, 3), (1,), 4),  # the rest is one value: it joins the ghost before it
        ((3, 3), (1,), 8),
        ((9, 3, 5), (1,), 4),  # the rest is one example with five values
        ((7, 3, 4, 2), (1,), 2),
        ((7, 4, 3), (2,), 3),
        ((2, 10, 3), (0, 2), 4),  # two networks in one tensor
    ],
    ids=str,
)
def test_each_ghost_is_a_batch_of_its_own(shape, channels, size, masked):
    generator = np.random.default_rng(0)
    x, dy, residual = (generator.normal(1, 2, shape) for _ in range(3))
    others = oracle.others(len(shape), channels)
    mask = generator.random([shape[a] for a in others]) > 0.2 if masked else None
    sizes = tuple(shape[a] for a in channels)
    axis = channels if len(channels) > 1 else channels[0]
    layer = GhostBatchNorm(
        sizes if len(sizes) > 1 else sizes[0],
        ghost_size=size,
        activation="tanh",
        channel_axis=axis,
        dtype=torch.float64,
    )
    weight, bias = generator.normal(size=sizes), generator.normal(size=sizes)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        layer.bias.copy_(torch.as_tensor(bias))
    leaf, extra = (torch.tensor(t, requires_grad=True) for t in (x, residual))
    y = layer(leaf, extra, mask=None if mask is None else torch.as_tensor(mask))
    y.backward(torch.as_tensor(dy))

    n_axis = others[0]
    values_each = int(np.prod([shape[a] for a in others[1:]]))
    dweight = dbias = 0
    for start, stop in _parts(shape[n_axis], size, values_each):

        def cut(t, start=start, stop=stop):
            return np.moveaxis(np.moveaxis(t, n_axis, 0)[start:stop], 0, n_axis)

        part = oracle.train(
            cut(x),
            cut(dy),
            weight,
            bias,
            channels=channels,
            activation="tanh",
            residual=cut(residual),
            mask=None if mask is None else mask[start:stop],
        )
        close(y.narrow(n_axis, start, stop - start), part.y, torch.float64)
        close(leaf.grad.narrow(n_axis, start, stop - start), part.dx, torch.float64)
        close(extra.grad.narrow(n_axis, start, stop - start), part.dresidual, torch.float64)
        dweight, dbias = dweight + part.dweight, dbias + part.dbias
    close(layer.weight.grad, dweight, torch.float64)
    close(layer.bias.grad, dbias, torch.float64)
    mean, var = oracle.running([oracle.moments(x, channels, mask)])
    close(layer.running_mean, mean, torch.float64)
    close(layer.running_var, var, torch.float64)
    assert int(layer.num_batches_tracked) == 1


def test_the_running_statistics_are_those_of_a_plain_layer():
    ghost, plain = GhostBatchNorm(3, ghost_size=5, dtype=torch.float64), BatchNorm(3, dtype=torch.float64)
    for n in (12, 16, 7):
        x = torch.randn(n, 3, 2, dtype=torch.float64) * torch.arange(n)[:, None, None]
        ghost(x), plain(x)
    torch.testing.assert_close(ghost.state_dict(), plain.state_dict())
    torch.testing.assert_close(ghost.eval()(x), plain.eval()(x))


def test_a_ghost_as_large_as_the_batch_is_batch_norm():
    x = torch.randn(6, 3, 4)
    assert torch.equal(GhostBatchNorm(3, ghost_size=100)(x), BatchNorm(3)(x))


def test_checkpoints_of_torch_nn_load_and_go_back():
    old = torch.nn.BatchNorm2d(3)
    old.running_mean.normal_()
    layer = GhostBatchNorm(3)
    layer.load_state_dict(old.state_dict())
    torch.nn.BatchNorm2d(3).load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(layer.eval()(x), old.eval()(x))


def test_bad_sizes_get_clear_errors():
    with pytest.raises(ArgumentError, match="ghost_size must be an int of at least 1 example, got 0"):
        GhostBatchNorm(3, ghost_size=0)
    with pytest.raises(ArgumentError, match="ghost_size must be an int of at least 1 example, got '8'"):
        GhostBatchNorm(3, ghost_size="8")
    with pytest.raises(ShapeError, match="more than 1 value per channel"):
        GhostBatchNorm(3, ghost_size=1)(torch.randn(4, 3))
    with pytest.raises(ShapeError, match="more than 1 value per channel"):
        GhostBatchNorm(3, ghost_size=2)(torch.randn(4, 3), mask=torch.tensor([True, True, True, False]))


def test_compiled_for_batches_of_any_size():
    layer = GhostBatchNorm(3, ghost_size=4)
    call = torch.compile(layer, fullgraph=True, backend="eager")
    for n in (8, 10, 13):
        x = torch.randn(n, 3)
        torch.testing.assert_close(call(x), GhostBatchNorm(3, ghost_size=4)(x))
