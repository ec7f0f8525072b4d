"""What a backend is: four functions on one view of the activations, (N, C, L).

The view may have any strides. Channels-last activations are an (N, C, L) view whose channel stride is 1, and (M, C)
is L = 1, so that one shape serves all of them and a backend looks at the strides to choose a fast path.

The cut between `stats` and `apply`, and between `backward_reduce` and `backward_apply`, is where statistics of
several ranks or ghost batches join. Where nothing comes between, `forward` and `backward` do both halves in one call:
a backend that can keep a part of the tensor in a cache between them gains a pass over memory, another one composes its
halves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias, get_args

from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running

if TYPE_CHECKING:
    import torch

Activation = Literal["relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh"]

ACTIVATION_CODES: dict[Activation | None, int] = {
    None: 0,
    **{name: i for i, name in enumerate(get_args(Activation), 1)},
}
"""The numbers that csrc/call.hpp has for them."""

Statistics: TypeAlias = Moments | Running
"""What x is normalised with: a batch's Moments, or running statistics, which have no count."""


class Affine(NamedTuple):
    """What is done to x - mean: y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)."""

    weight: torch.Tensor | None
    """(C,), the float dtype of x or float32; None is 1."""
    bias: torch.Tensor | None
    """(C,), likewise; None is 0."""
    eps: float
    activation: Activation | None


class BackwardSums(NamedTuple):
    """The two sums of a channel in the closed form of backward; they are the gradients of bias and weight too."""

    dz: torch.Tensor
    """(C,): sum of dz, the gradient before the activation."""
    dz_xhat: torch.Tensor
    """(C,): sum of dz * x_hat."""


class Gradients(NamedTuple):
    """What a whole backward pass gives."""

    x: torch.Tensor
    """dx, like x."""
    residual: torch.Tensor | None
    """dresidual, like the residual; None without one."""
    sums: BackwardSums


class Branch(NamedTuple):
    """One of two normalisations whose results are added up."""

    x: torch.Tensor
    """(N, C, L), any strides."""
    statistics: Statistics
    affine: Affine
    """The first one's activation is that of the sum; the second one has none."""


class BranchGradients(NamedTuple):
    """What backward gives for a `Branch`."""

    x: torch.Tensor
    """dx, like x."""
    sums: BackwardSums | None
    """None where they are not wanted."""


class Core(NamedTuple):
    """What the compiled CPU core runs with."""

    instruction_set: str
    instruction_sets: tuple[str, ...]
    """All that this machine can run."""
    caches: tuple[int, int]
    """Bytes of the second level (one core's) and of the third, which the tile sizes follow."""
    has_exchange_api: bool
    """Whether tensors are read through DLPack's exchange API."""
    pool: tuple[int, int, int]
    """Bytes of the pool of output buffers: most that may lie idle, now idle, now in use."""


class Backend(Protocol):
    """The kernel contract.

    x, y, dy, dx and residual are (N, C, L), any strides, one float dtype; arithmetic is at least float32.
    """

    @property
    def folds(self) -> bool:
        """Whether it takes (N, C, ...) too, and folds the trailing axes itself."""
        ...

    @property
    def packs(self) -> bool:
        """Whether it is a `PackingBackend`."""
        ...

    @property
    def pairs(self) -> bool:
        """Whether it is a `DualBackend`."""
        ...

    def forward(
        self,
        x: torch.Tensor,
        affine: Affine,
        residual: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Moments]:
        """`stats` and `apply` in one: y and the Moments of x."""
        ...

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        statistics: Statistics,
        affine: Affine,
        residual: torch.Tensor | None = None,
        *,
        is_estimated: bool,
        mask: torch.Tensor | None = None,
    ) -> Gradients:
        """`backward_reduce` and `backward_apply` in one; `is_estimated`: whether dx takes part in the sums."""
        ...

    def stats(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Moments:
        """Moments of each channel, (C,), over the positions where mask, (N, 1, L) bool, is True."""
        ...

    def apply(
        self, x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """activation((x - mean) * inv_std * weight + bias + residual), dtype and strides of x."""
        ...

    def backward_reduce(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        statistics: Statistics,
        affine: Affine,
        residual: torch.Tensor | None = None,
    ) -> BackwardSums:
        """The two sums over N and L, at least float32."""
        ...

    def backward_apply(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        statistics: Statistics,
        affine: Affine,
        residual: torch.Tensor | None = None,
        *,
        sums: BackwardSums | None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dx and dresidual (None without a residual); with sums=None the statistics are constants, as at inference.

        dx = weight * inv_std * (dz - mask / count * (sums.dz + x_hat * sums.dz_xhat)), dresidual = dz.
        """
        ...


class PackingBackend(Backend, Protocol):
    """A backend that keeps one bit an element for the backward of ReLU, where otherwise the residual must be kept.

    Its backward functions take the bits in the place of the residual; there is no mask then.
    """

    def apply_packing(
        self, x: torch.Tensor, statistics: Statistics, affine: Affine, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`apply`, and the bits, uint8: whether ReLU lets an element through; None where bits are not the way."""
        ...

    def unpacked(self, signs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The bits of `apply_packing` for that x as bool, (N, C, L)."""
        ...


class DualBackend(Backend, Protocol):
    """A backend that adds two normalised tensors up as it normalises them: neither result is written and read again.

    That is `apply(first, residual=apply(second))` and its backward; both x have one shape and one dtype.
    """

    def apply_both(self, first: Branch, second: Branch) -> torch.Tensor:
        """activation(BN(first.x) + BN(second.x)), dtype and strides of first.x."""
        ...

    def backward_both(
        self, dy: torch.Tensor, first: Branch, second: Branch, *, is_estimated: tuple[bool, bool], wants_sums: bool
    ) -> tuple[BranchGradients, BranchGradients]:
        """The gradients of both; `is_estimated`: whether dx takes part in the sums, which are wanted then."""
        ...
