"""Normalisation in autograd's graph: a backend's forward, and its own backward for it."""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from batchnorm.kernels import operations
from batchnorm.kernels.checks import check_count, check_number
from batchnorm.kernels.contract import Activation, Affine, Backend, BackwardSums, PackingBackend, Statistics
from batchnorm.kernels.dispatch import backend_now
from batchnorm.kernels.view import View, flat, reshaped
from batchnorm.stats.distributed import Ranks
from batchnorm.stats.running import Running


class Work:
    """One normalisation by a backend: everything about it that autograd has no part in."""

    __slots__ = (
        "activation", "backend", "eps", "folded", "given", "is_whole", "mask", "packer", "ranks", "used", "view",
    )  # fmt: skip

    def __init__(
        self,
        view: View,
        backend: Backend,
        mask: torch.Tensor | None,
        given: Statistics | None,
        eps: float,
        activation: Activation | None,
        ranks: Ranks | None,
    ) -> None:
        """`mask` is (N, 1, L), bool; `given` is what to normalise with, None takes the batch's own."""
        self.view, self.mask, self.given, self.ranks = view, mask, given, ranks
        self.eps, self.activation = eps, activation
        self.used: Any = given
        self.folded: Any = None if given is None else reshaped(given, (-1,))
        self.packer: PackingBackend | None = None
        self._set_backend(backend)

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """y; the statistics it was made with are then in `used`, and as (C,) in `folded`."""
        return self.forward_keeping(x, weight, bias, residual, keeps=False)[0]

    def forward_keeping(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        *,
        keeps: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`forward`, and what `backward` wants in the place of the residual: its values, bits, or nothing."""
        affine = self._affine(weight, bias)
        x3, residual3 = cast(torch.Tensor, self._fold(x)), self._fold(residual)
        if self.given is not None:
            y, signs = self._apply(x3, affine, residual3, keeps=keeps)
            return cast(torch.Tensor, self._unfold(y)), self._kept(residual, signs)
        signs = None
        if self.ranks is None and self.mask is None:  # before any work: how many values there are is plain to see
            check_number(x.numel() // max(math.prod(self.view.channels), 1), x)
        if self.ranks is not None or (self.backend.packs and residual is not None):
            self.folded = operations.merged(self.backend.stats(x3, self.mask), self.ranks)
            check_count(self.folded, x3)
            y, signs = self._apply(x3, affine, residual3, keeps=keeps)
        else:
            y, self.folded = self.backend.forward(x3, affine, residual3, self.mask)
            if self.mask is not None:
                check_count(self.folded, x3)
        self.used = reshaped(self.folded, self.view.channels)
        return cast(torch.Tensor, self._unfold(y)), self._kept(residual, signs)

    def _apply(
        self, x: torch.Tensor, affine: Affine, residual: torch.Tensor | None, *, keeps: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The backend's `apply`, and bits that stand in for the residual where it gives any."""
        if keeps and residual is not None and self.mask is None and self.backend.packs:
            packer = cast(PackingBackend, self.backend)
            found = packer.apply_packing(x, self.folded, affine, residual)
            if found is not None:
                self.packer = packer
                return found
        return self.backend.apply(x, self.folded, affine, residual), None

    def _kept(self, residual: torch.Tensor | None, signs: torch.Tensor | None) -> torch.Tensor | None:
        if signs is not None:
            return signs
        # Without an activation the residual's value plays no part in backward, only its place.
        return residual if self.activation is not None else None

    def again(
        self,
        backend: Backend,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """What `forward` gave by that backend, from the same statistics."""
        work = Work(self.view, backend, None, self.folded, self.eps, self.activation, None)
        return work.forward(x, weight, bias, residual)

    def keep_statistics(self) -> None:
        """Copies what was given: running statistics may move on before the backward pass."""
        if self.given is not None:
            self.folded = Running(self.folded.mean.clone(), self.folded.var.clone())

    def backward(
        self,
        dy: torch.Tensor,
        inputs: tuple[torch.Tensor | None, ...],
        wanted: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x, weight, bias and residual, those that are wanted.

        Args:
            dy: gradient of the output.
            inputs: x, weight, bias and what `forward_keeping` kept; without an activation nothing, as the residual's
                gradient is dy.
            wanted: for which of them.
        """
        x, weight, bias, residual = inputs
        assert x is not None
        activation = self.activation
        packer = self.packer
        if packer is not None and residual is not None and (torch.is_grad_enabled() or not backend_now(dy).packs):
            # The bits are one more factor of dy, for whoever cannot read them.
            signs = self.view.unfold(packer.unpacked(residual, self.view.fold(x)))
            dy, activation, residual = torch.where(signs, dy, 0), None, None
            inputs = x, weight, bias, None
        for_x, for_weight, for_bias, for_residual = wanted
        if torch.is_grad_enabled():  # create_graph=True: somebody wants to differentiate the gradient
            given = None if self.given is None else self.folded
            affine = self._affine(weight, bias)._replace(activation=activation)
            return tuple(
                operations.gradients(
                    dy, inputs, affine, wanted, view=self.view, mask=self.mask, given=given, ranks=self.ranks
                )
            )
        # The gradient may be transformed where the input was not (is_grads_batched).
        self._set_backend(backend_now(dy))
        backend, mask, is_estimated = self.backend, self.mask, self.given is None
        affine = self._affine(weight, bias)._replace(activation=activation)
        dy3, x3 = cast(torch.Tensor, self._fold(dy)), cast(torch.Tensor, self._fold(x))
        residual3 = residual if packer is not None else self._fold(residual)
        dx = dresidual = sums = None
        needs_sums = for_weight or for_bias or (for_x and is_estimated)
        if for_x and needs_sums and self.ranks is None:
            dx, dresidual, sums = backend.backward(
                dy3, x3, self.folded, affine, residual3, is_estimated=is_estimated, mask=mask
            )
        else:
            if needs_sums:
                sums = backend.backward_reduce(dy3, x3, self.folded, affine, residual3)
            if for_x or (for_residual and residual is not None):
                # Over all ranks: mean and variance are those of all. Where only the residual asks, it needs no sums.
                answer = _over_ranks(sums, self.ranks) if for_x and is_estimated else None
                dx, dresidual = backend.backward_apply(
                    dy3, x3, self.folded, affine, residual3, sums=answer, mask=None if answer is None else mask
                )
        return (
            self._unfold(dx) if for_x else None,
            like(sums.dz_xhat, weight) if sums is not None and weight is not None and for_weight else None,
            like(sums.dz, bias) if sums is not None and bias is not None and for_bias else None,
            (dy if residual is None else self._unfold(dresidual)) if for_residual else None,
        )

    def _set_backend(self, backend: Backend) -> None:
        self.backend = backend
        self.is_whole = backend.folds and self.view.axes == (1,)

    def _affine(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Affine:
        return Affine(flat(weight), flat(bias), self.eps, self.activation)

    def _fold(self, x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or self.is_whole else self.view.fold(x)

    def _unfold(self, y: torch.Tensor | None) -> torch.Tensor | None:
        return y if y is None or self.is_whole else self.view.unfold(y)


class Normalise(torch.autograd.Function):
    """`Work` as a node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        work: Work,
    ) -> torch.Tensor:
        """See `Work.forward`."""
        y, kept = work.forward_keeping(x, weight, bias, residual)
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.work = work
        work.keep_statistics()
        return without_base(y)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        """See `Work.backward`."""
        wanted = ctx.needs_input_grad[:4]
        return (*ctx.work.backward(dy, ctx.saved_tensors, wanted), None)


def _over_ranks(sums: BackwardSums | None, ranks: Ranks | None) -> BackwardSums | None:
    if sums is None or ranks is None:
        return sums
    return BackwardSums(*ranks.sum(torch.stack([sums.dz, sums.dz_xhat])))


def without_base(y: torch.Tensor) -> torch.Tensor:
    """`y` as no view: on a Function's view autograd refuses in-place operations, as of nn.ReLU(inplace=True)."""
    return y.new_empty(0).set_(y) if y._is_view() else y  # type: ignore[call-overload]


def like(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The gradient in dtype and shape of the weight or bias."""
    if gradient.dtype != parameter.dtype:
        gradient = gradient.to(parameter.dtype)
    return gradient if gradient.ndim == parameter.ndim else gradient.reshape(parameter.shape)
