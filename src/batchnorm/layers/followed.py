"""Layers with modules behind them in one place: timm's norm+activation layers where the activation does not fuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from batchnorm.errors import ArgumentError
from batchnorm.layers.batch_norm import BatchNorm2d
from batchnorm.layers.decorrelated import DecorrelatedBatchNorm
from batchnorm.layers.frozen import FrozenBatchNorm
from batchnorm.layers.ghost import GhostBatchNorm
from batchnorm.layers.renorm import BatchRenorm
from batchnorm.layers.sync import SyncBatchNorm
from batchnorm.layers.tracing import as_one_node

BEHIND = ("drop", "act")
"""The names of the modules, in the order in which they come behind the normalization; timm's."""


class Followed:
    """Mixed into a layer: its submodules `drop` and `act`, where it has them, take its output.

    A network of timm's so keeps its module names, hooks and state_dict where an activation is none that a layer fuses
    (hard swish, PReLU) or drops blocks of activations.
    """

    _modules: dict[str, Any]

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The layer's output, passed through `drop` and `act`.

        Args:
            input: activations, (N, C, ...), float.
            residual: added before both.
            mask: bool, True = counts in the statistics.
            out: refused: what the modules behind make is theirs to place.

        Returns:
            What `act` makes of it.

        Raises:
            ArgumentError: `out` is given.
            ShapeError: as the layer.
            DtypeError: as the layer.
        """
        if out is not None:
            raise ArgumentError("out goes with layers that have no modules behind them; leave it out here.")
        if isinstance(input, Proxy):
            return as_one_node(self, input, residual, mask)
        return self._followed(super().forward(input, residual, mask=mask))  # type: ignore[misc]

    def _followed(self, y: Tensor) -> Tensor:
        for name in BEHIND:
            module = self._modules.get(name)
            if module is not None:
                y = module(y)
        return y


class FollowedBatchNorm2d(Followed, BatchNorm2d):
    """BatchNorm2d with modules behind it."""


class FollowedSyncBatchNorm(Followed, SyncBatchNorm):
    """SyncBatchNorm with modules behind it."""


class FollowedGhostBatchNorm(Followed, GhostBatchNorm):
    """GhostBatchNorm with modules behind it."""


class FollowedBatchRenorm(Followed, BatchRenorm):
    """BatchRenorm with modules behind it."""


class FollowedDecorrelatedBatchNorm(Followed, DecorrelatedBatchNorm):
    """DecorrelatedBatchNorm with modules behind it."""


class FollowedFrozenBatchNorm(Followed, FrozenBatchNorm):
    """FrozenBatchNorm with modules behind it."""


class FollowedGroupNorm(Followed, torch.nn.GroupNorm):
    """torch.nn.GroupNorm with modules behind it."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """What `act` makes of the normalised input, (N, C, ...)."""
        return self._followed(torch.nn.GroupNorm.forward(self, input))


FOLLOWED: dict[type, type] = {
    BatchNorm2d: FollowedBatchNorm2d,
    SyncBatchNorm: FollowedSyncBatchNorm,
    GhostBatchNorm: FollowedGhostBatchNorm,
    BatchRenorm: FollowedBatchRenorm,
    DecorrelatedBatchNorm: FollowedDecorrelatedBatchNorm,
    FrozenBatchNorm: FollowedFrozenBatchNorm,
    torch.nn.GroupNorm: FollowedGroupNorm,
}
"""A layer's class -> the same with modules behind it."""
