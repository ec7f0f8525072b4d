"""Losses and gradients of a network on a batch, taken beside its training without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.lab.networks import Noise


def weights_of(network: nn.Module) -> list[Tensor]:
    """The weights of its convolutions and linear maps, from the input to the output."""
    return [module.weight for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def loss_and_gradients(
    network: nn.Module, x: Tensor, y: Tensor, of: Sequence[Tensor] | None = None
) -> tuple[float, list[Tensor]]:
    """The mean loss on a batch, in the mode in which the network is, and its gradients; `grad` stays as it is.

    Args:
        network: the network.
        x: images, (N, channels, height, width).
        y: classes, (N,).
        of: what the gradients are taken with respect to; all parameters by default.

    Returns:
        The loss, and one gradient for each, of its shape.
    """
    wanted = list(network.parameters()) if of is None else list(of)
    with torch.enable_grad():
        loss = functional.cross_entropy(network(x), y)
        gradients = torch.autograd.grad(loss, wanted)
    return float(loss.detach()), list(gradients)


@contextmanager
def put_back(network: nn.Module) -> Iterator[None]:
    """Whatever happens to parameters, buffers and noise inside is undone at the end."""
    tensors = [*network.parameters(), *network.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    noises = [module.generator for module in network.modules() if isinstance(module, Noise)]
    states = [generator.get_state() for generator in noises]
    drawn = torch.get_rng_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        for generator, state in zip(noises, states, strict=True):
            generator.set_state(state)
        torch.set_rng_state(drawn)


def norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all numbers in the tensors."""
    return float(torch.stack([tensor.detach().double().square().sum() for tensor in tensors]).sum().sqrt())


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The Euclidean norm of a - b."""
    return norm([one.detach().double() - other.detach().double() for one, other in zip(a, b, strict=True)])


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The cosine of the angle between a and b; 0 where one of them is 0."""
    product = sum(
        float((one.detach().double() * other.detach().double()).sum()) for one, other in zip(a, b, strict=True)
    )
    scale = norm(a) * norm(b)
    return product / scale if scale > 0 else 0.0
