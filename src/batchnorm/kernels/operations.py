"""Normalisation by the reference's own operations, for whoever transforms or differentiates these once more.

A compiler, torch.func, forward-mode autograd and double backward all look inside; no backend hides from them here.
"""

from __future__ import annotations

import torch

from batchnorm.kernels import reference
from batchnorm.kernels.checks import check_count
from batchnorm.kernels.contract import Affine, Statistics
from batchnorm.kernels.view import View, reshaped
from batchnorm.stats.distributed import Ranks
from batchnorm.stats.moments import Moments


def normalise(
    x: torch.Tensor,
    affine: Affine,
    residual: torch.Tensor | None,
    *,
    view: View,
    mask: torch.Tensor | None,
    given: Statistics | None,
    ranks: Ranks | None,
) -> tuple[torch.Tensor, Statistics]:
    """The output, and the statistics it was made with: those given, or the batch's, detached.

    Args:
        x: activations, of the view's shape.
        affine: weight and bias (C,).
        residual: like x.
        view: how x becomes (N, C, L).
        mask: (N, 1, L), bool.
        given: what to normalise with, shape of the view's channels; None takes the batch's own.
        ranks: whose batches count too.
    """
    x3 = view.fold(x)
    residual3 = None if residual is None else view.fold(residual)
    if given is not None:
        return view.unfold(reference.apply(x3, reshaped(given, (-1,)), affine, residual3)), given
    found = merged(reference.stats(x3, mask), ranks)
    check_count(found, x3)
    y = reference.apply(x3, found, affine, residual3)
    count = found.count
    if isinstance(count, int) and not torch.compiler.is_compiling():
        # A number that is no tensor can leave neither vmap nor grad(has_aux=True).
        count = torch.as_tensor(count, device=x.device)
    used = Moments(found.mean.detach(), found.var.detach(), count)
    return view.unfold(y), reshaped(used, view.channels)


def gradients(
    dy: torch.Tensor,
    inputs: tuple[torch.Tensor | None, ...],
    affine: Affine,
    wanted: tuple[bool, ...],
    *,
    view: View,
    mask: torch.Tensor | None,
    given: Statistics | None,
    ranks: Ranks | None,
) -> list[torch.Tensor | None]:
    """The gradients of x, weight, bias and residual, which autograd can follow once more.

    Args:
        dy: gradient of the output, of the view's shape.
        inputs: x, weight, bias and residual. Without an activation the residual need not be kept: its gradient is dy.
        affine: weight and bias (C,), views of those in `inputs`, eps and activation.
        wanted: for which of the inputs.
        view: how x becomes (N, C, L).
        mask: (N, 1, L), bool.
        given: what x was normalised with, (C,); None takes the batch's own.
        ranks: whose batches count too.
    """
    x, residual = inputs[0], inputs[3]
    assert x is not None
    with torch.enable_grad():
        x3 = view.fold(x)
        residual3 = None if residual is None else view.fold(residual)
        statistics = merged(reference.stats(x3, mask), ranks) if given is None else given
        y = view.unfold(reference.apply(x3, statistics, affine, residual3))
    asked = [i for i, values in enumerate(inputs) if values is not None and wanted[i]]
    grads: list[torch.Tensor | None] = [None] * 4
    if asked:
        found = torch.autograd.grad(y, [inputs[i] for i in asked], dy, create_graph=True)  # type: ignore[arg-type]
        for i, grad in zip(asked, found, strict=True):
            grads[i] = grad
    if wanted[3] and residual is None:
        grads[3] = dy
    return grads


def merged(moments: Moments, ranks: Ranks | None) -> Moments:
    """Moments of all ranks' batches together."""
    return moments if ranks is None else ranks.merge(moments)
