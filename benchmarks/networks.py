"""Whole training steps of ResNet-20 at CIFAR size and ResNet-50 at 224: torch.nn's layers against ours."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from layers import HERE, stamp
from timing import Sample, interleave, timed
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


def resnet20(norm: Norm) -> nn.Module:
    """ResNet-20 for 32x32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(inplace=True)]
    into = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(3):
            layers.append(Block(norm, into, width, stride if i == 0 else 1, is_bottleneck=False))
            into = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet50(norm: Norm) -> nn.Module:
    """ResNet-50 for 224x224 images."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), norm(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1),
    ]  # fmt: skip
    into = 64
    for width, stride, blocks in ((64, 1, 3), (128, 2, 4), (256, 2, 6), (512, 2, 3)):
        for i in range(blocks):
            layers.append(Block(norm, into, width, stride if i == 0 else 1, is_bottleneck=True))
            into = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def _step(network: nn.Module, shape: tuple[int, ...], layout: torch.memory_format) -> Sample:
    network = network.to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(shape).to(memory_format=layout), torch.randint(10, shape[:1])

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()

    return lambda: {"step": timed(step)[1]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ResNet-20 only, in about ten seconds")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    networks = [("ResNet-20", resnet20, (128, 3, 32, 32), 10.0)]
    if not options.quick:
        networks.append(("ResNet-50", resnet50, (8, 3, 224, 224), 60.0))
    rows = []
    for name, build, shape, budget in networks:
        for layout in (torch.contiguous_format, torch.channels_last):
            if options.quick and layout == torch.channels_last:
                continue
            samplers = {
                "eager": _step(build(nn.BatchNorm2d), shape, layout),
                "ours": _step(build(batchnorm.BatchNorm2d), shape, layout),
            }
            found = interleave(samplers, budget=budget / 2, at_least=5)
            eager = found["eager", "step"].median
            for (peer, _), summary in found.items():
                rows.append(
                    {
                        **stamp(),
                        "network": f"{name} {shape}",
                        "layout": str(layout).removeprefix("torch."),
                        "peer": peer,
                        "median_ms": f"{summary.median * 1e3:.2f}",
                        "p20_ms": f"{summary.low * 1e3:.2f}",
                        "p80_ms": f"{summary.high * 1e3:.2f}",
                        "samples": summary.samples,
                        "speedup": f"{eager / summary.median:.3f}",
                    }
                )
                row = rows[-1]
                print(
                    f"{row['network']} {row['layout']}: {peer} {row['median_ms']} ms a step, {row['speedup']} x eager"
                )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"networks{'-quick' if options.quick else ''}-{rows[0]['date'][:10]}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
