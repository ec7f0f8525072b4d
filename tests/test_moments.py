from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import oracle
import pytest
import torch

from batchnorm import Moments
from batchnorm.errors import ArgumentError, DtypeError, ShapeError

KINDS = [pytest.param(np.asarray, id="numpy"), pytest.param(torch.as_tensor, id="torch")]
AXES = [0, 1, -1, (0, 1), (0, 2), (0, -1), (2, 1), (0, 1, 2), None]


def _values(shape=(4, 5, 6), seed=0, mean=0.0):
    return np.random.default_rng(seed).standard_normal(shape) + mean


def _plain(x, axes, keep=None):
    """Mean, var and count over `axes` from NumPy's own functions."""
    keep = np.ones(x.shape, bool) if keep is None else np.broadcast_to(keep, x.shape)
    axes = tuple(range(x.ndim)) if axes is None else axes
    wide = x.astype(np.float64)
    return wide.mean(axis=axes, where=keep), wide.var(axis=axes, where=keep), keep.sum(axis=axes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_any_axes(kind, axes, dtype):
    x = _values().astype(dtype)
    moments = Moments.of(kind(x), axes)
    mean, var, count = _plain(x, axes)
    np.testing.assert_allclose(np.asarray(moments.mean), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(moments.var), var, rtol=1e-5, atol=1e-6)
    assert np.asarray(moments.mean).dtype == np.asarray(moments.var).dtype == np.float64
    assert type(moments.count) is int
    assert moments.count == np.ravel(count)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [(0, 2), 1, None], ids=str)
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 1, 6), (6,), (5, 1), (1, 1, 1)], ids=str)
def test_mask_broadcasts(kind, axes, shape):
    x, keep = _values(), _values(shape, seed=1) > -0.5
    keep.flat[0] = True
    garbage = np.where(np.broadcast_to(keep, x.shape), x, np.nan)
    moments = Moments.of(kind(garbage), axes, kind(keep))
    counts = np.broadcast_to(keep, x.shape).sum(axis=axes)
    whole = counts > 0
    with np.errstate(invalid="ignore"):
        mean = np.where(keep, x, 0).sum(axis=axes) / np.maximum(counts, 1)
        centred = np.where(keep, x - np.expand_dims(mean, axes if axes is not None else (0, 1, 2)), 0)
        var = (centred**2).sum(axis=axes) / np.maximum(counts, 1)
    np.testing.assert_array_equal(np.asarray(moments.count), counts)
    np.testing.assert_allclose(np.asarray(moments.mean), np.where(whole, mean, 0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.asarray(moments.var), np.where(whole, var, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", [1e4, -1e4, 1e6, 3e7])
@pytest.mark.parametrize("shape", [(256, 3), (32, 3, 64), (3, 3, 20000)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_float32_with_a_large_mean_agrees_with_float64(kind, mean, shape, masked):
    x = _values(shape, mean=mean).astype(np.float32)
    axes = (0,) if len(shape) == 2 else (0, 2)
    keep = np.broadcast_to(_values((shape[0], *[1] * (len(shape) - 1)), seed=2) > -0.3, shape) if masked else None
    moments = Moments.of(kind(x), axes, None if keep is None else kind(keep.copy()))
    exact_mean, exact_var, _ = _plain(x, axes, keep)
    np.testing.assert_allclose(np.asarray(moments.var), exact_var, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(moments.mean), exact_mean, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_has_no_variance(kind):
    moments = Moments.of(kind(np.full((1000, 2), 1000.1, np.float32)), 0)
    np.testing.assert_allclose(np.asarray(moments.mean), np.float64(np.float32(1000.1)), rtol=1e-12)
    assert np.asarray(moments.var).max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_is_the_neutral_element(kind):
    empty, some = Moments.of(kind(np.zeros((0, 3))), 0), Moments.of(kind(_values((7, 3))), 0)
    assert (np.asarray(empty.mean).tolist(), np.asarray(empty.var).tolist(), empty.count) == ([0] * 3, [0] * 3, 0)
    for merged in (empty.merge(some), some.merge(empty), Moments.merge(empty, some, empty)):
        np.testing.assert_array_equal(np.asarray(merged.mean), np.asarray(some.mean))
        np.testing.assert_array_equal(np.asarray(merged.var), np.asarray(some.var))
        assert merged.count == 7
    nothing = empty.merge(empty)
    assert (np.asarray(nothing.var).tolist(), nothing.count) == ([0] * 3, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_value(kind):
    moments = Moments.of(kind(np.array([[3.0, -2.0]])), 0)
    assert (np.asarray(moments.mean).tolist(), np.asarray(moments.var).tolist(), moments.count) == ([3, -2], [0, 0], 1)
    with pytest.raises(ShapeError, match="at least 2 values a channel, got 1"):
        _ = moments.unbiased_var
    two = moments.merge(Moments.of(kind(np.array([[5.0, 2.0]])), 0))
    np.testing.assert_allclose(np.asarray(two.unbiased_var), [2, 8])


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_var_by_channel(kind):
    x, keep = _values((5, 3)), np.array([[1, 0, 0], [1, 0, 1], [1, 0, 0], [0, 0, 0], [1, 0, 0]], bool)
    unbiased = np.asarray(Moments.of(kind(x), 0, kind(keep)).unbiased_var)
    np.testing.assert_allclose(unbiased[0], x[keep[:, 0], 0].var(ddof=1))
    assert np.isnan(unbiased[1:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_merge_of_masked_parts_is_one_pass(kind):
    x, keep = _values((9, 4)), _values((9, 4), seed=3) > 0
    keep[:3, 0] = False
    parts = [Moments.of(kind(x[i : i + 3]), 0, kind(keep[i : i + 3])) for i in (0, 3, 6)]
    merged, whole = parts[0].merge(*parts[1:]), Moments.of(kind(x), 0, kind(keep))
    for name in ("mean", "var", "count"):
        np.testing.assert_allclose(np.asarray(getattr(merged, name)), np.asarray(getattr(whole, name)), atol=1e-13)


def test_merge_joins_an_integer_count_and_counts_by_channel():
    x = torch.from_numpy(_values((8, 2)))
    masked = Moments.of(x[:4], 0, torch.ones(4, 1, dtype=torch.bool))
    merged = masked.merge(Moments.of(x[4:], 0))
    assert merged.count.tolist() == [8, 8]
    torch.testing.assert_close(merged.var, x.var(0, correction=0))


def test_merge_of_far_means_and_very_different_sizes():
    small, large = _values((3, 2), mean=-1e6), _values((100_000, 2), mean=1e6)
    merged = Moments.of(small, 0).merge(Moments.of(large, 0))
    whole = np.concatenate([small, large])
    np.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.var, whole.var(0), rtol=1e-12)


def test_merge_counts_past_32_bits():
    part = Moments(np.zeros(1), np.ones(1), 2**40)
    assert part.merge(part, part).count == 3 * 2**40
    counts = Moments(torch.zeros(1), torch.ones(1), torch.tensor([2**40]))
    assert counts.merge(counts).count.tolist() == [2**41]


def test_half_precision_sums_in_float32():
    x = torch.full((70000, 2), 100.0, dtype=torch.float16)
    x[::2] += 1
    moments = Moments.of(x, 0)
    torch.testing.assert_close(moments.mean, torch.full((2,), 100.5, dtype=torch.float64))
    torch.testing.assert_close(moments.var, torch.full((2,), 0.25, dtype=torch.float64))


def test_numpy_integers():
    moments = Moments.of(np.array([[1, 250], [3, 252]], np.uint8), 0)
    assert (moments.mean.tolist(), moments.var.tolist()) == ([2, 251], [1, 1])


def test_immutable():
    moments = Moments.of(np.ones((2, 3)), 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        moments.count = 5


def test_pickle():
    moments = pickle.loads(pickle.dumps(Moments.of(torch.randn(4, 3), 0)))
    assert moments.mean.shape == (3,)
    assert moments.count == 4


def test_of_leaves_its_input_alone():
    x, keep = torch.randn(5, 3), torch.tensor([True, False, True, False, True]).unsqueeze(1)
    before = x.clone()
    Moments.of(x, 0, keep)
    assert torch.equal(x, before)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradients(masked):
    x = torch.from_numpy(_values((4, 3, 2))).requires_grad_()
    keep = torch.rand(4, 1, 2, generator=torch.Generator().manual_seed(0)) > 0.3 if masked else None

    def both(x):
        moments = Moments.of(x, (0, 2), keep)
        return moments.mean, moments.var

    assert torch.autograd.gradcheck(both, x)
    assert torch.autograd.gradgradcheck(both, x)


def test_agrees_with_the_oracle_on_several_channel_axes():
    x = _values((2, 5, 3, 4))
    mean, var, count = oracle.moments(x, channels=(0, 2))
    moments = Moments.of(torch.from_numpy(x), (1, 3))
    np.testing.assert_allclose(moments.mean, mean)
    np.testing.assert_allclose(moments.var, var)
    assert (count == moments.count).all()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Moments.of(torch.ones(3, dtype=torch.int64)), DtypeError, "float tensor, got torch.int64"),
        (lambda: Moments.of(torch.ones(3, dtype=torch.complex64)), DtypeError, "got torch.complex64"),
        (lambda: Moments.of(np.ones(3, complex)), DtypeError, "got an array of complex128"),
        (lambda: Moments.of(np.array(["a"])), DtypeError, "real numbers"),
        (lambda: Moments.of([1.0, 2.0]), DtypeError, "torch tensor or a NumPy array, got list"),
        (lambda: Moments.of(torch.ones(3, 2), 2), ShapeError, "axis 2 is out of range for an array of rank 2"),
        (lambda: Moments.of(np.ones((3, 2)), -3), ShapeError, "axis -3 is out of range"),
        (lambda: Moments.of(np.ones((3, 2)), (0, -2)), ArgumentError, "name an axis twice"),
        (lambda: Moments.of(np.ones((3, 2)), ()), ArgumentError, "at least one axis"),
        (lambda: Moments.of(np.ones((3, 2)), 0, np.ones((3, 2))), DtypeError, "mask must be bool .* got float64"),
        (
            lambda: Moments.of(torch.ones(3, 2), 0, torch.ones(3, 2)),
            DtypeError,
            "mask must be bool .* got torch.float32",
        ),
        (
            lambda: Moments.of(torch.ones(3, 2), 0, np.ones((3, 2), bool)),
            DtypeError,
            "kind of the values, Tensor; got ndarray",
        ),
        (
            lambda: Moments.of(np.ones((3, 2)), 0, torch.ones(3, 2) > 0),
            DtypeError,
            "kind of the values, ndarray; got Tensor",
        ),
        (
            lambda: Moments.of(np.ones((3, 2)), 0, np.ones(3, bool)),
            ShapeError,
            r"\(3,\) does not broadcast .* \(3, 2\)",
        ),
        (lambda: Moments.of(np.ones(2), 0, np.ones((3, 2), bool)), ShapeError, r"\(3, 2\) does not broadcast"),
        (
            lambda: Moments.of(np.ones((3, 2)), 0).merge(Moments.of(np.ones((3, 4)), 0)),
            ShapeError,
            r"shape \(2,\) and \(4,\) cannot be merged",
        ),
        (
            lambda: Moments.of(np.ones((3, 2)), 0).merge(Moments.of(torch.ones(3, 2), 0)),
            DtypeError,
            "ndarray and Tensor cannot be merged",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
