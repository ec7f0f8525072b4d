"""What is measured: shape classes, dtypes, layouts and operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Layout = Literal["contiguous", "channels_last"]
Operation = Literal["bn", "bn_relu", "bn_add_relu"]


@dataclass(frozen=True)
class Case:
    """One row of the table: activations of one shape, and what is done to them."""

    group: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: Layout = "contiguous"
    operation: Operation = "bn"

    @property
    def name(self) -> str:
        """Readable and unique."""
        size = "x".join(map(str, self.shape))
        return f"{size} {str(self.dtype).removeprefix('torch.')} {self.layout} {self.operation}"

    def activations(self) -> torch.Tensor:
        """Fresh random activations, mean 1 and standard deviation 2."""
        x = torch.randn(self.shape).mul_(2).add_(1).to(self.dtype)
        return x.to(memory_format=torch.channels_last) if self.layout == "channels_last" else x


LARGE = "larger than L3"
ABOUT = "about L3"
SMALL_MAPS = "7x7 and 14x14"
FEW = "few channels"
TINY = "tiny"

_SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (LARGE, (32, 256, 56, 56)),
    (LARGE, (64, 64, 112, 112)),
    (LARGE, (64, 256, 3136)),
    (ABOUT, (32, 64, 56, 56)),
    (ABOUT, (4096, 1024)),
    (SMALL_MAPS, (64, 512, 7, 7)),
    (SMALL_MAPS, (64, 256, 14, 14)),
    (FEW, (8, 3, 224, 224)),
    (FEW, (32, 16, 112, 112)),
    (TINY, (256, 100)),
    (TINY, (60, 100)),
    (TINY, (8, 16, 8, 8)),
)
_QUICK = {(32, 64, 56, 56), (4096, 1024), (64, 512, 7, 7), (8, 3, 224, 224), (256, 100)}


def cases(*, quick: bool) -> list[Case]:
    """Every case, or one of each class in float32 with its plain and its ReLU form."""
    found = []
    for group, shape in _SHAPES:
        if quick and shape not in _QUICK:
            continue
        layouts: tuple[Layout, ...] = ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",)
        for layout in layouts:
            for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
                for operation in ("bn", "bn_relu") if quick else ("bn", "bn_relu", "bn_add_relu"):
                    found.append(Case(group, shape, dtype, layout, operation))  # type: ignore[arg-type]
    return found
