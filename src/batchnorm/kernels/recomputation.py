"""Outputs of batch normalization that autograd does not keep: recomputed in backward from what the layer keeps anyway.

The layer's own node keeps x and, with an activation, the residual; the next layer's keeps y. While `recomputing()` is
on, whatever nodes save passes through hooks, which know the memory of y and save how it was made instead.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias
from weakref import WeakSet

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from batchnorm.errors import ChangedInPlaceError

Inputs: TypeAlias = tuple[torch.Tensor | None, ...]
"""What an output is made of."""

Again: TypeAlias = Callable[..., torch.Tensor]
"""Computes the output from the inputs once more, to the last bit; nothing else changes by it."""

in_use = 0
"""How often `recomputing` is entered now, in all threads: where it is 0, nobody needs to look further."""

_DEEPEST = 8
"""Outputs in a row of which each needs the one before it (as residual or input): beyond that one is kept. In backward
they are all there at once; and they are computed by recursion."""

_threads = threading.local()
_lock = threading.Lock()


class Kept:
    """A saved tensor that is kept as it is."""

    __slots__ = ("__weakref__", "tensor", "version")
    depth = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def take(self) -> torch.Tensor:
        """The tensor.

        Raises:
            ChangedInPlaceError: it was written to meanwhile. Autograd looks after that only where there are no hooks.
        """
        tensor = self.tensor
        if tensor._version != self.version:
            raise ChangedInPlaceError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version "
                f"{self.version} instead. Leave the operation in place out, or clone the tensor before it."
            )
        return tensor


class Part:
    """A saved tensor that is an output, or a view of one, and is recomputed."""

    __slots__ = ("__weakref__", "is_served", "offset", "recipe", "size", "stride")

    def __init__(self, recipe: Recipe, tensor: torch.Tensor) -> None:
        self.recipe, self.is_served = recipe, False
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        with _lock:
            recipe.parts.add(self)

    @property
    def depth(self) -> int:
        """Outputs in a row that have to be computed for this one."""
        return self.recipe.depth

    def take(self) -> torch.Tensor:
        """The tensor, which shares memory with what others take of the same output.

        Raises:
            ChangedInPlaceError: what it is computed from was written to meanwhile.
        """
        with torch.no_grad():
            y = self.recipe.give(self)
            return y.as_strided(self.size, self.stride, y.storage_offset() + self.offset)


Saved: TypeAlias = Kept | Part


class Recipe:
    """How one output is computed again."""

    __slots__ = (
        "__weakref__",
        "again",
        "depth",
        "device",
        "dtype",
        "held",
        "inputs",
        "parts",
        "shape",
        "stream",
        "stride",
        "version",
    )

    def __init__(self, y: torch.Tensor, inputs: tuple[Saved | None, ...], again: Again) -> None:
        self.inputs, self.again = inputs, again
        self.device, self.dtype, self.version = y.device, y.dtype, y._version
        self.shape, self.stride = y.shape, y.stride()
        self.depth = 1 + max(one.depth for one in inputs if one is not None)
        self.parts: WeakSet[Part] = WeakSet()
        self.held: torch.Tensor | None = None
        self.stream: int | None = None

    def is_whole_in(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor`, in the memory of the output, holds what the output held."""
        return tensor.dtype == self.dtype and tensor._version == self.version and not tensor.is_neg()

    @property
    def bytes(self) -> int:
        """Of the output."""
        return math.prod(self.shape) * self.dtype.itemsize

    def give(self, part: Part) -> torch.Tensor:
        """The output. It is held until all who saved it have taken it, so that it is computed once."""
        y, stream = self.held, _stream(self.device)
        if y is None or stream != self.stream:  # what another stream computes may not be there yet
            y = self._computed()
        with _lock:
            part.is_served = True
            if all(one.is_served for one in self.parts):
                for one in self.parts:  # another backward pass, through a graph that is retained, starts anew
                    one.is_served = False
                self.held = None
            else:
                self.held, self.stream = y, stream
        return y

    def _computed(self) -> torch.Tensor:
        y = self.again(*(None if one is None else one.take() for one in self.inputs))
        if y.stride() != self.stride:
            y = y.new_empty_strided(self.shape, self.stride).copy_(y)
        return y


class Saving:
    """The hooks, and which memory holds an output now."""

    def __init__(self) -> None:
        # As long as a weak reference stands, no other storage gets the same address.
        self.outputs: dict[int, tuple[StorageWeakRef, Recipe]] = {}
        self.number_packed = 0

    def pack(self, tensor: torch.Tensor) -> Saved:
        """What autograd saves instead of `tensor`, which has no history."""
        self.number_packed += 1
        recipe = self.recipe_of(tensor)
        return Kept(tensor) if recipe is None else Part(recipe, tensor)

    def recipe_of(self, tensor: torch.Tensor) -> Recipe | None:
        """How `tensor` can be recomputed; None where it is not known as an output, or has changed since."""
        if not self.outputs or type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return None
        found = self.outputs.get(tensor.untyped_storage()._cdata)
        return found[1] if found is not None and found[1].is_whole_in(tensor) else None

    def add(self, y: torch.Tensor, inputs: Inputs, again: Again) -> None:
        """Takes note of an output."""
        for address in [address for address, (storage, _) in self.outputs.items() if storage.expired()]:  # type: ignore[no-untyped-call]
            del self.outputs[address]  # and with it, where nobody saved the output, what it is computed from
        storage = y.untyped_storage()
        if type(y) is not torch.Tensor or storage.nbytes() != y.nbytes:
            return
        recipe = Recipe(y, tuple(None if one is None else self.pack(one.detach()) for one in inputs), again)
        if recipe.depth <= _DEEPEST:
            self.outputs[storage._cdata] = StorageWeakRef(storage), recipe  # type: ignore[no-untyped-call]


@contextmanager
def recomputing(saving: Saving) -> Iterator[None]:
    """Outputs that are saved in this thread within the block are recomputed; one inside of another goes on with it."""
    global in_use
    outer = current()
    now = saving if outer is None else outer
    _threads.saving = now
    with _lock:
        in_use += 1
    try:
        with saved_tensors_hooks(now.pack, _unpack):
            yield
    finally:
        with _lock:
            in_use -= 1
        _threads.saving = outer
        if outer is None:
            now.outputs.clear()


def current() -> Saving | None:
    """What this thread is within."""
    return getattr(_threads, "saving", None)


def noted(node: Callable[[], torch.Tensor], inputs: Inputs, again: Again, *, keeps_inputs: bool) -> torch.Tensor:
    """The output that `node` puts into autograd's graph; it is taken note of where it can be recomputed for nothing.

    It cannot where the node does not keep what it was made of (`keeps_inputs`): a residual without an activation plays
    no part in backward; and other hooks, as those of activation checkpointing, may stand in front of ours.
    """
    saving = current()
    if saving is None or not keeps_inputs:
        return node()
    before = saving.number_packed
    y = node()
    if saving.number_packed != before:
        saving.add(y, inputs, again)
    return y


def _unpack(saved: Saved) -> torch.Tensor:
    return saved.take()


def _stream(device: torch.device) -> int | None:
    """The stream of an accelerator in which operations are queued now."""
    return torch.cuda.current_stream(device).stream_id if device.type == "cuda" else None
