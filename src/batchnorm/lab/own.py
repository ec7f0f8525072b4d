"""The user's own network: made by his factory, with its batch normalization or with something else in its place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError
from batchnorm.kernels.reference import activate
from batchnorm.lab.config import OwnNetwork, OwnNorm
from batchnorm.lab.datasets.stored import opened
from batchnorm.objects import from_module
from batchnorm.surgery.replace import places, put

GROUPS = 32
"""Groups of the group normalization that takes the place of batch normalization; fewer where channels are few."""


def build_own(network: OwnNetwork, shape: tuple[int, int, int], classes: int, *, seed: int) -> nn.Module:
    """The network of the user's factory, tried on two images.

    Args:
        network: which factory, and what stands in the place of its batch normalization.
        shape: of an image, (channels, height, width).
        classes: number of classes.
        seed: of torch's generator while the factory makes it, so that every arm has the same weights.

    Returns:
        The network, in training mode: (N, channels, height, width) -> logits, (N, classes).

    Raises:
        ArgumentError: there is no such factory, it makes no network, the network has no batch normalization, or it
            does not take the images or gives no logits for the classes.
    """
    factory = from_module(network.factory, "NETWORK")
    torch.manual_seed(seed)
    made = factory()
    if not isinstance(made, nn.Module):
        raise ArgumentError(f"{network.factory} must make a torch.nn.Module, got {type(made).__name__}")
    layers = places(made, lambda module: isinstance(module, _BatchNorm))
    if not layers:
        raise ArgumentError(f"{network.factory} makes a {type(made).__name__} without batch normalization layers")
    if network.norm != "own":
        for place in layers:
            made = put(made, place, _Instead(place.module, network))
    _try(made, network.factory, shape, classes)
    return made.train()


def check_own(factory: str, images: Path) -> None:
    """Raises ArgumentError, before anything is trained, where the network of `factory` does not fit stored images."""
    found = opened(images)
    height, width, channels = found.train_x.shape[1:]
    for norm in get_args(OwnNorm):
        build_own(OwnNetwork(factory, norm), (channels, height, width), found.classes, seed=0)


class _Instead(nn.Module):
    """What takes the place of a batch normalization layer: a shift or group normalization, then its activation."""

    def __init__(self, old: nn.Module, network: OwnNetwork) -> None:
        super().__init__()
        channels = int(old.num_features)  # type: ignore[arg-type]
        self.activation = getattr(old, "activation", None)
        # The bias in front of batch normalization is left out as a rule: without it there has to be one.
        self.norm = _Shift(channels) if network.norm == "none" else nn.GroupNorm(math.gcd(GROUPS, channels), channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(x)
        return activate(y if residual is None else y + residual, self.activation)


class _Shift(nn.Module):
    """x + bias, a bias a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.view(-1, *[1] * (x.ndim - 2))


def _try(model: nn.Module, factory: str, shape: tuple[int, int, int], classes: int) -> None:
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *shape))
    except Exception as error:  # whatever the user's network raises on images that do not fit
        raise ArgumentError(
            f"{factory} does not take images of shape {shape} (channels, height, width): "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < classes:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ArgumentError(f"{factory} must give logits (images, {classes} classes or more), got {found}")
