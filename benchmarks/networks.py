"""Training steps and evaluation of residual networks and small perceptrons: torch.nn's layers against ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import Sample, per_call
from torch import nn

import batchnorm

Norm = Callable[[int], nn.Module]


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the width at its end (He et al. 2015)."""

    def __init__(self, norm: Norm, into: int, width: int, stride: int, *, is_bottleneck: bool) -> None:
        super().__init__()
        out = width * 4 if is_bottleneck else width
        sizes = [(into, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        if not is_bottleneck:
            sizes = [(into, width, 3, stride), (width, out, 3, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, s, padding=k // 2, bias=False) for a, b, k, s in sizes)
        self.norms = nn.ModuleList(norm(size[1]) for size in sizes)
        self.shortcut: nn.Module = nn.Identity()
        if into != out or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), norm(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
            y = F.relu(norm(conv(y)), inplace=True)
        y = self.norms[-1](self.convs[-1](y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class FusedBlock(Block):
    """The same block written for our layers: each activation, and the sum before the last, in the layer before it.

    Where the shortcut has a layer of its own, the sum is one pass over both branches.
    """

    def __init__(self, norm: Norm, into: int, width: int, stride: int, *, is_bottleneck: bool) -> None:
        super().__init__(norm, into, width, stride, is_bottleneck=is_bottleneck)
        for layer in self.norms:
            layer.activation = "relu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
            y = norm(conv(y))
        y = self.convs[-1](y)
        if isinstance(self.shortcut, nn.Identity):
            return self.norms[-1](y, x)
        conv, norm = self.shortcut
        return batchnorm.dual_batch_norm(self.norms[-1], y, norm, conv(x))


def resnet20(norm: Norm, block: type[Block] = Block) -> nn.Module:
    """ResNet-20 for 32x32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), *_stem(norm(16), block)]
    into = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(3):
            layers.append(block(norm, into, width, stride if i == 0 else 1, is_bottleneck=False))
            into = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet50(norm: Norm, block: type[Block] = Block) -> nn.Module:
    """ResNet-50 for 224x224 images."""
    stem = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), *_stem(norm(64), block)]
    layers: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, padding=1)]
    into = 64
    for width, stride, blocks in ((64, 1, 3), (128, 2, 4), (256, 2, 6), (512, 2, 3)):
        for i in range(blocks):
            layers.append(block(norm, into, width, stride if i == 0 else 1, is_bottleneck=True))
            into = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def perceptron(norm: Norm, block: type[Block] = Block, *, width: int) -> nn.Module:
    """Three hidden layers for 28x28 images, as in the paper's first experiment."""
    norm_of_rows = {nn.BatchNorm2d: nn.BatchNorm1d, batchnorm.BatchNorm2d: batchnorm.BatchNorm1d}[norm]  # type: ignore[index]
    layers: list[nn.Module] = [nn.Flatten()]
    for into in (784, width, width):
        layers += [nn.Linear(into, width), *_stem(norm_of_rows(width), block)]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def _stem(norm: nn.Module, block: type[Block]) -> list[nn.Module]:
    if not issubclass(block, FusedBlock):
        return [norm, nn.ReLU(inplace=True)]
    norm.activation = "relu"
    return [norm, nn.Identity()]  # in ReLU's place, so that the names of the parameters stay


NETWORKS = {
    "MLP-3x100": (partial(perceptron, width=100), (60, 1, 28, 28)),
    "MLP-3x256": (partial(perceptron, width=256), (64, 1, 28, 28)),
    "ResNet-20": (resnet20, (128, 3, 32, 32)),
    "ResNet-50": (resnet50, (8, 3, 224, 224)),
}
"""How to build one, and the shape of a batch."""
OPERATIONS = {"step": "training step", "inference": "evaluation"}
"""What is done in each phase, as the rows call it."""

_PEERS: dict[str, tuple[Norm, type[Block]]] = {
    "eager": (nn.BatchNorm2d, Block),
    "ours": (batchnorm.BatchNorm2d, Block),
    "ours, fused": (batchnorm.BatchNorm2d, FusedBlock),
}
_TOLERANCE = 1e-3
"""Largest difference of outputs, relative to the largest output. Rounding in convolutions alone comes to some 1e-6,
and what torch's own channels-last statistics lose to some 1e-5; deep in ResNet-50 that grows tenfold."""


def samplers(name: str, layout: str, names: list[str]) -> dict[str, Sample]:
    """The network with the layers of each of `names`, from the same weights, on the same batch.

    Raises:
        AssertionError: networks with the same weights disagree about the same batch.
    """
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    layout_ = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    state = build(nn.BatchNorm2d).state_dict()
    x, labels = torch.randn(shape).to(memory_format=layout_), torch.randint(10, shape[:1])
    built = {}
    expected: torch.Tensor | None = None
    for peer in names:
        norm, block = _PEERS[peer]
        network = built[peer] = build(norm, block)
        network.load_state_dict(state)
        network.to(memory_format=layout_)  # type: ignore[call-overload]
        with torch.no_grad():
            output = network(x)
        if expected is None:
            expected = output
        difference = float((output - expected).abs().max() / expected.abs().max())
        assert difference <= _TOLERANCE, f"{name}, {layout}: {peer} and {names[0]} differ by {difference:.1e}"
    return {peer: _phases(network, x, labels) for peer, network in built.items()}


def _phases(network: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Sample:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()

    @torch.inference_mode()
    def evaluate() -> None:
        network(x)

    def sample(calls: int) -> dict[str, float]:
        seconds = {"step": per_call(step, calls)}
        network.eval()
        seconds["inference"] = per_call(evaluate, calls)
        network.train()
        return seconds

    return sample
