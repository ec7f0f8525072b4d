"""What recalibrate() costs beside a plain forward pass of the same batches, on a CPU.

Prints a table and adds its rows to the day's CSV.

In turn, round after round: the forward pass in evaluation and in training mode, torch's update_bn, recalibrate in both
readings, and if asked the sequential reading with a pass for each layer. Each ratio is the median of the rounds' ratios
to the forward pass in evaluation mode. The first round stands for itself: forwards that wait need memory, which is new
then.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import HERE, stamp
from networks import resnet20, resnet50
from results import append
from timing import per_call
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm

PLAIN = "forward, evaluation"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--passes", action="store_true", help="the sequential reading with a pass for each layer, too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    head, rows = stamp(), []
    for number, (name, _, shape, batches) in enumerate(_NETWORKS):
        if options.only not in name:
            continue
        # In a process of its own: no network finds the memory of another.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            taken = pool.submit(_measured, number, options.rounds, options.threads, passes=options.passes).result()
        rows += [{**head, "network": name, "batches": f"{batches} x {shape}", **row} for row in _summaries(taken)]
    print("| network | batches | what | ms | ratio |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['network']} | {row['batches']} | {row['what']} | {row['median_ms']} | {row['ratio']} |")
    path = options.out / f"recalibration-{head['date'][:10]}.csv"
    append(path, rows)
    print(f"added to {path}")


def _mlp(width: int) -> nn.Module:
    sizes = [784, width, width, width]
    hidden = [(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(layer for block in hidden for layer in block), nn.Linear(width, 10))


class _InAClass(nn.Module):
    """Calls the modules of a chain one after the other, as a forward of one's own does."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(chain.children())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x


def _vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if a == b else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


_NETWORKS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = [
    ("ResNet-20, torch.nn", lambda: resnet20(nn.BatchNorm2d), (128, 3, 32, 32), 10),
    ("ResNet-20, batchnorm", lambda: resnet20(batchnorm.BatchNorm2d), (128, 3, 32, 32), 10),
    ("ResNet-20, torch.nn", lambda: resnet20(nn.BatchNorm2d), (32, 3, 32, 32), 40),
    ("ResNet-50, torch.nn", lambda: resnet50(nn.BatchNorm2d), (8, 3, 224, 224), 10),
    ("VGG of six convolutions, torch.nn", _vgg, (128, 3, 32, 32), 16),
    ("MLP 3x512, torch.nn", lambda: _mlp(512), (256, 784), 64),
    ("MLP 3x100, torch.nn", lambda: _mlp(100), (512, 784), 20),
    ("MLP 3x100, torch.nn", lambda: _mlp(100), (60, 784), 20),
    ("MLP 3x100, torch.nn", lambda: _mlp(100), (60, 784), 320),
    ("MLP 3x100 in a class, torch.nn", lambda: _InAClass(_mlp(100)), (60, 784), 320),
    ("MLP 3x100 in a class, DataLoader, torch.nn", lambda: _InAClass(_mlp(100)), (60, 784), 320),
]


def _measured(network: int, rounds: int, threads: int, *, passes: bool) -> dict[str, list[float]]:
    """Seconds of each contender in each round; the first round, in which memory is new, is the first sample."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    name, make, shape, number = _NETWORKS[network]
    model = make()
    batches: Iterable[Any] = [torch.randn(shape) for _ in range(number)]
    if "DataLoader" in name:
        batches = DataLoader(TensorDataset(torch.cat(list(batches))), batch_size=shape[0])

    def forward(mode: bool) -> None:
        model.train(mode)
        with torch.no_grad():
            for batch in batches:
                model(batch if isinstance(batch, torch.Tensor) else batch[0])

    contenders: dict[str, Callable[[], object]] = {
        PLAIN: lambda: forward(False),
        "recalibrate, sequential reading": lambda: batchnorm.recalibrate(model, batches),
        "recalibrate, batch reading": lambda: batchnorm.recalibrate(model, batches, reading="batch"),
        "forward, training": lambda: forward(True),
        "torch.optim.swa_utils.update_bn": lambda: torch.optim.swa_utils.update_bn(batches, model),
    }
    if passes:
        contenders["recalibrate, a pass for each layer"] = lambda: batchnorm.recalibrate(model, batches, memory=0)
    samples: dict[str, list[float]] = {what: [] for what in contenders}
    forward(False)
    for _ in range(rounds + 1):
        for what, contender in contenders.items():
            model.eval()
            samples[what].append(per_call(contender, 1))
    return samples


def _summaries(samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    plain = np.array(samples[PLAIN])
    parts = {f"{what}, first call": (taken[:1], plain[:1]) for what, taken in samples.items() if what != PLAIN}
    parts |= {what: (taken[1:], plain[1:]) for what, taken in samples.items()}
    rows = []
    for what, (taken, beside) in parts.items():
        low, median, high = np.percentile(taken, [20, 50, 80]) * 1e3
        ratios = np.percentile(np.array(taken) / beside, [20, 50, 80])
        rows.append(
            {"what": what, "median_ms": f"{median:.1f}", "p20_ms": f"{low:.1f}", "p80_ms": f"{high:.1f}"}
            | {"rounds": len(taken), "ratio": f"{ratios[1]:.3f}"}
            | {"ratio_p20": f"{ratios[0]:.3f}", "ratio_p80": f"{ratios[2]:.3f}"}
        )
    return rows


if __name__ == "__main__":
    main()
