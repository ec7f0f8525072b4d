"""The batches of a recalibration, and how the model is run on one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from batchnorm.errors import ArgumentError


class Source:
    """The batches of each pass, at most `most` of them.

    Args:
        batches: any iterable.
        most: how many of them, or None.
        is_repeated: whether there are several passes: an iterator is then kept in memory.
    """

    def __init__(self, batches: Iterable[Any], most: int | None, *, is_repeated: bool) -> None:
        self._batches = batches
        self._most = most
        self._is_repeated = is_repeated

    def __iter__(self) -> Iterator[Any]:
        if self._is_repeated and isinstance(self._batches, Iterator):
            self._batches = list(itertools.islice(self._batches, self._most))
        return itertools.islice(self._batches, self._most)

    def length(self) -> int | None:
        """How many batches a pass has; None where nobody knows before the end."""
        try:
            size = len(self._batches)  # type: ignore[arg-type]
        except TypeError:  # an iterator, or a DataLoader over an IterableDataset
            return None
        return size if self._most is None else min(size, self._most)


class OnFirstInput:
    """model(input), on the model's device: how a model is run where nobody says otherwise.

    Args:
        model: whose device it is, asked once: that takes as long as a small layer.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.device = _device_of(model)

    def __call__(self, model: torch.nn.Module, batch: Any) -> object:
        """Runs `model` on the batch."""
        return model(first_input(batch, self.device))


def first_input(batch: Any, device: torch.device | None) -> torch.Tensor:
    """The batch itself, or what it begins with, on `device` if that is given."""
    value = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(value, torch.Tensor):
        came = f"a {type(batch).__name__}" if value is batch else f"a {type(batch).__name__} of {type(value).__name__}"
        raise ArgumentError(
            f"a batch must be a tensor, or a tuple or list that begins with one; got {came}. For other batches pass "
            "forward, e.g. forward=lambda model, batch: model(**batch)."
        )
    return value if device is None else value.to(device)


def _device_of(model: torch.nn.Module) -> torch.device | None:
    """Where the model's parameters are; None where it has none, and no buffers."""
    home = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if home is None else home.device
