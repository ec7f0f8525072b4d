"""save_memory(): training that keeps an activation once where a normalised copy of it would be kept as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchnorm.kernels.recomputation import Saving, recomputing


@contextmanager
def save_memory() -> Iterator[None]:
    """Within the block, outputs of our layers are not kept for backward, but recomputed when backward needs them.

    A convolution keeps its input y for the gradient of its weight, and the layer before it its own input x, of the same
    size: y = activation(BN(x) + residual). Of the two x is enough, as mean and variance are kept anyway.
    Gradients are those without it, to the last bit; running statistics do not move again; nothing about the model
    changes. The price is one more pass of normalisation for each output that somebody would have kept.

    Put it around the forward pass (backward may be inside or outside), or above a function, as a decorator. It reaches
    what our layers and `batch_norm` return: convert the model's layers, and put the activations that follow into them,
    first. `saved_bytes` says what it brings.

    Other hooks on saved tensors within the block, as those of activation checkpointing, take precedence in their part.
    Compiled code is passed over: what the compiler keeps is its own choice. torch.func.grad and its relatives raise
    torch's error within the block. It holds in the thread that enters it.

    Raises:
        ChangedInPlaceError: (backward) what it needs was written to after the forward pass; a RuntimeError, as without
            this block. Writing to a recomputed output is no error, as x still has it.

    Example:
        >>> from batchnorm import BatchNorm2d
        >>> model = torch.nn.Sequential(BatchNorm2d(3, activation="relu"), torch.nn.Conv2d(3, 4, 3))
        >>> with save_memory():
        ...     loss = model(torch.randn(2, 3, 8, 8)).sum()
        >>> loss.backward()

    Source: Rota Bulo et al. 2018 (In-Place Activated BatchNorm) keep y and recover x from it, which needs an invertible
        activation and a gamma that is not 0. Here x is kept and y computed again, the checkpoint of their section 3.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with recomputing(Saving()):
        yield
