"""A stack: K dense networks that differ in seed, rate or initial scale only, trained as if they were one.

Every tensor has the network as its first axis, so one batched matrix product serves all of them and a small network
costs little more than its arithmetic. No value of one network reaches another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.errors import ArgumentError
from batchnorm.functional import batch_norm
from batchnorm.lab.config import Network
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.stats import Moments, Running

CHANNELS = (0, 2)
"""Channel axes of the activations (K, N, C): each unit of each network has statistics of its own."""

Given: TypeAlias = Literal["own", "batch"] | Sequence[Moments | Running]
"""What batch normalisation uses: see `Stack.trace`."""

_MAXOUT_PIECES = 2


@dataclass
class Trace:
    """What a forward pass went through; one entry for each hidden layer.

    Attributes:
        linear: Outputs of the linear maps, before any normalisation, (K, N, units).
        activation_inputs: What the nonlinearity got, (K, N, units).
        moments: Statistics of this batch, (K, units); empty unless they were asked for.
        logits: Output of the network, (K, N, classes).
    """

    linear: list[Tensor] = field(default_factory=list)
    activation_inputs: list[Tensor] = field(default_factory=list)
    moments: list[Moments] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class Stack(nn.Module):
    """K dense networks of one architecture.

    Args:
        networks: One description for each; they may differ in `init_scale` only.
        seeds: One for each. The initial weights of a network depend on its seed, sizes and initial scale alone:
            networks with and without normalisation start from the same weights.
        inputs: Number of features.
        classes: Number of classes.

    Raises:
        ArgumentError: The networks differ in more than their initial scale, or there is not one seed for each.
    """

    def __init__(self, networks: Sequence[Network], seeds: Sequence[int], *, inputs: int, classes: int) -> None:
        super().__init__()
        if len(networks) != len(seeds) or not networks:
            raise ArgumentError(f"expected one seed for each network, got {len(seeds)} and {len(networks)}")
        self.network = networks[0]
        if any(_apart_from_scale(network) != _apart_from_scale(self.network) for network in networks):
            raise ArgumentError("expected networks that differ in init_scale only: train the others in another stack")
        count, net = len(networks), self.network
        self.count = count
        pieces = _MAXOUT_PIECES if net.activation == "maxout" else 1
        before = net.placement == "before"
        sizes_in = [inputs] + [net.width] * net.depth
        sizes_out = [net.width * pieces] * net.depth + [classes]
        self.weights = nn.ParameterList(
            nn.Parameter(weight) for weight in _initial_weights(networks, seeds, sizes_in, sizes_out)
        )
        # Before the activation a bias would be subtracted again with the mean: beta takes its place.
        biased = [not (net.norm == "batch" and before)] * net.depth + [True]
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(count, 1, units), requires_grad=is_trained)
            for units, is_trained in zip(sizes_out, biased, strict=True)
        )
        normalised = [net.width * pieces if before else net.width] * net.depth
        self.norms = nn.ModuleList(_norm(net, count, units) for units in normalised)

    def forward(self, x: Tensor) -> Tensor:
        """The logits, (K, N, classes), of inputs (K, N, features) or (1, N, features) for all networks."""
        return self.trace(x).logits

    def trace(self, x: Tensor, statistics: Given = "own") -> Trace:
        """A forward pass that keeps what it went through.

        Args:
            x: Inputs, (K, N, features), or (1, N, features) if all networks get the same ones.
            statistics: What batch normalisation uses. "own": what the layer does by itself, running statistics in
                evaluation, those of the batch (and an update) in training. "batch": those of this batch, without an
                update, which the trace then holds. Or those of each layer that are given, (K, units).

        Returns:
            The intermediate values and the logits.
        """
        trace = Trace()
        x = x.expand(self.count, *x.shape[1:])
        for layer, norm in enumerate(self.norms):
            linear = self._linear(layer, x)
            trace.linear.append(linear)
            if self.network.placement == "before":
                activation_input = _normalise(norm, linear, statistics, trace, layer)
                x = _activate(activation_input, self.network)
            else:
                activation_input = linear
                x = _normalise(norm, _activate(linear, self.network), statistics, trace, layer)
            trace.activation_inputs.append(activation_input)
        trace.logits = self._linear(len(self.norms), x)
        return trace

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean softmax cross-entropy of each network, (K,), of logits (K, N, classes) and classes (K, N)."""
        count, rows, classes = logits.shape
        each = functional.cross_entropy(logits.reshape(-1, classes), y.reshape(-1), reduction="none")
        return each.view(count, rows).mean(dim=1)

    def _linear(self, layer: int, x: Tensor) -> Tensor:
        return torch.baddbmm(self.biases[layer], x, self.weights[layer])


class _LayerNorm(nn.Module):
    """Layer normalisation of each network, with gamma and beta of its own: (K, N, C) -> (K, N, C)."""

    def __init__(self, count: int, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, 1, units))
        self.bias = nn.Parameter(torch.zeros(count, 1, units))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, functional.layer_norm(x, x.shape[-1:]), self.weight)


def _norm(network: Network, count: int, units: int) -> nn.Module:
    if network.norm == "batch":
        return BatchNorm((count, units), momentum=network.momentum, channel_axis=CHANNELS)
    if network.norm == "layer":
        return _LayerNorm(count, units)
    return nn.Identity()


def _normalise(norm: nn.Module, x: Tensor, statistics: Given, trace: Trace, layer: int) -> Tensor:
    if statistics == "own" or not isinstance(norm, BatchNorm):
        y: Tensor = norm(x)
        return y
    given = None if statistics == "batch" else statistics[layer]
    assert not isinstance(given, str)
    y, used = batch_norm(x, norm.weight, norm.bias, moments=given, eps=norm.eps, channel_axis=CHANNELS)
    if isinstance(used, Moments):
        trace.moments.append(used)
    return y


def _activate(x: Tensor, network: Network) -> Tensor:
    if network.activation == "sigmoid":
        return torch.sigmoid(x)
    if network.activation == "relu":
        return torch.relu(x)
    if network.activation == "maxout":
        return x.reshape(*x.shape[:-1], network.width, _MAXOUT_PIECES).amax(dim=-1)
    return x


def _initial_weights(
    networks: Sequence[Network], seeds: Sequence[int], sizes_in: Sequence[int], sizes_out: Sequence[int]
) -> list[Tensor]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    weights = []
    for fan_in, fan_out in zip(sizes_in, sizes_out, strict=True):
        layer = [
            torch.randn(fan_in, fan_out, generator=generator)
            * (network.init_scale / (math.sqrt(fan_in) if network.init == "fan_in" else 1.0))
            for network, generator in zip(networks, generators, strict=True)
        ]
        weights.append(torch.stack(layer))
    return weights


def _apart_from_scale(network: Network) -> tuple[object, ...]:
    return tuple(value for name, value in vars(network).items() if name != "init_scale")
