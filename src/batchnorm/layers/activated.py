"""Activated: what is left of a layer with activation and residual once its scale and shift are folded away."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.checks import check_activation
from batchnorm.kernels.contract import Activation
from batchnorm.kernels.reference import activate


class Activated(torch.nn.Module):
    """activation(input + residual), called as the layer was whose place it takes.

    Args:
        activation: as in BatchNorm; None is none.

    Example:
        >>> Activated("relu")(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, -3.0]))
        tensor([2., 0.])
    """

    def __init__(self, activation: Activation | None = None) -> None:
        check_activation(activation)
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(input + residual).

        Args:
            input: activations, any shape, float.
            residual: shape and dtype of the input.

        Returns:
            Shape and dtype of the input.
        """
        return activate(input if residual is None else input + residual, self.activation)

    def extra_repr(self) -> str:
        """What repr() shows between the parentheses."""
        return repr(self.activation)
