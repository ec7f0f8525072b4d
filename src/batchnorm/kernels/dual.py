"""Two normalised tensors added up, as one node of autograd's graph: the branches that meet in a residual block."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from batchnorm.kernels import operations, recomputation
from batchnorm.kernels.autograd import Work, like, without_base
from batchnorm.kernels.checks import check_count
from batchnorm.kernels.contract import Activation, Affine, Branch, DualBackend, Statistics
from batchnorm.kernels.dispatch import dual_backend_for
from batchnorm.kernels.transforms import must_look_inside
from batchnorm.kernels.view import View, flat, in_memory_format, reshaped

Inputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""x, weight and bias."""


class Operand(NamedTuple):
    """One of the two."""

    x: torch.Tensor
    weight: torch.Tensor | None
    """Shape of the channel axes, as the bias; None is 1."""
    bias: torch.Tensor | None
    eps: float
    given: Statistics | None
    """What to normalise with, constants; None takes the batch's own."""


def batch_norm(
    first: Operand, second: Operand, activation: Activation | None, *, view: View, backend: DualBackend
) -> tuple[torch.Tensor, tuple[Statistics, Statistics]]:
    """activation(BN(first) + BN(second)), and what each of them was normalised with.

    Args:
        first: x of the view's shape, plain and in the backend's memory.
        second: its x likewise, with shape and dtype of the first one's.
        activation: of the sum.
        view: how x becomes (N, C, L).
        backend: what computes.
    """
    work = DualWork(
        Work(view, backend, None, first.given, first.eps, activation, None),
        Work(view, backend, None, second.given, second.eps, None, None),
    )
    inputs = (*first[:3], *second[:3])

    def node() -> torch.Tensor:
        return in_memory_format(NormaliseBoth.apply(*inputs, work), view)  # type: ignore[no-untyped-call]

    def again(*inputs: Any) -> torch.Tensor:
        return in_memory_format(work.apply(backend, inputs[:3], inputs[3:]), view)

    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y = recomputation.noted(node, inputs, again, keeps_inputs=True)
    else:
        y = in_memory_format(work.forward(backend, first[:3], second[:3]), view)
    return y, (work.first.used, work.second.used)


class DualWork:
    """Two normalisations that a backend does at once: everything about them that autograd has no part in."""

    __slots__ = ("first", "second")

    def __init__(self, first: Work, second: Work) -> None:
        """`first` has the activation of the sum."""
        self.first, self.second = first, second

    def forward(self, backend: DualBackend, first: Inputs, second: Inputs) -> torch.Tensor:
        """y; the statistics it was made with are then in the two `Work.used`."""
        for work, x in ((self.second, second[0]), (self.first, first[0])):
            if work.given is None:
                folded = work.view.fold(x)
                work.folded = backend.stats(folded)
                check_count(work.folded, folded)
                work.used = reshaped(work.folded, work.view.channels)
        return self.apply(backend, first, second)

    def apply(self, backend: DualBackend, first: Inputs, second: Inputs) -> torch.Tensor:
        """y, with the statistics of the last `forward`."""
        return self.first.view.unfold(backend.apply_both(_branch(self.first, first), _branch(self.second, second)))

    def backward(
        self, dy: torch.Tensor, first: Inputs, second: Inputs, wanted: tuple[bool, ...]
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x, weight and bias of both, those that are wanted."""
        # The gradient may be transformed where the inputs were not (is_grads_batched).
        backend = None if must_look_inside() else dual_backend_for(dy)
        if backend is None or torch.is_grad_enabled():
            return self._backward_in_turn(dy, first, second, wanted)
        is_estimated = self.first.given is None, self.second.given is None
        wants_sums = any((*wanted[1:3], *wanted[4:], wanted[0] and is_estimated[0], wanted[3] and is_estimated[1]))
        found = backend.backward_both(
            self.first.view.fold(dy),
            _branch(self.first, first),
            _branch(self.second, second),
            is_estimated=is_estimated if wants_sums else (False, False),
            wants_sums=wants_sums,
        )
        gradients: list[torch.Tensor | None] = []
        for work, (_, weight, bias), (dx, sums) in zip((self.first, self.second), (first, second), found, strict=True):
            gradients += [
                work.view.unfold(dx),
                None if weight is None or sums is None else like(sums.dz_xhat, weight),
                None if bias is None or sums is None else like(sums.dz, bias),
            ]
        return tuple(gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted, strict=True))

    def _backward_in_turn(
        self, dy: torch.Tensor, first: Inputs, second: Inputs, wanted: tuple[bool, ...]
    ) -> tuple[torch.Tensor | None, ...]:
        """`backward` of the one and then of the other, for whoever transforms or differentiates it."""
        x, weight, bias = second
        work = self.second
        given = None if work.given is None else work.folded
        affine = Affine(flat(weight), flat(bias), work.eps, None)
        residual, _ = operations.normalise(x, affine, None, view=work.view, mask=None, given=given, ranks=None)
        *of_first, dz = self.first.backward(dy, (*first, residual), (*wanted[:3], any(wanted[3:])))
        if dz is None:
            return (*of_first, None, None, None)
        return (*of_first, *work.backward(dz, (*second, None), (*wanted[3:], False))[:3])


class NormaliseBoth(torch.autograd.Function):
    """`DualWork` as a node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        """x, weight and bias of the first and of the second, and the `DualWork`."""
        *operands, work = inputs
        y = without_base(work.forward(work.first.backend, operands[:3], operands[3:]))
        ctx.save_for_backward(*operands)
        ctx.work = work
        for one in (work.first, work.second):
            one.keep_statistics()
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        """See `DualWork.backward`."""
        operands = ctx.saved_tensors
        return (*ctx.work.backward(dy, operands[:3], operands[3:], ctx.needs_input_grad[:6]), None)


def _branch(work: Work, inputs: Inputs) -> Branch:
    x, weight, bias = inputs
    return Branch(work.view.fold(x), work.folded, Affine(flat(weight), flat(bias), work.eps, work.activation))
