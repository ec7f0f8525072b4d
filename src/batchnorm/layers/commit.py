"""How a batch's Moments enter the running statistics: once at most, and never from a batch that is not finite."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch

from batchnorm.errors import StatisticsWarning
from batchnorm.kernels.dispatch import update_running
from batchnorm.kernels.transforms import can_read
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running, cumulative, exponential


class Buffers(NamedTuple):
    """The state of a layer; written in place."""

    running_mean: torch.Tensor
    """(C,), float."""
    running_var: torch.Tensor
    """(C,), float, unbiased."""
    num_batches_tracked: torch.Tensor | None
    """Scalar, int64; old checkpoints of old layers have none."""


def is_recomputed() -> bool:
    """Whether this forward runs inside a backward pass: a checkpointed segment, computed for the second time.

    Compiled code cannot ask while it is being compiled; it asks when it runs, through `_is_first_pass`.
    """
    return not torch.compiler.is_compiling() and runs_in_backward()


def runs_in_backward() -> bool:
    """Whether a backward pass runs now, in eager code."""
    return bool(torch._C._current_graph_task_id() != -1)


@torch.library.custom_op("batchnorm::is_first_pass", mutates_args=())
def _is_first_pass(batch: torch.Tensor) -> torch.Tensor:
    """Scalar bool: False where compiled code recomputes a checkpointed segment; takes `batch` to be no constant."""
    return batch.new_full((), not runs_in_backward(), dtype=torch.bool)


@_is_first_pass.register_fake
def _(batch: torch.Tensor) -> torch.Tensor:
    return batch.new_empty((), dtype=torch.bool)


def commit(buffers: Buffers, batch: Moments, momentum: float | None) -> bool:
    """Takes a batch into the running statistics, in place; exponential rule, or cumulative with momentum=None.

    Without a value (an empty batch, a mask that leaves nothing) the statistics stay as they are, but the batch is
    counted, as torch does. Statistics and num_batches_tracked both stay where mean or variance is not finite.

    Args:
        buffers: what to write to, (C,) each.
        batch: Moments, (C,). Under torch.vmap the Moments of all slices are merged, where the buffers are shared.
        momentum: weight of the new value, or None.

    Returns:
        False where the batch was left out because it is not finite and that can be known without stopping an
        accelerator or a compiler; True otherwise.
    """
    if not torch.compiler.is_compiling():
        done = update_running(Running(buffers[0], buffers[1]), buffers[2], batch, momentum)
        if done is not None:
            return done
    with torch.no_grad():
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return _write(buffers, batch, momentum)
        # torch.func forbids writing to a tensor from outside; inside of a Function its wrappers are off.
        count = torch.as_tensor(batch.count, device=buffers.running_mean.device)
        _CommitUnderTransforms.apply(*buffers, batch.mean, batch.var, count, momentum)  # type: ignore[no-untyped-call]
        return True


def warn_once(layer: torch.nn.Module) -> None:
    """Says, once for each layer, that a batch was left out; the layer keeps that in `_has_warned`."""
    if layer._has_warned:
        return
    layer._has_warned = True  # type: ignore[assignment]
    warnings.warn(
        f"{layer!r} met a batch whose mean or variance is not finite (NaN or infinity in its input): "
        "the running statistics stay as they were. This is said once for each layer.",
        StatisticsWarning,
        stacklevel=4,
    )


def _write(buffers: Buffers, batch: Moments, momentum: float | None) -> bool:
    running_mean, running_var, tracked = buffers
    is_empty = _known(_no_values(batch.count))
    if is_empty:
        if tracked is not None:
            tracked.add_(1)  # torch counts it too
        return True
    is_usable = torch.isfinite(batch.mean + batch.var).all()
    if isinstance(batch.count, torch.Tensor):
        # One value has no unbiased variance. Where counts cannot be read (a compiler), nobody could refuse it before.
        is_usable = is_usable & (batch.count > 1).all()
    if _known(~is_usable):
        return False
    if torch.compiler.is_compiling() and not _is_exporting():
        is_usable = is_usable & _is_first_pass(batch.mean)
    running = Running(running_mean, running_var)
    if momentum is None:
        if tracked is None:
            return True
        new = cumulative(running, batch, tracked + 1)
    else:
        new = exponential(running, batch, momentum)
    if not can_read(is_usable):
        new = Running(*(torch.where(is_usable, after, before) for after, before in zip(new, running, strict=True)))
    running_mean.copy_(new.mean)
    running_var.copy_(new.var)
    if tracked is not None:
        is_counted = is_usable | _no_values(batch.count)
        tracked.add_(is_counted.to(tracked.dtype))
    return True


def _is_exporting() -> bool:
    # torch.compiler.is_exporting came with torch 2.7.
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())


def _no_values(count: Any) -> bool | torch.Tensor:
    return (count == 0).all() if isinstance(count, torch.Tensor) else bool(count == 0)


def _known(value: bool | torch.Tensor) -> bool:
    """The truth of `value` where it can be read without stopping an accelerator or a compiler; elsewhere False."""
    if isinstance(value, torch.Tensor):
        return can_read(value) and bool(value)
    return value


class _CommitUnderTransforms(torch.autograd.Function):
    """`_write` on plain tensors, from within any nesting of vmap, grad, jacrev, ..."""

    @staticmethod
    def forward(
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        tracked: torch.Tensor | None,
        mean: torch.Tensor,
        var: torch.Tensor,
        count: torch.Tensor,
        momentum: float | None,
    ) -> torch.Tensor:
        _write(Buffers(running_mean, running_var, tracked), Moments(mean, var, count), momentum)
        return running_mean.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        return (None,) * 7

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        tracked: torch.Tensor | None,
        mean: torch.Tensor,
        var: torch.Tensor,
        count: torch.Tensor,
        momentum: float | None,
    ) -> tuple[torch.Tensor, None]:
        slices = info.batch_size
        state = [_slices(t, d, slices) for t, d in zip((running_mean, running_var, tracked), in_dims[:3], strict=True)]
        parts = [_slices(t, d, slices) for t, d in zip((mean, var, count), in_dims[3:6], strict=True)]
        batches = [Moments(*part) for part in zip(*parts, strict=True)]
        if in_dims[0] is None:
            # One layer, many slices: together they are one batch.
            batches = [batches[0].merge(*batches[1:])]
        for i, batch in enumerate(batches):
            _CommitUnderTransforms.apply(  # type: ignore[no-untyped-call]
                state[0][i], state[1][i], state[2][i], batch.mean, batch.var, batch.count, momentum
            )
        return running_mean.new_zeros(()), None


def _slices(values: Any, dim: int | None, number: int) -> list[Any]:
    """The slices along `dim`: views, so that writing to one writes to the whole."""
    return [values] * number if dim is None else [values.select(dim, i) for i in range(number)]
