"""The direct way, for the common case: one call of the CPU core for a whole pass, and its node in autograd's graph.

Plain tensors (N, C, ...) in the CPU's memory, no mask, no ranks, and nobody who looks inside. Small inputs are why:
there each look at a tensor from Python costs as much as the arithmetic. So the core looks (csrc/pass.hpp), and where
anything is wrong or rare, nothing was done and the answer is None: the general way then says what is wrong, or computes
it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch.autograd.graph import increment_version

from batchnorm.kernels import recomputation
from batchnorm.kernels.autograd import Work
from batchnorm.kernels.contract import ACTIVATION_CODES, Activation, Statistics
from batchnorm.kernels.dispatch import backend_now, core_in_use
from batchnorm.kernels.transforms import must_look_inside
from batchnorm.kernels.view import View
from batchnorm.stats.moments import Moments

if TYPE_CHECKING:
    from batchnorm.kernels._cpu import Pass

Parameter: TypeAlias = torch.Tensor | None
"""weight or bias, (C,)."""


def batch_norm(
    x: torch.Tensor,
    weight: Parameter,
    bias: Parameter,
    residual: torch.Tensor | None,
    eps: float,
    activation: Activation | None,
    given: Statistics | None,
) -> tuple[torch.Tensor, Statistics] | None:
    """What `functional.batch_norm` gives; None where this is not the way. Given statistics are constants."""
    if given is not None:
        y = infer(x, weight, bias, residual, eps, activation, -1, given.mean, given.var)
        return None if y is None else (y, given)
    core = _core_for(x, activation)
    if core is None or x.ndim < 2:
        return None
    mean, var = _new_statistics(x.shape[1])
    code, threads = ACTIVATION_CODES[activation], torch.get_num_threads()
    found = core.train(x, weight, bias, residual, eps, code, -1, threads, mean, var, None, None, None, 0.0)
    if found is None:
        return None
    return _in_graph(x, weight, bias, residual, activation, found), Moments(mean, var, found[1].count)


def train(
    x: torch.Tensor,
    weight: Parameter,
    bias: Parameter,
    residual: torch.Tensor | None,
    eps: float,
    activation: Activation | None,
    features: int,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    tracked: torch.Tensor | None,
    momentum: float | None,
) -> tuple[torch.Tensor, bool] | None:
    """A layer's output in training; None where this is not the way.

    Args:
        x: activations, (N, C, ...).
        weight: (C,) or None.
        bias: (C,) or None.
        residual: like x, or None.
        eps: added to the variance.
        activation: fused.
        features: C, of the layer.
        mean: running mean, (C,), which the batch enters, in place; None for none.
        var: running variance, likewise.
        tracked: the scalar that counts batches, likewise.
        momentum: weight of the new batch, or None for the plain average.

    Returns:
        y, and False where the batch was left out of the buffers, as it is not finite.
    """
    core = _core_for(x, activation)
    if core is None:
        return None
    if mean is not None and mean.is_inference():
        return None  # whether it may be written to is for torch to say
    weight_of_new = -1.0 if momentum is None else momentum
    if activation is None and residual is None and x.requires_grad and _is_followed() and weight is not None:
        made = core.train_in_graph(x, weight, bias, eps, features, mean, var, tracked, weight_of_new)
        if made is not None:
            y, done, is_taken = made
            _note_changed(mean, var, tracked)
            if done is not None:
                y = _in_graph(x, weight, bias, None, None, (y.detach(), done))
            return y, is_taken
    found = core.train(
        x,
        weight,
        bias,
        residual,
        eps,
        ACTIVATION_CODES[activation],
        features,
        torch.get_num_threads(),
        None,
        None,
        mean,
        var,
        tracked,
        weight_of_new,
    )
    if found is None:
        return None
    _note_changed(mean, var, tracked)
    return _in_graph(x, weight, bias, residual, activation, found), found[1].is_taken


def _is_followed() -> bool:
    """Whether autograd records, and keeps outputs as ever."""
    return torch.is_grad_enabled() and not recomputation.in_use


def _note_changed(mean: torch.Tensor | None, var: torch.Tensor | None, tracked: torch.Tensor | None) -> None:
    """Autograd finds out by this that a tensor it saved has changed."""
    if mean is not None and var is not None:
        increment_version((mean, var) if tracked is None else (mean, var, tracked))


def infer(
    x: torch.Tensor,
    weight: Parameter,
    bias: Parameter,
    residual: torch.Tensor | None,
    eps: float,
    activation: Activation | None,
    features: int,
    mean: torch.Tensor,
    var: torch.Tensor,
) -> torch.Tensor | None:
    """The output with constant statistics, (C,) each; arguments as in `train`; -1 for any number of `features`."""
    core = _core_for(x, activation)
    if core is None:
        return None
    code, threads = ACTIVATION_CODES[activation], torch.get_num_threads()
    found = core.infer(x, weight, bias, residual, eps, code, features, threads, mean, var, None)
    return None if found is None else _in_graph(x, weight, bias, residual, activation, found)


def infer_into(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: Parameter,
    bias: Parameter,
    residual: torch.Tensor | None,
    eps: float,
    activation: Activation | None,
    mean: torch.Tensor,
    var: torch.Tensor,
) -> torch.Tensor | None:
    """`infer` written to `out`, which may be x itself; None, and nothing written, where this is not the way.

    Nobody asks for a gradient.
    """
    core = _core_for(x, activation)
    if core is None or type(x) is not torch.Tensor or type(out) is not torch.Tensor:
        return None
    if out.is_inference() != torch.is_inference_mode_enabled():
        return None  # whether it may be written to is for torch to say
    is_same = out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
    read = (residual, weight, bias, mean, var) if is_same else (x, residual, weight, bias, mean, var)
    if any(t is not None and _share_memory(out, t) for t in read):
        return None
    code, threads = ACTIVATION_CODES[activation], torch.get_num_threads()
    if core.infer(x, weight, bias, residual, eps, code, -1, threads, mean, var, out) is None:
        return None
    if not out.is_inference():
        increment_version(out)
    return out


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return isinstance(b, torch.Tensor) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _core_for(x: torch.Tensor, activation: Activation | None) -> Any:
    """The core, unless it is plain to see that it is not for x."""
    if isinstance(x, torch.Tensor) and x.is_cpu and activation in ACTIVATION_CODES:
        return None if torch._C._len_torch_dispatch_stack() else core_in_use()
    return None


_prototypes: dict[int, torch.Tensor] = {}
"""One (C,) float64 tensor for each C that was met: torch.empty_like of one is faster than torch.empty."""


def _new_statistics(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    like = _prototypes.get(channels)
    if like is None:
        like = _prototypes[channels] = torch.empty(channels, dtype=torch.float64)
    return torch.empty_like(like), torch.empty_like(like)


def _in_graph(
    x: torch.Tensor,
    weight: Parameter,
    bias: Parameter,
    residual: torch.Tensor | None,
    activation: Activation | None,
    found: tuple[torch.Tensor, Pass],
) -> torch.Tensor:
    """The output as a node of autograd's graph, where anything asks for a gradient."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if recomputation.in_use:
            return recomputation.noted(
                partial(_apply, x, weight, bias, residual, activation, found),
                (x, weight, bias, residual),
                partial(_again, found[1], activation),
                keeps_inputs=residual is None or activation is not None,
            )
        return cast(torch.Tensor, _apply(x, weight, bias, residual, activation, found))
    return found[0]


def _again(
    done: Pass,
    activation: Activation | None,
    x: torch.Tensor,
    weight: Parameter,
    bias: Parameter,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The output of a pass that was done: the core rounds alike whether it took the statistics itself or got them."""
    mean, var = _statistics(done, x.shape[1])
    y = infer(x, weight, bias, residual, done.eps, activation, -1, mean, var)
    if y is not None:
        return y
    view = View(tuple(x.shape), (1,))
    work = Work(view, backend_now(x), None, Moments(mean, var, done.count), done.eps, activation, None)
    return work.forward(x, weight, bias, residual)


class Direct(torch.autograd.Function):
    """A pass that was done already, as a node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Parameter,
        bias: Parameter,
        residual: torch.Tensor | None,
        activation: Activation | None,
        found: tuple[torch.Tensor, Pass],
    ) -> torch.Tensor:
        """The output in `found`, which autograd does not know yet."""
        # Without an activation the residual's value plays no part in backward, only its place.
        ctx.save_for_backward(x, weight, bias, residual if activation is not None else None)
        ctx.activation = activation
        y, ctx.done = found
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        """The gradients, by the core where it can."""
        x, weight, bias, residual = inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if not torch.is_grad_enabled() and not must_look_inside():
            core = _core_for(dy, ctx.activation)
            if core is not None:
                threads = torch.get_num_threads()
                found = core.differentiate(ctx.done, dy, x, weight, bias, residual, wanted, threads)
                if found is not None:
                    return found
        return (*_work(ctx.done, ctx.activation, dy, x).backward(dy, inputs, wanted[:4]), None, None)


def _work(done: Pass, activation: Activation | None, dy: torch.Tensor, x: torch.Tensor) -> Work:
    """What was done, for the general way."""
    statistics = Moments(*_statistics(done, x.shape[1]), done.count)
    given = None if done.is_estimated else statistics
    work = Work(View(tuple(x.shape), (1,)), backend_now(dy), None, given, done.eps, activation, None)
    work.folded = statistics
    return work


def _statistics(done: Pass, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of a pass."""
    mean, var = _new_statistics(channels)
    done.write(mean, var)
    return mean, var


# Autograd's own apply in C++: torch.autograd.Function.apply first looks for torch.func's transforms, which nobody has
# on who comes here. And the engine calls `backward`, not the method that looks for it first.
_apply: Any = super(torch.autograd.Function, Direct).apply
Direct._backward_cls.apply = Direct.backward  # type: ignore[attr-defined]
