"""Inputs that an operation on a network is checked with: the example, and random ones of the same kind."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree

from batchnorm.errors import ArgumentError
from batchnorm.surgery.recording import tensors_in

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a network's forward."""


def arguments_of(example: Any) -> Arguments:
    """The arguments that an example stands for: tuples and lists hold positional ones, dicts named ones.

    Raises:
        ArgumentError: there is no tensor in it.

    Example:
        >>> arguments_of((1, torch.zeros(2)))
        ((1, tensor([0., 0.])), {})
    """
    if not tensors_in(example):
        raise ArgumentError(
            "example must be what the network is called with: a tensor, a tuple of positional arguments or a dict of "
            f"keyword arguments, with at least one tensor in it; got {type(example).__name__}."
        )
    if isinstance(example, dict):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def random_like(given: Arguments, seed: int) -> Arguments:
    """Arguments of the same structure and shapes: float tensors normal with the mean and std that the example has.

    Integers are drawn between the smallest and largest that the example has; everything else stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.numel():
            return leaf
        if leaf.is_floating_point():
            wide = leaf.detach().double().cpu()
            spread = float(wide.std(correction=0)) or 1.0
            made = torch.randn(leaf.shape, generator=generator, dtype=torch.float64) * spread + float(wide.mean())
        elif leaf.dtype in (torch.bool, torch.complex64, torch.complex128):
            return leaf
        else:
            low, high = int(leaf.min()), int(leaf.max())
            made = torch.randint(low, high + 1, leaf.shape, generator=generator)
        return made.to(leaf.device, leaf.dtype)

    return pytree.tree_map(drawn, given)  # type: ignore[no-any-return]


def outputs_of(model: torch.nn.Module, given: Arguments) -> list[torch.Tensor]:
    """The tensors that the network returns, without gradients; drawing the same random numbers each time.

    Raises:
        ArgumentError: it returns no tensor, or empty ones only, so that nothing could be compared.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        args, kwargs = copied(given)
        output = model(*args, **kwargs)
    found = [tensor.detach().clone() for tensor in tensors_in(output)]
    if not any(tensor.numel() for tensor in found):
        raise ArgumentError(
            f"the network returns no numbers that could be compared for this example, but {type(output).__name__}: "
            "pass another example, or the part of the network that computes them."
        )
    return found


def in_float64(given: Arguments) -> Arguments:
    """The same with every float tensor in float64."""
    return pytree.tree_map(  # type: ignore[no-any-return]
        lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, given
    )


def copied(given: Arguments) -> Arguments:
    """The same with tensors of its own: networks that write into their input do not spoil it for the next run."""
    return pytree.tree_map(  # type: ignore[no-any-return]
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, given
    )
