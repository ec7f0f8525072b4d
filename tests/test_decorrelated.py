"""DecorrelatedBatchNorm against NumPy float64, written from the two papers; and the gradients of its square roots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import close

from batchnorm import DecorrelatedBatchNorm
from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.stats.whitening import newton, zca

EPS = 1e-5


def _zca(covariance):
    values, vectors = np.linalg.eigh(covariance)
    return vectors @ np.diag(1 / np.sqrt(values)) @ vectors.T


def _newton(covariance, iterations=5):
    """IterNorm, Alg. 1."""
    scaled, root = covariance / np.trace(covariance), np.eye(len(covariance))
    for _ in range(iterations):
        root = (3 * root - root @ root @ root @ scaled) / 2
    return root / np.sqrt(np.trace(covariance))


ROOTS = {"zca": _zca, "newton": _newton}


def _paper(x, method, size, keep=None):
    """Alg. 1 of Huang et al. 2018 by groups: output, mean, covariances; x is (N, C, L), keep (N, L)."""
    rows = np.moveaxis(x, 1, -1)  # (N, L, C)
    counted = rows[keep] if keep is not None else rows.reshape(-1, x.shape[1])
    mean = counted.mean(0)
    y, covariances = np.empty_like(rows), []
    for start in range(0, x.shape[1], size):
        group = slice(start, start + size)
        centred = counted[:, group] - mean[group]
        covariances.append(centred.T @ centred / len(counted))
        root = ROOTS[method](covariances[-1] + EPS * np.eye(size))
        y[..., group] = (rows[..., group] - mean[group]) @ root.T
    return np.moveaxis(y, -1, 1), mean, np.stack(covariances), len(counted)


def _correlated(*shape, seed=0):
    generator = np.random.default_rng(seed)
    mixed = np.einsum("ncl,cd->ndl", generator.normal(size=shape), generator.normal(size=(shape[1], shape[1])))
    return mixed + 3


@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("size", [1, 2, 6, 16])
@pytest.mark.parametrize("method", ["zca", "newton"])
def test_output_and_statistics_are_the_papers(method, size, is_masked):
    x = _correlated(12, 6, 5)
    keep = np.random.default_rng(1).random((12, 5)) > 0.3 if is_masked else None
    layer = DecorrelatedBatchNorm(6, group_size=size, method=method, dtype=torch.float64)
    y = layer(torch.tensor(x), mask=None if keep is None else torch.tensor(keep))
    expected, mean, covariances, count = _paper(x, method, min(size, 6), keep)
    close(y, expected, torch.float64)
    close(layer.running_mean, 0.1 * mean, torch.float64)
    running = 0.9 * np.eye(min(size, 6)) + 0.1 * covariances * count / (count - 1)
    close(layer.running_covariance, running, torch.float64)
    assert int(layer.num_batches_tracked) == 1
    evaluated = layer.eval()(torch.tensor(x))
    for group in range(len(covariances)):
        channels = slice(group * min(size, 6), (group + 1) * min(size, 6))
        root = ROOTS[method](running[group] + EPS * np.eye(min(size, 6)))
        wanted = np.einsum("cd,ndl->ncl", root, x[:, channels] - 0.1 * mean[channels, None])
        close(evaluated[:, channels], wanted, torch.float64)


def test_output_is_uncorrelated():
    x = torch.tensor(_correlated(200, 8, 3)).float()
    y = DecorrelatedBatchNorm(8)(x).movedim(1, -1).reshape(-1, 8)
    torch.testing.assert_close(y.T @ y / len(y), torch.eye(8), rtol=0, atol=2e-3)


def test_a_large_mean_costs_no_digits():
    x = torch.tensor(_correlated(50, 4, 3)) + 1e4
    wide, narrow = DecorrelatedBatchNorm(4, dtype=torch.float64), DecorrelatedBatchNorm(4)
    rounded = x.float()
    torch.testing.assert_close(narrow(rounded).double(), wide(rounded.double()), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(narrow.eval()(rounded).double(), wide.eval()(rounded.double()), rtol=1e-3, atol=1e-3)


def test_equal_eigenvalues_have_a_gradient():
    """Through eigenvectors it is NaN: their derivative divides by the difference of eigenvalues."""
    identity = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1).requires_grad_()
    zca(identity).sum().backward()
    # d (S^-1/2) = -dS / 2 at the identity
    torch.testing.assert_close(identity.grad, torch.full((2, 4, 4), -0.5, dtype=torch.float64))


@pytest.mark.parametrize("root", [zca, newton], ids=["zca", "newton"])
@pytest.mark.parametrize("repeated", [False, True])
def test_gradients_of_the_roots(root, repeated):
    factor = torch.randn(5, 5, dtype=torch.float64)
    matrix = factor @ factor.T + 0.5 * torch.eye(5, dtype=torch.float64)
    if repeated:
        values, vectors = torch.linalg.eigh(matrix)
        values[1:4] = values[2]
        matrix = (vectors * values) @ vectors.T

    def symmetric(free):
        return root((free + free.T) / 2, 0.01)

    assert torch.autograd.gradcheck(symmetric, matrix.requires_grad_())


def test_newton_comes_to_the_exact_root():
    factor = torch.randn(5, 50, dtype=torch.float64)
    matrix = factor @ factor.T / 50
    torch.testing.assert_close(newton(matrix, iterations=25), zca(matrix))


def test_gradients_of_gradients_by_newton_and_an_error_by_zca():
    for method, is_possible in (("newton", True), ("zca", False)):
        layer = DecorrelatedBatchNorm(2, method=method, dtype=torch.float64)
        x = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        if is_possible:
            grad.square().sum().backward()
            assert x.grad.isfinite().all()
        else:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                grad.square().sum().backward()


def test_a_singular_batch_is_finite():
    """Fewer values than channels: directions without variance stay at 0, as 0 / sqrt(eps)."""
    layer = DecorrelatedBatchNorm(16)
    x = (torch.randn(5, 16) * 1e3).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def test_a_batch_norm_checkpoint_evaluates_the_same():
    old = torch.nn.BatchNorm2d(6)
    for value in (old.weight.data, old.bias.data, old.running_mean, old.running_var):
        value.uniform_(0.5, 2)
    old.num_batches_tracked.fill_(7)
    layer = DecorrelatedBatchNorm(6, group_size=3)
    assert str(layer.load_state_dict(old.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(4, 6, 3, 3)
    torch.testing.assert_close(layer.eval()(x), old.eval()(x))
    assert int(layer.num_batches_tracked) == 7


def test_there_is_no_way_back():
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*running_var.*Unexpected key.*running_covariance"):
        torch.nn.BatchNorm2d(6).load_state_dict(DecorrelatedBatchNorm(6).state_dict())


def test_without_tracking_evaluation_uses_the_batch():
    layer = DecorrelatedBatchNorm(4, track_running_stats=False)
    x = torch.randn(20, 4)
    assert torch.equal(layer(x), layer.eval()(x))
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_bad_arguments_get_clear_errors():
    with pytest.raises(ArgumentError, match="group_size must divide num_features, got 4 and 6"):
        DecorrelatedBatchNorm(6, group_size=4)
    with pytest.raises(ArgumentError, match="method must be one of zca, newton; got 'pca'"):
        DecorrelatedBatchNorm(6, method="pca")
    with pytest.raises(BatchNormError, match=r"cannot track statistics under torch\.func"):
        torch.vmap(DecorrelatedBatchNorm(2, method="newton"))(torch.randn(3, 8, 2))
