"""What a batch normalization layer is in every framework: numbers, settings, and what can be asked of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

Rule: TypeAlias = Literal["biased", "unbiased"]
"""Which variance of a batch moves the running one: divided by n, or by n - 1."""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What is carried over; arrays of the shape of the channel axes, float64."""

    mean: Array
    """Running mean."""
    var: Array
    """Running variance, as it is stored."""
    gamma: Array | None
    """None where the layer has no scale."""
    beta: Array | None
    eps: float
    momentum: float | None
    """Weight of the NEW value; None is the plain average over all batches (PyTorch)."""


class PortableLayer(Protocol):
    """A batch normalization layer of some framework."""

    name: str
    """Where it is in its model; "" is the model itself."""
    kind: str
    """Framework and class, as "torch BatchNorm2d"."""
    axis: tuple[int, ...]
    """The channel axes of its inputs."""
    ranks: tuple[int, ...] | None
    """Numbers of axes that its inputs may have; None is any."""
    rule: Rule
    only_inference: str
    """Why a training step cannot be tried, or ""."""

    def obstacle(self) -> str:
        """Why the layer has no counterpart in other frameworks, or ""."""
        ...

    def numbers(self) -> Numbers:
        """What it holds now."""
        ...

    def write(self, numbers: Numbers) -> None:
        """Puts the numbers there; a gamma or beta that the layer has and the numbers lack becomes 1 or 0."""
        ...

    def twin(self, rank: int) -> PortableLayer:
        """A copy in float32, for inputs of that rank, without anything that looks on."""
        ...

    def run(self, x: npt.NDArray[np.float32], *, training: bool) -> Array:
        """Output for `x`; in training the running statistics move. For twins."""
        ...


class Framework(Protocol):
    """What can be asked of a model of some framework; each file of a framework is one."""

    def owns(self, model: Any) -> bool:
        """Whether the model is one of this framework."""
        ...

    def layers(self, model: Any) -> list[PortableLayer]:
        """Its batch normalization layers, in the order of definition; the model may be one itself."""
        ...

    def others(self, model: Any) -> Mapping[str, int]:
        """Its other layers with weights: class name -> how many."""
        ...

    def refresh(self, model: Any) -> None:
        """Lets go of what was compiled with the old settings."""
        ...


def turned(momentum: float) -> float:
    """The weight of the new value from that of the old one, and the other way round; 0.01 from 0.99, to the digit."""
    return round(1.0 - momentum, 12)


def others_counted(kinds: list[str]) -> dict[str, int]:
    """How often each name comes, most often first."""
    return dict(sorted({kind: kinds.count(kind) for kind in kinds}.items(), key=lambda item: -item[1]))
