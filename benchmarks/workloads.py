"""What is measured: shape classes, dtypes, layouts and operations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

LARGE = "larger than L3"
ABOUT = "about L3"
SMALL_MAPS = "7x7 and 14x14"
FEW = "few channels"
TINY = "tiny"

OPERATIONS = ("bn", "bn_relu", "bn_add_relu")
DTYPES = ("float32", "bfloat16")
PHASES = {
    "forward": "training forward: statistics, output in new memory, running statistics updated",
    "backward": "gradients of input, weight, bias and residual, in new memory",
    "forward+backward": "the two after each other",
    "inference": "evaluation mode under inference_mode, output in new memory",
    "step": "zero_grad, forward, loss, backward, SGD with momentum",
}
"""What the time of each phase covers; a copy goes into memory that is there already."""


@dataclass(frozen=True)
class Case:
    """Activations of one shape, and what is done to them."""

    group: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    operation: str = "bn"

    @property
    def name(self) -> str:
        """Readable and unique."""
        return f"{size(self.shape)} {self.dtype} {self.layout} {self.operation}"

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Case:
        """The case that `asdict` took apart."""
        return cls(**{**fields, "shape": tuple(fields["shape"])})

    def activations(self) -> torch.Tensor:
        """Fresh random activations, mean 1 and standard deviation 2."""
        x = torch.randn(self.shape).mul_(2).add_(1).to(getattr(torch, self.dtype))
        if self.layout == "contiguous":
            return x
        return x.to(memory_format=torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d)

    def columns(self) -> dict[str, Any]:
        """The case's part of a row of results."""
        return {**asdict(self), "shape": size(self.shape)}


_SHAPES: dict[tuple[int, ...], str] = {
    (32, 256, 56, 56): LARGE,
    (64, 256, 1568): LARGE,
    (8, 64, 16, 56, 56): LARGE,
    (32, 64, 56, 56): ABOUT,
    (4096, 1024): ABOUT,
    (64, 512, 7, 7): SMALL_MAPS,
    (64, 256, 14, 14): SMALL_MAPS,
    (8, 3, 224, 224): FEW,
    (32, 16, 112, 112): FEW,
    (256, 100): TINY,
    (8, 16, 8, 8): TINY,
    (4, 8): TINY,  # nothing but the call
}
_QUICK = ((32, 256, 56, 56), (32, 64, 56, 56), (64, 512, 7, 7), (8, 3, 224, 224), (256, 100))
_LEVEL3 = 32 << 20


def cases(shapes: Iterable[tuple[int, ...]] = ()) -> list[Case]:
    """Every case of the shapes given, or of the table's: each dtype, layout and operation."""
    found = []
    for shape in tuple(shapes) or _SHAPES:
        for layout in layouts(shape):
            for dtype in DTYPES:
                for operation in OPERATIONS:
                    found.append(Case(group(shape), shape, dtype, layout, operation))
    return found


def quick_cases() -> list[Case]:
    """One shape of each class: BN in both layouts, BN+ReLU in one; float32."""
    found = []
    for shape in _QUICK:
        for layout in layouts(shape):
            found.append(Case(group(shape), shape, layout=layout))
        found.append(Case(group(shape), shape, operation="bn_relu"))
    return found


def layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The memory formats in which a shape is measured."""
    return ("contiguous", "channels_last") if len(shape) in (4, 5) else ("contiguous",)


def group(shape: tuple[int, ...]) -> str:
    """The class of a shape: the table's for its own, else by size, spatial size and channels."""
    if shape in _SHAPES:
        return _SHAPES[shape]
    if math.prod(shape) <= 256 * 100:
        return TINY
    if shape[1] <= 16:
        return FEW
    if len(shape) > 2 and math.prod(shape[2:]) <= 14 * 14:
        return SMALL_MAPS
    return LARGE if math.prod(shape) * 4 > _LEVEL3 else ABOUT


def size(shape: tuple[int, ...]) -> str:
    """(32, 64, 56, 56) as 32x64x56x56."""
    return "x".join(map(str, shape))


def parse_shape(text: str) -> tuple[int, ...]:
    """32x64x56x56 as (32, 64, 56, 56).

    Raises:
        ValueError: not two to five sizes, of at least two values a channel.
    """
    try:
        shape = tuple(int(part) for part in text.split("x"))
    except ValueError:
        shape = ()
    if not 2 <= len(shape) <= 5 or min(shape) < 1 or math.prod(shape) // shape[1] < 2:
        raise ValueError(
            f"expected a shape like 256x100 or 32x64x56x56 (N, C, ...) with two values a channel; got {text!r}"
        )
    return shape
