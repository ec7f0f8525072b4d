"""The table of cases (shapes, dtypes, layouts) and the table of tolerances, for every backend and layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

TOLERANCES = {
    # dtype: (relative, absolute); of values and gradients of order 1 against float64
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-4, 2e-5),
    torch.bfloat16: (2e-2, 4e-2),
    torch.float16: (3e-3, 5e-3),
}

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh")

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCES]


def close(actual: torch.Tensor, expected: object, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Asserts that `actual` is `expected` (array or tensor) within the tolerance of `dtype`; NaN fails."""
    rtol, atol = TOLERANCES[dtype]
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=rtol, atol=atol * scale)


@dataclass(frozen=True)
class Layout:
    """A shape and how it lies in memory: `make` gives a float64 tensor of that shape."""

    name: str
    shape: tuple[int, ...]
    arrange: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def make(self, dtype: torch.dtype, seed: int = 0, mean: float = 0.5, std: float = 2.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(self.shape, generator=generator, dtype=torch.float64) * std + mean
        laid = self.arrange(values.to(dtype))
        assert laid.shape == self.shape
        return laid


def _every_second(x: torch.Tensor) -> torch.Tensor:
    """The same values as a slice of something twice as large in every axis."""
    whole = x
    for axis in range(x.ndim):
        whole = whole.repeat_interleave(2, dim=axis)
    return whole[tuple(slice(None, None, 2) for _ in range(x.ndim))]


def _swapped(a: int, b: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.transpose(a, b).contiguous().transpose(a, b)


def _format(memory_format: torch.memory_format) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.contiguous(memory_format=memory_format)


LAYOUTS = [
    Layout("N,C", (9, 4)),
    Layout("N,C transposed", (9, 4), _swapped(0, 1)),
    Layout("N,C sliced", (9, 4), _every_second),
    Layout("N=1,C,L", (1, 3, 7)),
    Layout("N,C=1", (6, 1)),
    Layout("N,C,L=1", (6, 3, 1)),
    Layout("N,C,L", (5, 3, 7)),
    Layout("N,C,L transposed", (5, 3, 7), _swapped(1, 2)),
    Layout("N,C,L expanded", (5, 3, 7), lambda x: x[:, :, :1].expand(5, 3, 7)),
    Layout("N,C,L batch-expanded", (5, 3, 7), lambda x: x[:1].expand(5, 3, 7)),
    Layout("N,C,H,W", (4, 3, 5, 6)),
    Layout("N,C,H,W channels-last", (4, 3, 5, 6), _format(torch.channels_last)),
    Layout(
        "N,C,H,W channels-last sliced", (4, 3, 5, 6), lambda x: _format(torch.channels_last)(x.repeat(2, 1, 1, 1))[:4]
    ),
    Layout("N,C,H,W sliced", (4, 3, 5, 6), _every_second),
    Layout("N,C,H,W transposed", (4, 3, 5, 6), _swapped(2, 3)),
    Layout("N,C,1,1 channels-last", (4, 3, 1, 1), _format(torch.channels_last)),
    Layout("N=1,C,H,W", (1, 3, 5, 6)),
    Layout("N,C=1,H,W channels-last", (4, 1, 5, 6), _format(torch.channels_last)),
    Layout("N,C=17,H=7,W=7", (3, 17, 7, 7)),
    Layout("N,C,D,H,W", (2, 3, 4, 3, 2)),
    Layout("N,C,D,H,W channels-last", (2, 3, 4, 3, 2), _format(torch.channels_last_3d)),
    Layout("N,C,D,H,W sliced", (2, 3, 4, 3, 2), _every_second),
]

LAYOUT_PARAMS = [pytest.param(layout, id=layout.name.replace(" ", "-")) for layout in LAYOUTS]

VIEWS = [layout for layout in LAYOUTS if len(layout.shape) == 3] + [
    Layout("M,C as L=1", (40, 5, 1)),
    Layout("channels-last as N,C,L", (4, 8, 30), _swapped(1, 2)),
    Layout("wide rows", (2, 3, 1030)),
    Layout("many channels", (3, 260, 2)),
]
"""What kernels see: (N, C, L), any strides."""

VIEW_PARAMS = [pytest.param(layout, id=layout.name.replace(" ", "-")) for layout in VIEWS]


def make_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Random values with shape and dtype of x, contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def make_parameters(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (one of them negative, none 0) and bias of that shape."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    weight.view(-1)[0] *= -1
    return weight.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
