"""DomainBatchNorm: statistics of their own for each named domain, one weight and bias for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError
from batchnorm.kernels.contract import Activation
from batchnorm.layers.batch_norm import BatchNorm

_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class DomainBatchNorm(torch.nn.Module):
    """Batch normalization with separate statistics for named domains: source and target, real and generated, two views.

    One BatchNorm for each domain, all with the same weight and bias; a batch passes through the one whose domain is
    chosen, by `use_domain(model, name)`, the attribute `domain`, or forward's argument. A batch has one domain: split
    mixed ones.

    Checkpoints: one of torch.nn's BatchNorm layers loads into every domain; domains["target"].state_dict() is again
    one of torch.nn's.

    Args:
        num_features: number of channels, C; see BatchNorm.
        eps: added to the variance; unit of the input, squared.
        momentum: weight of the NEW batch in the running statistics; None keeps the plain average over all batches.
        affine: whether there are weight (gamma) and bias (beta), shared by the domains.
        track_running_stats: whether there are running statistics; without them evaluation uses the batch's too.
        device: of parameters and buffers.
        dtype: of parameters and buffers; running statistics are float32 at least.
        domains: their names; the first is chosen to begin with.
        bias: whether there is a beta where `affine` is on.
        activation: fused into the layer; see BatchNorm.
        channel_axis: the axis of the channels, or a tuple of axes.

    Attributes:
        domains: ModuleDict of one BatchNorm for each domain.
        domain: name of the chosen one.

    Raises:
        ArgumentError: no domain, a name twice, or one that cannot name a module.

    Example:
        >>> layer = DomainBatchNorm(3, domains=("source", "target"))
        >>> with use_domain(layer, "target"):
        ...     y = layer(torch.randn(8, 3) + 10)
        >>> [int(one.num_batches_tracked) for one in layer.domains.values()]
        [0, 1]

    Source: Li et al. 2016 (arXiv 1603.04779, AdaBN: statistics by domain); Chang et al. 2019 (arXiv
    1906.03950, DSBN), where weight and bias are by domain too.
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        domains: Sequence[str],
        bias: bool = True,
        activation: Activation | None = None,
        channel_axis: int | tuple[int, ...] = 1,
    ) -> None:
        super().__init__()
        _check_names(domains)
        self.domains = torch.nn.ModuleDict()
        for name in domains:
            self.domains[name] = BatchNorm(
                num_features,
                eps,
                momentum,
                affine,
                track_running_stats,
                device,
                dtype,
                bias=bias,
                activation=activation,
                channel_axis=channel_axis,
            )
        self._domain = domains[0]
        self._share_weights()
        self.register_load_state_dict_post_hook(_share_again)  # type: ignore[no-untyped-call]

    @property
    def domain(self) -> str:
        """The name of the domain whose statistics are used."""
        return self._domain

    @domain.setter
    def domain(self, name: str) -> None:
        self._check_domain(name)
        self._domain = name

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None, domain: str | None = None
    ) -> Tensor:
        """Activation(BN(input) + residual) with the statistics of one domain.

        Args:
            input: activations, (N, C, ...) with the channels on `channel_axis`, float.
            residual: shape and dtype of the input; added before the activation.
            mask: bool, True = counts in the statistics; see BatchNorm.
            domain: instead of the chosen one.

        Returns:
            Shape, dtype and memory format of the input.

        Raises:
            ArgumentError: there is no such domain.
            ShapeError: as BatchNorm.
            DtypeError: as BatchNorm.
        """
        name = self._domain if domain is None else domain
        self._check_domain(name)
        y: Tensor = self.domains[name](input, residual, mask=mask)
        return y

    def _check_domain(self, name: str) -> None:
        if name not in self.domains:
            raise ArgumentError(f"domain must be one of {', '.join(map(repr, self.domains))}; got {name!r}.")

    def _share_weights(self) -> None:
        """One Parameter under the name of each domain: moving or loading a module may have made several of it."""
        first, *rest = self.domains.values()
        for other in rest:
            other.weight, other.bias = first.weight, first.bias

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> DomainBatchNorm:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._share_weights()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for key in _STATE:
            if prefix + key in state_dict:  # of a layer without domains: what it knows holds for each of them
                value = state_dict.pop(prefix + key)
                for name in self.domains:
                    state_dict.setdefault(f"{prefix}domains.{name}.{key}", value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What repr() shows before the domains' layers."""
        return f"domain={self._domain!r}"


@contextmanager
def use_domain(model: torch.nn.Module, domain: str) -> Iterator[None]:
    """Chooses `domain` in every DomainBatchNorm of `model` for a while; afterwards each has its former one again.

    Args:
        model: a layer or any module that holds some.
        domain: a name that all of them know.

    Raises:
        ArgumentError: a layer does not know the domain, or there is no DomainBatchNorm in the model.
    """
    layers = [module for module in model.modules() if isinstance(module, DomainBatchNorm)]
    if not layers:
        raise ArgumentError(
            f"there is no DomainBatchNorm in this {type(model).__name__}: use_domain has nothing to do."
        )
    before = [layer.domain for layer in layers]
    try:
        for layer in layers:
            layer.domain = domain
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.domain = old


def _share_again(layer: torch.nn.Module, _: Any) -> None:
    cast(DomainBatchNorm, layer)._share_weights()


def _check_names(domains: Sequence[str]) -> None:
    is_list = isinstance(domains, Sequence) and not isinstance(domains, str)
    if not is_list or not domains or len(set(domains)) != len(domains):
        raise ArgumentError(f"domains must be a list of at least one name and none twice, got {domains!r}.")
    for name in domains:
        if not isinstance(name, str) or not name or "." in name or hasattr(torch.nn.ModuleDict, name):
            raise ArgumentError(f"a domain's name must be a plain word that torch.nn.ModuleDict takes, got {name!r}.")
