"""The reference backend: plain torch in any dtype and on any device, the executable specification of the contract.

`stats` and `apply` are made of differentiable torch operations, so that double backward, torch.func and
torch.compile, which all need to look inside, go through them; the two backward functions are the closed form, for
everything else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from batchnorm.kernels.contract import Activation, Affine, BackwardSums, Gradients, Statistics
from batchnorm.stats.moments import Moments

folds = False
packs = False
pairs = False


def forward(
    x: torch.Tensor, affine: Affine, residual: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, Moments]:
    """See `contract.Backend.forward`."""
    moments = stats(x, mask)
    return apply(x, moments, affine, residual), moments


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    affine: Affine,
    residual: torch.Tensor | None = None,
    *,
    is_estimated: bool,
    mask: torch.Tensor | None = None,
) -> Gradients:
    """See `contract.Backend.backward`."""
    sums = backward_reduce(dy, x, statistics, affine, residual)
    dx, dresidual = backward_apply(dy, x, statistics, affine, residual, sums=sums if is_estimated else None, mask=mask)
    return Gradients(dx, dresidual, sums)


def stats(x: torch.Tensor, mask: torch.Tensor | None = None) -> Moments:
    """See `contract.Backend.stats`."""
    return Moments.of(x, (0, 2), mask)


def apply(
    x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """See `contract.Backend.apply`."""
    wide = _arithmetic_dtype(x)
    scale, shift, mean = _coefficients(statistics, affine, wide)
    z = torch.addcmul(_column(shift), x.to(wide) - _column(mean), _column(scale))
    if residual is not None:
        z = z + residual
    return activate(z, affine.activation).to(x.dtype)


def backward_reduce(
    dy: torch.Tensor, x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor | None = None
) -> BackwardSums:
    """See `contract.Backend.backward_reduce`."""
    dz = _before_activation(dy, x, statistics, affine, residual)
    return BackwardSums(dz.sum((0, 2)), (dz * _x_hat(x, statistics, affine.eps)).sum((0, 2)))


def backward_apply(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: Statistics,
    affine: Affine,
    residual: torch.Tensor | None = None,
    *,
    sums: BackwardSums | None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `contract.Backend.backward_apply`."""
    dz = _before_activation(dy, x, statistics, affine, residual)
    scale, _, _ = _coefficients(statistics, affine, dz.dtype)
    dx = dz
    if sums is not None:
        count: Any = statistics.count
        through_mean = _column((sums.dz / count).to(dz.dtype))
        through_var = _column((sums.dz_xhat / count).to(dz.dtype))
        answer = torch.addcmul(through_mean, _x_hat(x, statistics, affine.eps), through_var)
        dx = dz - (answer if mask is None else answer.masked_fill(~mask, 0))
    return (dx * _column(scale)).to(x.dtype), None if residual is None else dz.to(residual.dtype)


def _arithmetic_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.unsqueeze(-1)


def _coefficients(
    statistics: Statistics, affine: Affine, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale, shift and mean, (C,) each, with z = (x - mean) * scale + shift.

    The float64 mean is taken apart: what float32 rounds off goes into the shift, so that at mean 1e4 nothing of the
    normalised values is lost. The rounded part is a constant to autograd; the gradient flows through the rest, whose
    derivative is the same.
    """
    mean = statistics.mean
    high = mean.detach().to(wide)
    # Half-precision statistics first grow wide: they would swallow eps.
    scale = (statistics.var.to(torch.promote_types(statistics.var.dtype, wide)) + affine.eps).rsqrt()
    if affine.weight is not None:
        scale = affine.weight * scale
    shift = (high - mean) * scale
    if affine.bias is not None:
        shift = shift + affine.bias
    return scale.to(wide), shift.to(wide), high


def _x_hat(x: torch.Tensor, statistics: Statistics, eps: float) -> torch.Tensor:
    return apply(x.to(_arithmetic_dtype(x)), statistics, Affine(None, None, eps, None))


def activate(z: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    """The activation by its name; None leaves z as it is."""
    return z if activation is None else _ACTIVATIONS[activation](z)


_ACTIVATIONS: dict[Activation, Any] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _before_activation(
    dy: torch.Tensor, x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor | None
) -> torch.Tensor:
    """dz = dy * activation'(z), with z computed again from x instead of kept."""
    wide = _arithmetic_dtype(x)
    dz = dy.to(wide)
    if affine.activation is None:
        return dz
    before = affine._replace(activation=None)
    z = apply(x.to(wide), statistics, before, residual)
    # torch's own derivatives of its activations: a second list of formulas here could only disagree with them.
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        y = activate(z, affine.activation)
    return torch.autograd.grad(y, z, dz)[0]
