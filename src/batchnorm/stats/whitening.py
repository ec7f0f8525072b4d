"""Inverse square roots of covariance matrices: exact through eigenvectors, or by Newton's iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def zca(covariance: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """(covariance + eps I)^(-1/2), exact: U diag(1 / sqrt(lambda)) U^T.

    Of all whitenings it is the one that moves the data least. Its gradient is the closed form for a function of a
    symmetric matrix, and has no differences of eigenvalues in its denominators: equal eigenvalues, where the gradient
    through eigenvectors is NaN, do no harm. It is differentiable once.

    Args:
        covariance: (..., d, d), float, symmetric, positive semidefinite; eigenvalues that rounding made negative are
            read as 0. A matrix that is not finite gives NaN.
        eps: added to the eigenvalues; positive where one of them may be 0.

    Returns:
        Shape and dtype of `covariance`.

    Source: Huang et al. 2018 (arXiv 1804.08450, ZCA whitening); Higham 2008, "Functions of Matrices",
        theorem 3.11 (Daleckii and Krein), for the gradient.

    Example:
        >>> zca(torch.tensor([[4.0, 0.0], [0.0, 0.25]])).tolist()
        [[0.5, 0.0], [0.0, 2.0]]
    """
    whitening: torch.Tensor = _InverseSquareRoot.apply(covariance, eps)[0]  # type: ignore[no-untyped-call]
    return whitening


def newton(covariance: torch.Tensor, eps: float = 0.0, iterations: int = 5) -> torch.Tensor:
    """About (covariance + eps I)^(-1/2), by Newton's iteration: matrix products only.

    P_0 = I, P_k = (3 P_(k-1) - P_(k-1)^3 S) / 2, S = covariance / trace; result P_T / sqrt(trace). Large eigenvalues
    converge first: with few iterations directions of small variance stay smaller than 1, which is gentler than exact
    whitening where they are noise.

    Args:
        covariance: as for `zca`.
        eps: added to the diagonal.
        iterations: T, at least 1.

    Returns:
        Shape and dtype of `covariance`; differentiable any number of times.

    Source: Huang et al. 2019 (arXiv 1904.03441), Alg. 1 (IterNorm).
    """
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    covariance = covariance + eps * identity
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    scaled = covariance / trace
    root = identity.expand_as(covariance)
    for _ in range(iterations):
        root = 1.5 * root - 0.5 * (root @ root @ root @ scaled)
    return root * trace.rsqrt()


class _InverseSquareRoot(torch.autograd.Function):
    """Also gives the eigenvectors and the eigenvalues' roots, for backward; they are no results."""

    @staticmethod
    def forward(covariance: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # eigh raises for NaN, and one bad batch must not end a training run: the answer there is NaN, as in BatchNorm.
        is_finite = torch.isfinite(covariance).all(-1, keepdim=True).all(-2, keepdim=True)
        identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        values, vectors = torch.linalg.eigh(torch.where(is_finite, covariance, identity))
        roots = (values.clamp(min=0) + eps).sqrt()
        whitening = (vectors / roots.unsqueeze(-2)) @ vectors.mT
        return torch.where(is_finite, whitening, float("nan")), vectors, roots

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.save_for_backward(output[1], output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        vectors, roots = ctx.saved_tensors
        rows, columns = roots.unsqueeze(-1), roots.unsqueeze(-2)
        # (f(a) - f(b)) / (a - b) of f(a) = a^(-1/2), and f'(a) where a = b, in one formula.
        slopes = -1 / (rows * columns * (rows + columns))
        inner = vectors.mT @ (grad + grad.mT) / 2 @ vectors
        return vectors @ (slopes * inner) @ vectors.mT, None
