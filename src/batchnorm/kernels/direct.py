"""The direct way of the common case through the CPU core and into autograd's graph; see passes.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from batchnorm.kernels.autograd import Work
from batchnorm.kernels.contract import Activation, Statistics
from batchnorm.kernels.dispatch import backend_now, passes_in_use
from batchnorm.kernels.transforms import must_look_inside
from batchnorm.kernels.view import View
from batchnorm.stats.moments import Moments

if TYPE_CHECKING:
    from batchnorm.kernels._cpu import Pass
    from batchnorm.kernels.passes import Buffers


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: Activation | None,
    given: Statistics | None,
) -> tuple[torch.Tensor, Statistics] | None:
    """What `functional.batch_norm` gives, or None where this is not the way; nobody may be looking inside.

    Statistics that are given are constants.
    """
    passes = passes_in_use()
    if passes is None:
        return None
    if given is None:
        found = passes.normalise(x, weight, bias, residual, eps, activation)
        return None if found is None else (_in_graph(x, weight, bias, residual, activation, *found[:2]), found[2])
    done = passes.infer(x, weight, bias, residual, eps, activation, -1, given.mean, given.var)
    return None if done is None else (_in_graph(x, weight, bias, residual, activation, *done), given)


def infer(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: Activation | None,
    features: int,
    mean: torch.Tensor,
    var: torch.Tensor,
) -> torch.Tensor | None:
    """A layer's output in evaluation, or None where this is not the way; nobody may be looking inside."""
    passes = passes_in_use()
    if passes is None:
        return None
    done = passes.infer(x, weight, bias, residual, eps, activation, features, mean, var)
    return None if done is None else _in_graph(x, weight, bias, residual, activation, *done)


def train(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: Activation | None,
    features: int,
    buffers: Buffers,
    momentum: float | None,
) -> tuple[torch.Tensor, bool] | None:
    """A layer's output in training, and whether all went well with the running statistics; None as in `infer`."""
    passes = passes_in_use()
    if passes is None:
        return None
    done = passes.train(x, weight, bias, residual, eps, activation, features, buffers, momentum)
    return None if done is None else (_in_graph(x, weight, bias, residual, activation, *done), done[1].is_taken)


def _in_graph(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: Activation | None,
    y: torch.Tensor,
    done: Pass,
) -> torch.Tensor:
    """`y` as a node of autograd's graph, where anything asks for a gradient."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _apply(x, weight, bias, residual, (y, done, activation))  # type: ignore[no-any-return, no-untyped-call]
    return y


class Direct(torch.autograd.Function):
    """A pass that was done already, as a node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        found: tuple[torch.Tensor, Pass, Activation | None],
    ) -> torch.Tensor:
        """The output in `found`, which autograd does not know yet."""
        y, ctx.done, ctx.activation = found
        # Without an activation the residual's value plays no part in backward, only its place.
        ctx.save_for_backward(x, weight, bias, residual if ctx.activation is not None else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        """The gradients, by the core where it can."""
        inputs = x, weight, bias, residual = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        if not torch.is_grad_enabled() and not must_look_inside():
            passes = passes_in_use()
            if passes is not None:
                found = passes.differentiate(ctx.done, dy, x, weight, bias, residual, wanted)
                if found is not None:
                    return (*found, None)
        return (*_work(ctx.done, ctx.activation, dy, x).backward(dy, inputs, wanted), None)


def _work(done: Pass, activation: Activation | None, dy: torch.Tensor, x: torch.Tensor) -> Work:
    """What was done, for the general way."""
    mean, var = torch.empty(2, x.shape[1], dtype=torch.float64)
    done.write(mean, var)
    statistics = Moments(mean, var, done.count)
    given = None if done.is_estimated else statistics
    work = Work(View(tuple(x.shape), (1,)), backend_now(dy), None, given, done.eps, activation, None)
    work.folded = statistics
    return work


# Autograd's own apply in C++: torch.autograd.Function.apply first looks for torch.func's transforms, which nobody has
# on who comes here.
_apply = super(torch.autograd.Function, Direct).apply
