"""What save_memory() saves and costs: bytes kept for backward, and the time of a training step with and without it.

Prints a table and adds its rows to the day's CSV. Steps alternate; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import HERE, stamp
from networks import NETWORKS, FusedBlock
from results import append
from timing import per_call
from torch import nn

import batchnorm

SHOWN = ("network", "batch", "kept_mib", "kept_saving_mib", "step_ms", "step_saving_ms")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    head, rows = stamp(), []
    made = {name: (build(batchnorm.BatchNorm2d, FusedBlock), shape) for name, (build, shape) in NETWORKS.items()}
    for name, (model, shape) in {"chain of 8": (_chain(), (16, 3, 56, 56)), **made}.items():
        if options.only in name:
            x = torch.randn(shape).to(memory_format=layout)
            where = {"network": name, "batch": "x".join(map(str, shape)), "layout": str(layout).removeprefix("torch.")}
            rows.append({**head, **where, **_measured(model.to(memory_format=layout), x, options.rounds)})
    print("| network | batch | kept, MiB | with save_memory | step, ms | with save_memory | ratio (20 to 80 %) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        shown = [row[name] for name in SHOWN]
        print("|", *(f"{one} |" for one in shown), f"{row['ratio']} ({row['ratio_p20']} to {row['ratio_p80']}) |")
    append(options.out / f"memory-{head['date'][:10]}.csv", rows)


def _chain() -> nn.Module:
    widths = [3, *[64] * 8]
    pairs = [
        (nn.Conv2d(a, b, 3, padding=1, bias=False), batchnorm.BatchNorm2d(b, activation="relu"))
        for a, b in itertools.pairwise(widths)
    ]
    return nn.Sequential(*(layer for pair in pairs for layer in pair), nn.Conv2d(64, 8, 1))


def _measured(model: nn.Module, x: torch.Tensor, rounds: int) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(saves: bool) -> None:
        optimizer.zero_grad()
        with batchnorm.save_memory() if saves else contextlib.nullcontext():
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()

    report = batchnorm.saved_bytes(model, x)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for saves in (False, True) if number % 2 else (True, False):
            seconds = per_call(lambda saves=saves: step(saves), 1)
            if number:  # the first round warms up
                taken[saves].append(seconds)
    low, ratio, high = np.percentile(np.array(taken[True]) / np.array(taken[False]), [20, 50, 80])
    return {
        "kept_mib": f"{report.plain / 2**20:.1f}",
        "kept_saving_mib": f"{report.saving / 2**20:.1f}",
        "step_ms": f"{np.median(taken[False]) * 1e3:.0f}",
        "step_saving_ms": f"{np.median(taken[True]) * 1e3:.0f}",
        "ratio": f"{ratio:.3f}",
        "ratio_p20": f"{low:.3f}",
        "ratio_p80": f"{high:.3f}",
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()
