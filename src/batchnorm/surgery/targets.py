"""What `convert` can be asked for, and what it makes of a layer."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch

from batchnorm.errors import ArgumentError
from batchnorm.layers.renorm import Schedule

Target: TypeAlias = Literal["batchnorm", "torch", "sync", "ghost", "renorm", "decorrelated", "frozen", "group", "layer"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a target can be told; None leaves it to the target."""

    process_group: Any = None
    ghost_size: int | None = None
    r_max: Schedule | None = None
    d_max: Schedule | None = None
    group_size: int | None = None
    num_groups: int | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not None."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def check(self, to: Target) -> None:
        """Raises ArgumentError where `to` is unknown, or an option does not go with it or is out of its range."""
        if to not in get_args(Target):
            raise ArgumentError(f"to must be one of {', '.join(get_args(Target))}; got {to!r}.")
        for name, value in self.given().items():
            if _TARGET_OF[name] != to:
                raise ArgumentError(f"{name} goes with to={_TARGET_OF[name]!r} only, got to={to!r}.")
            if isinstance(value, int) and value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}.")


_TARGET_OF: dict[str, Target] = {
    "process_group": "sync",
    "ghost_size": "ghost",
    "r_max": "renorm",
    "d_max": "renorm",
    "group_size": "decorrelated",
    "num_groups": "group",
}


class Built(NamedTuple):
    """A layer that can take the old one's place."""

    module: torch.nn.Module
    what: str
    """What it is, in words."""
    keeps_training: bool
    """Whether it computes in training what the old one did."""
    keeps_evaluation: bool = True
    note: str = ""


class Use(NamedTuple):
    """How a layer is called."""

    rank: int | None
    """Axes of its input besides batch and channels, 1 at least; None where it was not seen."""
    is_plain: bool
    """Whether with an input alone: no residual, no mask."""


def joined(notes: list[str]) -> str:
    """Notes as one."""
    return "; ".join(note for note in notes if note)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`.

    Example:
        >>> largest_divisor(40, 16)
        10
    """
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)
