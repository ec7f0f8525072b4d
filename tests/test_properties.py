"""Properties that hold for any data, searched with Hypothesis."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from batchnorm import BatchNorm, FeatureNormalization, Moments, batch_norm
from batchnorm.stats.population import population

settings.register_profile(
    "suite",
    max_examples=30,
    deadline=None,
    derandomize=True,  # the suite gives the same answer on each run
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("suite")

values = st.floats(-1e6, 1e6, allow_nan=False, width=32)
tables = hnp.arrays(np.float64, st.tuples(st.integers(2, 25), st.integers(1, 4)), elements=values)
kinds = st.sampled_from([np.asarray, torch.as_tensor])


def _assert_same(a, b, scale):
    """Equal to rounding in float64, beside the size of the values."""
    np.testing.assert_allclose(np.asarray(a.mean), np.asarray(b.mean), rtol=1e-9, atol=1e-12 * scale)
    np.testing.assert_allclose(np.asarray(a.var), np.asarray(b.var), rtol=1e-9, atol=1e-12 * scale**2)
    np.testing.assert_array_equal(np.asarray(a.count), np.asarray(b.count))


def _scale(x):
    return max(float(np.abs(x).max(initial=0)), 1e-30)


@given(tables, st.lists(st.integers(0, 25), max_size=5), kinds)
def test_statistics_do_not_depend_on_how_the_data_is_split(x, cuts, kind):
    parts = [Moments.of(kind(part), 0) for part in np.split(x, sorted(min(cut, len(x)) for cut in cuts))]
    _assert_same(parts[0].merge(*parts[1:]), Moments.of(kind(x), 0), _scale(x))


@given(tables, st.data(), kinds)
def test_merge_is_associative_and_commutative(x, data, kind):
    first, second = sorted((data.draw(st.integers(0, len(x))), data.draw(st.integers(0, len(x)))))
    a, b, c = (Moments.of(kind(part), 0) for part in np.split(x, [first, second]))
    scale = _scale(x)
    _assert_same(a.merge(b).merge(c), a.merge(b.merge(c)), scale)
    _assert_same(a.merge(b), b.merge(a), scale)
    _assert_same(Moments.merge(a, b, c), a.merge(b).merge(c), scale)


@given(tables, st.randoms(use_true_random=False), kinds)
def test_order_does_not_matter(x, random, kind):
    order = list(range(len(x)))
    random.shuffle(order)
    _assert_same(Moments.of(kind(x[order]), 0), Moments.of(kind(x), 0), _scale(x))


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(1, 3), st.integers(1, 5)), elements=values), kinds
)
def test_moments_of_float32_are_those_of_float64(x, kind):
    mean, var, count = oracle.moments(x)
    found = Moments.of(kind(x), (0, 2))
    scale = _scale(x)
    np.testing.assert_allclose(np.asarray(found.mean), mean, rtol=1e-6, atol=1e-7 * scale)
    np.testing.assert_allclose(np.asarray(found.var), var, rtol=1e-5, atol=1e-13 * scale**2)
    assert (np.asarray(found.var) >= 0).all()
    assert (count == found.count).all()


@given(tables, st.data(), kinds)
def test_a_mask_is_the_same_as_leaving_out(x, data, kind):
    keep = data.draw(hnp.arrays(np.bool_, (len(x), 1)))
    masked = Moments.of(kind(np.where(keep, x, np.nan)), 0, kind(keep))
    _assert_same(masked, Moments.of(kind(x[keep[:, 0]]), 0), _scale(x))


@given(tables, st.lists(st.integers(1, 24), max_size=4), kinds)
def test_population_is_the_variance_of_everything(x, cuts, kind):
    parts = np.split(x, sorted(min(cut, len(x)) for cut in cuts))
    found = population([Moments.of(kind(part), 0) for part in parts])
    scale = _scale(x)
    np.testing.assert_allclose(np.asarray(found.var), x.var(0, ddof=1), rtol=1e-9, atol=1e-12 * scale**2)


shapes = st.tuples(st.integers(2, 8), st.integers(1, 4), st.integers(1, 5))


def _activations(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(shapes, st.integers(0, 99), st.floats(0.01, 100), st.floats(-100, 100))
def test_scale_and_offset_of_the_input_do_not_matter(shape, seed, scale, offset):
    x = _activations(shape, seed)
    torch.testing.assert_close(
        batch_norm(x * scale + offset, eps=0.0)[0], batch_norm(x, eps=0.0)[0], rtol=1e-6, atol=1e-8
    )


@given(shapes, st.integers(0, 99), st.sampled_from([None, "relu", "gelu", "tanh"]))
def test_the_gradient_sums_to_zero_and_does_not_see_the_scale(shape, seed, activation):
    """BN(a x + b) is constant in a and b, so dx is orthogonal to 1 and, with eps = 0, to x."""
    x = _activations(shape, seed).requires_grad_()
    y, moments = batch_norm(x, eps=0.0, activation=activation)
    (dx,) = torch.autograd.grad(y, x, _activations(shape, seed + 1))
    size = x.numel() * moments.var.rsqrt()  # of the terms that cancel
    assert (dx.sum((0, 2)).abs() < 1e-11 * size).all()
    assert ((dx * x).sum((0, 2)).abs() < 1e-11 * size * x.abs().max()).all()


@given(shapes, st.integers(0, 99))
def test_the_output_has_mean_zero_and_variance_one(shape, seed):
    x = _activations(shape, seed) * 7 + 3
    y, _ = batch_norm(x, eps=0.0)
    again = Moments.of(y, (0, 2))
    torch.testing.assert_close(again.mean, torch.zeros_like(again.mean), rtol=0, atol=1e-12)
    torch.testing.assert_close(again.var, torch.ones_like(again.var))
    torch.testing.assert_close(batch_norm(y, eps=0.0)[0], y)


@given(st.integers(1, 5), st.data(), st.integers(0, 99))
def test_any_choice_of_channel_axes_is_the_oracles(rank, data, seed):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)))
    channels = tuple(sorted(data.draw(st.sets(st.integers(0, rank - 1), min_size=1))))
    values = int(np.prod([size for axis, size in enumerate(shape) if axis not in channels]))
    assume(values > 1)
    x, dy = _activations(shape, seed), _activations(shape, seed + 1)
    x.requires_grad_()
    given = tuple(axis - rank * data.draw(st.booleans()) for axis in data.draw(st.permutations(channels)))
    y, moments = batch_norm(x, channel_axis=given)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = oracle.train(x.detach().numpy(), dy.numpy(), channels=channels)
    np.testing.assert_allclose(y.detach(), expected.y, atol=1e-9)
    np.testing.assert_allclose(dx, expected.dx, atol=1e-6)
    np.testing.assert_allclose(moments.var, expected.var, atol=1e-12)


@given(shapes, st.integers(0, 99), st.data())
def test_padding_does_not_matter(shape, seed, data):
    x = _activations(shape, seed)
    lengths = data.draw(st.lists(st.integers(0, shape[2]), min_size=shape[0], max_size=shape[0]))
    mask = torch.arange(shape[2]) < torch.tensor(lengths).unsqueeze(1)
    assume(int(mask.sum()) > 1)
    junk = data.draw(st.sampled_from([0.0, 1e30, float("nan"), float("-inf")]))
    y, moments = batch_norm(x.masked_fill(~mask.unsqueeze(1), junk), mask=mask)
    flat, exact = batch_norm(x.transpose(1, 2)[mask])
    torch.testing.assert_close(y.transpose(1, 2)[mask], flat)
    torch.testing.assert_close(moments.var, exact.var)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), st.integers(0, 99), st.sampled_from([None, 0.0, 0.3, 1.0]))
def test_running_statistics_are_the_oracles(sizes, seed, momentum):
    layer = BatchNorm(3, momentum=momentum, dtype=torch.float64)
    batches = []
    for i, size in enumerate(sizes):
        x = _activations((size, 3), seed + i) + i
        layer(x)
        batches.append(oracle.moments(x.numpy()))
    mean, var = oracle.running(batches, momentum)
    np.testing.assert_allclose(layer.running_mean, mean, atol=1e-12)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-12)
    assert int(layer.num_batches_tracked) == len(sizes)


@given(tables, st.lists(st.integers(0, 25), max_size=4), st.booleans())
@pytest.mark.filterwarnings("error")
def test_features_do_not_depend_on_the_split(x, cuts, whiten):
    parts = np.split(x, sorted(min(cut, len(x)) for cut in cuts))
    whole = FeatureNormalization(x.shape[1], whiten=whiten).adapt(x)
    split = FeatureNormalization(x.shape[1], whiten=whiten).adapt(parts)
    scale = _scale(x)
    np.testing.assert_allclose(split.mean, whole.mean, rtol=1e-9, atol=1e-12 * scale)
    np.testing.assert_allclose(split.var, whole.var, rtol=1e-9, atol=1e-12 * scale**2)
    y = whole(torch.from_numpy(x))
    assert y.isfinite().all()
    assert (y.pow(2).mean(0) < 1 + 1e-3).all()
