"""What a batch gives to the layer: its statistics, and what may be done with them before they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias


class Batch(NamedTuple):
    """Statistics of a batch, as the backend's tensors."""

    mean: Any
    """Shape of the channel axes; float32 or wider, without gradient."""
    variance: Any
    """Likewise; biased."""
    count: Any
    """Values behind each: an int, or a scalar integer tensor where a mask or a traced shape decides."""


Correction: TypeAlias = Callable[[Batch], tuple[Any, Any]]
"""gamma and beta to use with this batch, for renormalization."""
