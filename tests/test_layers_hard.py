"""Layers on hard data: NaN, infinity, large means, half precision, masks, channel axes, and what a bug once was."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import oracle
import pytest
import torch
from cases import ACTIVATIONS, close, make_parameters
from torch import nn

from batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, GhostBatchNorm
from batchnorm.errors import StatisticsWarning

NAN, INF = float("nan"), float("inf")


def _state(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def _assert_unchanged(layer, before):
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


# Batches that are not finite


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("poison", [NAN, INF, -INF, 3e38], ids=str)
def test_a_batch_that_is_not_finite_leaves_all_buffers_and_warns_once(poison, momentum):
    layer = BatchNorm1d(3, momentum=momentum)
    layer(torch.randn(8, 3))
    before = _state(layer)
    bad = torch.randn(8, 3)
    bad[3, 1] = poison
    with pytest.warns(StatisticsWarning, match=r"BatchNorm1d\(3.* not finite .*stay as they were"):
        layer(bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            layer(bad)
        layer.eval()(bad)
    _assert_unchanged(layer, before)
    layer.train()(torch.randn(8, 3))
    assert int(layer.num_batches_tracked) == 2


def test_each_layer_warns_for_itself():
    first, second = BatchNorm1d(2), BatchNorm1d(2)
    bad = torch.full((4, 2), NAN)
    for layer in (first, second):
        with pytest.warns(StatisticsWarning):
            layer(bad)


def test_untracked_layers_do_not_warn():
    layer = BatchNorm1d(2, track_running_stats=False)
    assert layer(torch.full((4, 2), NAN)).isnan().all()


def test_a_bad_batch_gives_torchs_output_and_gradients():
    ours, theirs = BatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(8, 3)
    x[0, 0] = INF
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = layer(leaf)
        y.sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0][:, 1:], results[1][0][:, 1:])
    assert results[0][0][0, 0].isnan() == results[1][0][0, 0].isnan()
    torch.testing.assert_close(results[0][1][:, 1:], results[1][1][:, 1:], rtol=1e-4, atol=1e-5)


def test_statistics_recover_after_bad_batches_as_if_they_had_not_come():
    clean, dirty = BatchNorm2d(3, momentum=None), BatchNorm2d(3, momentum=None)
    for step in range(6):
        x = torch.randn(4, 3, 2, 2) + step
        clean(x), dirty(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dirty(torch.full((4, 3, 2, 2), INF))
    _assert_unchanged(dirty, _state(clean))


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_modules_converge_to_the_true_mean(dtype):
    """torch.nn's running mean stalls at 96 in bfloat16: a step of 0.1 * 4 rounds to none."""
    layer = BatchNorm1d(2).to(dtype)
    for _ in range(200):
        layer((torch.randn(64, 2) + 100).to(dtype))
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 100.0), rtol=2e-3, atol=0)
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize(
    "convert",
    [
        lambda layer: layer.bfloat16(),
        lambda layer: layer.half(),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.to(dtype=torch.float16),
        lambda layer: nn.Sequential(layer).bfloat16()[0],
        lambda layer: layer.bfloat16().float(),
        lambda layer: layer.half().bfloat16(),
        lambda layer: copy.deepcopy(layer).half(),
    ],
)
def test_conversion_keeps_float32_statistics_unrounded(convert):
    layer = BatchNorm1d(3)
    layer(torch.randn(50, 3) * 1.2345 + 1.23456)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    layer = convert(layer)
    assert torch.equal(layer.running_mean, mean)
    assert torch.equal(layer.running_var, var)
    assert layer.num_batches_tracked.dtype == torch.int64


def test_double_modules_have_double_statistics():
    assert BatchNorm1d(3).double().running_mean.dtype == torch.float64
    assert BatchNorm1d(3, dtype=torch.float64).running_var.dtype == torch.float64
    assert BatchNorm1d(3).double().half().running_mean.dtype == torch.float32
    assert BatchNorm1d(3, dtype=torch.bfloat16).running_mean.dtype == torch.float32
    assert BatchNorm1d(3, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16], ids=str)
def test_a_bfloat16_checkpoint_of_torch_loads(assign, into):
    source = nn.BatchNorm1d(3)
    source(torch.randn(20, 3))
    source.bfloat16()
    layer = BatchNorm1d(3, dtype=into)
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert torch.equal(layer.running_mean, source.running_mean.float())
    assert layer.weight.dtype == (torch.bfloat16 if assign else into)
    x = torch.randn(5, 3).to(layer.weight.dtype)
    close(layer.eval()(x), source.eval()(x.bfloat16()), torch.bfloat16)
    source.load_state_dict(layer.state_dict())


def test_float16_input_whose_squares_overflow():
    x = (torch.randn(64, 3) * 1000 + 30000).half()
    y = BatchNorm1d(3).half()(x)
    close(y, oracle.train(x.double().numpy(), np.zeros((64, 3))).y, torch.float16)


# Large means


def test_mean_1e4_through_the_layers():
    x = (torch.randn(512, 3, dtype=torch.float64) + 1e4).float()
    layer = BatchNorm1d(3, momentum=1.0)
    y = layer(x)
    mean, var, _ = oracle.moments(x.numpy())
    np.testing.assert_allclose(layer.running_var, var * 512 / 511, rtol=1e-5)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-7)
    np.testing.assert_allclose(y.detach().numpy(), oracle.normalise(x.numpy(), mean, var), atol=2e-5)
    exact = oracle.normalise(x.numpy(), layer.running_mean.numpy(), layer.running_var.numpy())
    np.testing.assert_allclose(layer.eval()(x).detach().numpy(), exact, atol=1e-5)


def test_many_steps_at_mean_1e4_keep_the_variance():
    layer = BatchNorm2d(2)
    for _ in range(100):
        layer(torch.randn(8, 2, 8, 8) + 1e4)
    torch.testing.assert_close(layer.running_var, torch.ones(2), rtol=0.1, atol=0)
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 1e4), rtol=1e-4, atol=0)


# Channel axes


CHANNEL_AXES = [
    (4, -1, (6, 5, 4), (2,)),
    (4, 2, (6, 5, 4), (2,)),
    (6, 0, (6, 5, 4), (0,)),
    (4, -1, (6, 4), (1,)),
    (4, 1, (6, 4), (1,)),
    (3, 1, (2, 3, 2, 2, 2, 2), (1,)),
    ((3, 4), (0, 2), (3, 6, 4), (0, 2)),
    ((3, 4), (0, -1), (3, 6, 4), (0, 2)),
    ((2, 4), (1, 3), (3, 2, 5, 4), (1, 3)),
    ((3, 2), (0, 1), (3, 2, 5, 4), (0, 1)),
    ((5,), (1,), (3, 5, 2), (1,)),
]


@pytest.mark.parametrize(("features", "axis", "shape", "channels"), CHANNEL_AXES, ids=str)
def test_channel_axes(features, axis, shape, channels):
    layer = BatchNorm(features, channel_axis=axis, dtype=torch.float64, momentum=None)
    sizes = tuple(shape[a] for a in channels)
    weight, bias = make_parameters(sizes, torch.float64)
    assert layer.weight.shape == layer.bias.shape == layer.running_mean.shape == layer.running_var.shape == sizes
    with torch.no_grad():
        layer.weight.copy_(weight), layer.bias.copy_(bias)
    batches = []
    for step in range(3):
        x = (torch.randn(shape, dtype=torch.float64) + step).requires_grad_()
        dy = torch.randn(shape, dtype=torch.float64)
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        expected = oracle.train(x.detach().numpy(), dy.numpy(), weight.numpy(), bias.numpy(), channels=channels)
        close(y, expected.y, torch.float64)
        close(x.grad, expected.dx, torch.float64)
        close(layer.weight.grad, expected.dweight, torch.float64)
        close(layer.bias.grad, expected.dbias, torch.float64)
        batches.append((expected.mean, expected.var, expected.count))
    mean, var = oracle.running(batches, None)
    close(layer.running_mean, mean, torch.float64)
    close(layer.running_var, var, torch.float64)
    frozen = oracle.normalise(x.detach().numpy(), mean, var, weight.numpy(), bias.numpy(), channels=channels)
    close(layer.eval()(x), frozen, torch.float64)
    twin = BatchNorm(features, channel_axis=axis, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    close(twin.eval()(x), frozen, torch.float64)


@pytest.mark.parametrize("arguments", [{"affine": False}, {"bias": False}, {"track_running_stats": False}], ids=str)
def test_channel_axes_with_every_argument(arguments):
    layer = BatchNorm((3, 4), channel_axis=(0, 2), **arguments)
    x = torch.randn(3, 6, 4)
    close(layer(x), oracle.train(x.numpy(), x.numpy(), channels=(0, 2)).y, torch.float32)
    assert layer.eval()(x).isfinite().all()


def test_the_cumulative_average_of_a_double_layer_is_double():
    """1 / num_batches_tracked was float32, and the third batch's weight 0.333333343."""
    layer = BatchNorm1d(2, momentum=None, dtype=torch.float64)
    batches = [torch.randn(5, 2, dtype=torch.float64) for _ in range(3)]
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.running_mean, torch.cat(batches).mean(0), rtol=1e-14, atol=1e-15)


def test_channels_last_axis_is_channels_first_transposed():
    first, last = BatchNorm1d(5), BatchNorm(5, channel_axis=-1)
    for _ in range(3):
        x = torch.randn(4, 5, 7)
        torch.testing.assert_close(first(x), last(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(first.state_dict(), last.state_dict())


# Activation, residual


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_activation_and_residual_are_those_of_separate_layers(activation, training):
    fused, plain = BatchNorm2d(3, activation=activation), nn.BatchNorm2d(3)
    function = getattr(torch.nn.functional, activation) if activation else lambda z: z
    fused.train(training), plain.train(training)
    x, residual = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    grads = []
    for call in (lambda x, r: fused(x, r), lambda x, r: function(plain(x) + r)):
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = call(*leaves)
        y.pow(2).sum().backward()
        grads.append((y.detach(), leaves[0].grad, leaves[1].grad))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(fused.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-3)


def test_a_residual_that_is_the_input():
    layer, plain = BatchNorm1d(3, activation="relu"), nn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    grads = []
    for call in (lambda x: layer(x, x), lambda x: torch.relu(plain(x) + x)):
        leaf = x.clone().requires_grad_()
        call(leaf).pow(2).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_residual_that_is_broadcast_or_of_another_layout():
    layer = BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    residual = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x, residual), layer(x, residual.contiguous()))
    expanded = torch.randn(1, 3, 1, 1).expand(4, 3, 5, 5)
    torch.testing.assert_close(layer(x, expanded), layer(x, expanded.contiguous()))


# Masks


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("garbage", [NAN, INF, 1e30, -3e38], ids=str)
def test_padding_stays_out_of_the_running_statistics(garbage, momentum):
    padded, exact = BatchNorm1d(3, momentum=momentum), BatchNorm1d(3, momentum=momentum)
    for step in range(4):
        lengths = torch.randint(1, 8, (5,)) + (step == 0)
        mask = torch.arange(8) < lengths.unsqueeze(1)
        x = torch.randn(5, 3, 8) + step
        flat = x.transpose(1, 2)[mask]
        x = x.masked_fill(~mask.unsqueeze(1), garbage).requires_grad_()
        y = padded(x, mask=mask)
        torch.testing.assert_close(y.transpose(1, 2)[mask], exact(flat), rtol=1e-5, atol=1e-5)
        y.transpose(1, 2)[mask].pow(2).sum().backward()
        assert x.grad.isfinite().all()
    torch.testing.assert_close(padded.state_dict(), exact.state_dict())


def test_a_mask_that_leaves_nothing_counts_the_batch_and_nothing_else():
    """As an empty batch does in torch.nn."""
    layer = BatchNorm1d(3)
    y = layer(torch.randn(4, 3), mask=torch.zeros(4, dtype=torch.bool))
    assert y.isfinite().all()
    assert (layer.running_mean.tolist(), layer.running_var.tolist()) == ([0.0] * 3, [1.0] * 3)
    assert int(layer.num_batches_tracked) == 1


def test_a_mask_that_leaves_one_value_is_an_error_and_changes_nothing():
    layer = BatchNorm1d(3)
    before = _state(layer)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(4, 3), mask=torch.tensor([False, True, False, False]))
    _assert_unchanged(layer, before)
    assert layer.eval()(torch.randn(4, 3), mask=torch.tensor([False, True, False, False])).shape == (4, 3)


def test_nan_that_counts_is_not_hidden_by_a_mask():
    layer = BatchNorm1d(2)
    x = torch.randn(6, 2)
    x[0, 0] = NAN
    with pytest.warns(StatisticsWarning):
        assert layer(x, mask=torch.arange(6) < 4)[:, 0].isnan().all()


@pytest.mark.parametrize("axis", [-1, (0, 2)])
def test_mask_with_other_channel_axes(axis):
    features = (3, 4) if isinstance(axis, tuple) else 4
    layer = BatchNorm(features, channel_axis=axis, momentum=1.0, dtype=torch.float64)
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    mask = (
        torch.rand(6 if isinstance(axis, tuple) else (3, 6)) > 0.3
        if not isinstance(axis, tuple)
        else torch.arange(6) < 4
    )
    channels = (0, 2) if isinstance(axis, tuple) else (2,)
    expected = oracle.train(x.numpy(), x.numpy(), channels=channels, mask=mask.numpy())
    close(layer(x, mask=mask), expected.y, torch.float64)
    close(layer.running_var, expected.var * expected.count / (expected.count - 1), torch.float64)


# State, and when it changes


def test_an_error_leaves_the_state():
    layer = BatchNorm1d(3)
    before = _state(layer)
    for bad in (torch.randn(4, 5), torch.randn(1, 3), torch.ones(4, 3, dtype=torch.int64), torch.randn(4, 3).double()):
        with pytest.raises((ValueError, TypeError)):
            layer(bad)
    _assert_unchanged(layer, before)


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "enable_grad"])
def test_statistics_follow_in_every_grad_mode(context):
    layer, reference = BatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(5, 3)
    with getattr(torch, context)():
        torch.testing.assert_close(layer(x), reference(x))
        torch.testing.assert_close(layer.eval()(x), reference.eval()(x))
    torch.testing.assert_close(layer.running_var, reference.running_var)
    layer.train()(torch.randn(5, 3)).sum().backward()


def test_buffers_are_written_in_place():
    """EMA code, DDP and shared memory hold on to the tensors themselves."""
    layer = BatchNorm1d(3)
    held = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    pointers = [t.data_ptr() for t in held]
    layer(torch.randn(5, 3))
    assert [t.data_ptr() for t in layer.buffers()] == pointers
    assert int(held[2]) == 1
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def test_evaluation_changes_nothing():
    layer = BatchNorm3d(2)
    layer(torch.randn(2, 2, 2, 2, 2))
    before = _state(layer)
    layer.eval()(torch.full((2, 2, 2, 2, 2), NAN))
    layer(torch.randn(2, 2, 2, 2, 2))
    _assert_unchanged(layer, before)


def test_a_training_step_between_an_evaluation_and_its_backward():
    """torch.nn's gradient is that of the later statistics, silently."""
    layer = BatchNorm1d(3, eps=0.0)
    x = torch.randn(4, 3, requires_grad=True)
    y = layer.eval()(x)
    layer.train()(torch.randn(8, 3) * 9)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 3))


def test_in_place_operations_on_the_output():
    for shape, norm in (((6, 3), BatchNorm1d), ((6, 3, 4), BatchNorm1d), ((6, 3, 4, 4), BatchNorm2d)):
        for training in (True, False):
            layer = norm(3).train(training)
            x = torch.randn(shape)
            grads = []
            for is_in_place in (True, False):
                leaf = x.clone().requires_grad_()
                y = layer(leaf)
                y = y.add_(x).relu_() if is_in_place else (y + x).relu()
                y.pow(2).sum().backward()
                grads.append(leaf.grad)
            torch.testing.assert_close(*grads)


def test_threads_may_share_an_evaluated_layer():
    from concurrent.futures import ThreadPoolExecutor

    layer = BatchNorm1d(3).eval()
    x = torch.randn(8, 3, requires_grad=True)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: layer(x).sum().item(), range(16)))
    assert len(set(results)) == 1


def test_extra_repr_names_what_is_ours():
    assert "activation='relu'" in repr(BatchNorm1d(3, activation="relu"))
    assert "(3, 8), eps=1e-05" in repr(BatchNorm((3, 8), channel_axis=(0, 2)))
    assert "channel_axis=(0, 2)" in repr(BatchNorm((3, 8), channel_axis=(0, 2)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (BatchNorm(3, channel_axis=-1), (4, 5, 3)),
        (BatchNorm((2, 3), channel_axis=(0, 2)), (2, 4, 3)),
        (GhostBatchNorm(3, ghost_size=32), (2, 3, 4, 4)),
        (GhostBatchNorm(3, ghost_size=2), (2, 3, 4, 4)),
    ],
)
def test_output_is_no_view_that_an_inplace_activation_may_not_write_to(layer, shape, training):
    x = torch.randn(shape, requires_grad=True)
    layer.train(training)
    torch.relu_(layer(x)).sum().backward()
    found, x.grad = x.grad, None
    torch.relu(layer(x)).sum().backward()
    torch.testing.assert_close(found, x.grad)
