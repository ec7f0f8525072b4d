"""Whether two networks, or a network and a file, compute the same: largest differences over inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from batchnorm.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far outputs agree.

    Attributes:
        max_absolute: largest |after - before| of any element of any output, unit of the output.
        max_relative: the same over the largest |before| of its output; 0 where both are 0. NaN in one of the two only
            counts as infinite.
        tolerance: the largest max_relative that passes.
        inputs: how many inputs were compared.
        own_rounding: as max_relative, how far the network as it came is off its own outputs in float64, or, of a
            file, off those that onnxruntime's optimisations give; None where that was not looked at. Where it is given,
            the tolerance goes by it.
    """

    max_absolute: float
    max_relative: float
    tolerance: float
    inputs: int
    own_rounding: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.max_relative <= self.tolerance

    def __str__(self) -> str:
        verdict = "verified" if self.holds else "NOT EQUAL"
        own = "" if self.own_rounding is None else f"; the network's own rounding error is {self.own_rounding:.2g}"
        return (
            f"{verdict}: largest difference {self.max_absolute:.2g}, {self.max_relative:.2g} of the largest output "
            f"(at most {self.tolerance:.2g}{own}), {self.inputs} input{'s' if self.inputs != 1 else ''}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a number that is not finite becomes a word."""
        fields = dataclasses.asdict(self)
        shown = {key: value if value is None or math.isfinite(value) else str(value) for key, value in fields.items()}
        return {**shown, "holds": self.holds}


def compare(pairs: Iterable[tuple[Any, Any]], *, tolerance: float) -> Agreement:
    """Compares outputs pair by pair.

    Args:
        pairs: (before, after) for each input: tensors, or any nesting of tuples, lists and dicts that hold some.
        tolerance: relative to the largest value of the output before.

    Returns:
        The Agreement over all of them.

    Raises:
        ArgumentError: there is no pair, the two of a pair are not built alike (structure, number, shapes), or they hold
            no tensor.

    Example:
        >>> print(compare([(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))], tolerance=1e-5))
        verified: largest difference 0, 0 of the largest output (at most 1e-05), 1 input
    """
    absolute = relative = 0.0
    inputs = 0
    for before, after in pairs:
        inputs += 1
        for old, new in zip(*_alike(before, after), strict=True):
            difference, scale = _difference(old, new)
            absolute = max(absolute, difference)
            relative = max(relative, difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf))
    if not inputs:
        raise ArgumentError("nothing to compare: at least one input is needed.")
    return Agreement(absolute, relative, tolerance, inputs)


def call(model: torch.nn.Module, example: Any) -> Any:
    """The model's output on an example: a tuple or list is its arguments, a dict its keyword arguments.

    Example:
        >>> call(torch.nn.Flatten(0), {"input": torch.ones(2, 2)})
        tensor([1., 1., 1., 1.])
    """
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


def _alike(before: Any, after: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    old, new = (
        [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)] for output in (before, after)
    )
    if [leaf.shape for leaf in old] != [leaf.shape for leaf in new]:
        raise ArgumentError(
            f"the outputs are not built alike: {_shapes(old)} before, {_shapes(new)} after. Check what was replaced."
        )
    if not old:
        raise ArgumentError(f"the outputs hold no tensor that could be compared: they are a {type(before).__name__}.")
    return old, new


def _shapes(tensors: list[torch.Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensor"


def _difference(old: torch.Tensor, new: torch.Tensor) -> tuple[float, float]:
    """The largest difference and the largest value before; NaN and infinity agree with themselves alone."""
    if not old.numel():
        return 0.0, 0.0
    before, after = old.detach().double().cpu(), new.detach().double().cpu()
    same = (before == after) | (before.isnan() & after.isnan())
    difference = (after - before).abs().masked_fill(same, 0).nan_to_num(nan=math.inf, posinf=math.inf)
    finite = before.masked_fill(~before.isfinite(), 0)
    return float(difference.max()), float(finite.abs().max())
