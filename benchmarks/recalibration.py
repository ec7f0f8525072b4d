"""What recalibrate() costs beside a plain forward pass of the same batches, on a CPU.

Measured in turn: the forward pass in evaluation and in training mode, torch's update_bn, recalibrate in the batch
reading and, if asked, in the sequential reading. Medians of CPU seconds of one thread (other work on the machine counts
less than in wall time), and their ratio to the forward pass in evaluation mode.
Run: python benchmarks/recalibration.py [--rounds 7] [--sequential]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from networks import resnet20, resnet50
from torch import nn

import batchnorm


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequential", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| network | batches | what | ms | ratio |\n| --- | --- | --- | --- | --- |")
    for name, model, shape, number in (
        ("ResNet-20, torch.nn", resnet20(nn.BatchNorm2d), (128, 3, 32, 32), 4),
        ("ResNet-20, batchnorm", resnet20(batchnorm.BatchNorm2d), (128, 3, 32, 32), 4),
        ("ResNet-50, torch.nn", resnet50(nn.BatchNorm2d), (8, 3, 224, 224), 4),
        ("MLP 3x512, torch.nn", _mlp(nn.BatchNorm1d), (256, 784), 64),
    ):
        batches = [torch.randn(shape) for _ in range(number)]
        times = _measured(model, batches, arguments.rounds, sequential=arguments.sequential)
        plain = times["forward, evaluation"]
        for what, seconds in times.items():
            print(f"| {name} | {len(batches)} x {shape} | {what} | {seconds * 1e3:.0f} | {seconds / plain:.2f} |")


def _mlp(norm: type[nn.Module]) -> nn.Module:
    sizes = [784, 512, 512, 512]
    hidden = [(nn.Linear(a, b, bias=False), norm(b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(layer for block in hidden for layer in block), nn.Linear(512, 10))


def _measured(model: nn.Module, batches: list[torch.Tensor], rounds: int, *, sequential: bool) -> dict[str, float]:
    def forward(mode: bool) -> None:
        model.train(mode)
        with torch.no_grad():
            for batch in batches:
                model(batch)

    contenders: dict[str, Callable[[], object]] = {
        "forward, evaluation": lambda: forward(False),
        "forward, training": lambda: forward(True),
        "torch.optim.swa_utils.update_bn": lambda: torch.optim.swa_utils.update_bn(batches, model),
        "recalibrate, batch reading": lambda: batchnorm.recalibrate(model, batches, reading="batch"),
    }
    if sequential:
        contenders["recalibrate, sequential reading"] = lambda: batchnorm.recalibrate(model, batches)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            model.eval()
            start = time.process_time()
            contender()
            samples[name].append(time.process_time() - start)
    return {name: float(np.median(taken)) for name, taken in samples.items()}


if __name__ == "__main__":
    main()
