"""saved_bytes(): what a network keeps in memory for its backward pass, without save_memory() and with it."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from batchnorm.errors import ArgumentError
from batchnorm.kernels.recomputation import Kept, Recipe, Saved, Saving, recomputing
from batchnorm.layers.random_state import random_state_kept
from batchnorm.layers.tracing import uncompiled
from batchnorm.surgery.examples import Arguments, arguments_of, copied
from batchnorm.surgery.inference_form import normalizations
from batchnorm.surgery.recognition import Reading, core_class, read, titled


@dataclasses.dataclass(frozen=True)
class SavedBytes:
    """What autograd keeps of one forward pass; print it.

    Attributes:
        plain: bytes without save_memory(), each piece of memory once, without parameters and buffers.
        saving: bytes with it.
        recomputed: bytes of the outputs that are recomputed, by the name of the layer; of one that is called several
            times all of them together.
        kept: why the output of every other layer is not recomputed, by name.
    """

    plain: int
    saving: int
    recomputed: dict[str, int]
    kept: dict[str, str]

    def __str__(self) -> str:
        part = f" ({self.saving / self.plain - 1:+.0%})" if self.plain else ""
        lines = [
            f"kept for backward: {self.plain / 2**20:.1f} MiB, with save_memory() {self.saving / 2**20:.1f} MiB{part}",
            f"  recomputed: {len(self.recomputed)} of {len(self.recomputed) + len(self.kept)} layers' outputs",
        ]
        reasons: dict[str, list[str]] = {}
        for name, why in self.kept.items():
            reasons.setdefault(why, []).append(name or "(the model itself)")
        return "\n".join([*lines, *(f"  not {', '.join(names)}: {why}" for why, names in reasons.items())])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def saved_bytes(model: torch.nn.Module, example: Any) -> SavedBytes:
    """How many bytes a forward pass of `model` keeps for backward, and how many with `save_memory()`, counted.

    The model runs twice, as a copy and in its own mode, and is left as it was; so are the random generators. Nothing is
    estimated: it is the memory that autograd's graph holds at the end of the forward pass.

    Args:
        model: any network; layers that are not ours count, too, and are named.
        example: what it is called with: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        ArgumentError: the model cannot be copied, or the example has no tensor.

    Example:
        >>> from batchnorm import BatchNorm2d
        >>> layers = [torch.nn.Conv2d(3, 8, 3), BatchNorm2d(8, activation="relu"), torch.nn.Conv2d(8, 4, 3)]
        >>> print(saved_bytes(torch.nn.Sequential(*layers), torch.randn(16, 3, 34, 34)))
        kept for backward: 1.2 MiB, with save_memory() 0.7 MiB (-41%)
          recomputed: 1 of 1 layers' outputs
    """
    given = arguments_of(example)
    plain, saving = _Counting(), _Counting()
    before, _ = _count(model, given, plain, saved_tensors_hooks(plain.pack, Kept.take))
    after, layers = _count(model, given, saving, recomputing(saving))
    return SavedBytes(
        before,
        after,
        {name: found for name, found in layers.items() if isinstance(found, int)},
        {name: found for name, found in layers.items() if isinstance(found, str)},
    )


class _Counting(Saving):
    """Hooks that know all they have packed and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[weakref.ref[Saved]] = []

    def pack(self, tensor: torch.Tensor) -> Saved:
        saved = super().pack(tensor)
        self.all.append(weakref.ref(saved))
        return saved

    def bytes_besides(self, known: set[int]) -> int:
        """Bytes that are kept, without the storages at the addresses `known`."""
        tensors = [saved.tensor for ref in self.all if isinstance(saved := ref(), Kept)]
        storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors if t.layout is torch.strided)}
        return sum(size for address, size in storages.items() if address not in known)


def _count(
    model: torch.nn.Module, given: Arguments, counting: _Counting, hooks: AbstractContextManager[Any]
) -> tuple[int, dict[str, int | str]]:
    """Bytes kept, and for each layer the bytes of its outputs that are recomputed, or why none is."""
    try:
        work = copy.deepcopy(model)
    except Exception as error:
        raise ArgumentError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and its running statistics "
            "shall not move: remove what cannot be copied, as hooks that hold generators or open files."
        ) from error
    args, kwargs = copied(given)
    recipes: dict[str, list[weakref.ref[Recipe]]] = {}
    layers: dict[str, int | str] = {}
    for place in normalizations(work):
        layers[place.name] = "the example does not reach it"

        def note(layer: torch.nn.Module, _: Any, output: Any, name: str = place.name) -> None:
            recipe = counting.recipe_of(output)
            if recipe is None:
                layers[name] = _why_not(layer, output)
            else:
                recipes.setdefault(name, []).append(weakref.ref(recipe))

        place.module.register_forward_hook(note)
    with random_state_kept(model), uncompiled(), torch.enable_grad():
        with hooks:
            output = work(*args, **kwargs)
        own = {one.untyped_storage()._cdata for one in (*work.parameters(), *work.buffers())}
        number = counting.bytes_besides(own)
        for name, refs in recipes.items():
            alive = [recipe for ref in refs if (recipe := ref()) is not None]
            layers[name] = sum(recipe.bytes for recipe in alive) or _UNSEEN
    del output  # up to here it holds the graph
    return number, layers


def _why_not(layer: torch.nn.Module, output: Any) -> str:
    reading = read(layer)
    if isinstance(reading, Reading) and not reading.known.is_ours:
        return f"{titled(core_class(layer))} is another library's: convert() first"
    if not getattr(output, "requires_grad", False):
        return "no gradient goes through it"
    return (
        "not all that its output is made of is kept (an addition without activation, ghost batches, whitening, other "
        "hooks), or too many outputs in a row need one another"
    )


_UNSEEN = "nothing keeps its output as it is; where an activation follows, fuse_activations() puts it into the layer"
