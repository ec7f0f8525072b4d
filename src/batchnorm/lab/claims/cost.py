"""What batch normalization costs a training step: seconds, and memory kept for the backward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import ImageNetwork, ImageTraining, Job, Run, Tier
from batchnorm.lab.fit import batches, data_of, image_shape
from batchnorm.lab.measures import (
    find,
    key,
    measure_over_seeds,
    of_arm,
    ratio_over_seeds,
    said,
)
from batchnorm.lab.networks import build
from batchnorm.lab.record import make_record, significant
from batchnorm.lab.train import one_thread
from batchnorm.layers.batch_norm import BatchNorm2d

CHEAP = 1.3
"""Shown: a step with our layers takes at most so many times as long as one without batch normalization."""
REPEATS, WARM_UP = 30, 3
NONE, OURS, TORCH, FUSED = "without", "batchnorm", "torch.nn", "batchnorm, ReLU fused"
ARMS = (NONE, OURS, TORCH, FUSED)

CARD = Card(
    name="cost",
    tier="full",
    title="Batch normalization costs little time and memory",
    claim="Normalisation adds little to the cost of a training step.",
    source="Ioffe & Szegedy 2015, section 3 (as against whitening); Gitman & Ginsburg 2017 (arXiv 1709.08145): a "
    "quarter of the time of ResNet-50",
    paper_figure="about a quarter of a training step of ResNet-50 on a GPU",
    setup=f"A VGG of six convolutions, batches of 64 images averaged down to 16x16, one thread. {REPEATS} steps "
    "(forward, backward, update) of each arm in turn, so that the machine's moods meet all of them; the median. "
    "Memory: bytes of all tensors that autograd keeps between forward and backward, each storage counted once.",
    caveat="One small network on one processor: the price depends on both. Times are measured while another run may "
    "use the second core, so ratios are to be read, not seconds.",
    threshold=f"Seconds of a step, batchnorm over without: at most {CHEAP:g}, and batchnorm over torch.nn at most 1 "
    f"(upper ends of the intervals). Partly: one of them.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """One job a seed: all arms in it are measured in turn."""
    training = ImageTraining(rows=2_000, side=16, batch_size=64, steps=0, evaluations=(0,))
    return [
        Job(
            CARD.name,
            tuple(
                Run(
                    CARD.name,
                    arm,
                    seed,
                    0.01,
                    ImageNetwork(kind="vgg", norm="none" if arm == NONE else "batch"),
                    training,
                )
                for arm in ARMS
            ),
        )
        for seed in seeds
    ]


def run(job: Job) -> list[dict[str, Any]]:
    """Measure. Values: "seconds" of a step (median), "kept" bytes between forward and backward."""
    started = time.perf_counter()
    with one_thread():
        data = data_of(job.runs[0], job.images)
        steps, kept = [], []
        for one in job.runs:
            assert isinstance(one.network, ImageNetwork)
            network = build(one.network, image_shape(data), data.classes, seed=one.seed)
            network = _as_arm(network, one.arm).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            x, y = next(batches(data.train, size=one.training.batch_size, seed=one.seed))
            steps.append(_step(network, x, y, one.rate))
            kept.append(_kept(network, x, y))
        times: list[list[float]] = [[] for _ in steps]
        for repeat in range(WARM_UP + REPEATS):
            for of, step in zip(times, steps, strict=True):
                clock = time.perf_counter()
                step()
                if repeat >= WARM_UP:
                    of.append(time.perf_counter() - clock)
    seconds = (time.perf_counter() - started) / len(job.runs)
    return [
        make_record(
            one,
            curves={"step": [0]},
            values={"seconds": significant(statistics.median(of), 4), "kept": size},
            seconds=seconds,
            data_sha256=data.sha256,
        )
        for one, of, size in zip(job.runs, times, kept, strict=True)
    ]


def measure(records: Sequence[Record]) -> list[Measure]:
    """Ratios of seconds and of memory to a step without, and to torch.nn; the milliseconds and megabytes."""
    arms = {arm: sorted(of_arm(records, arm), key=lambda record: int(record["seed"])) for arm in ARMS}
    found = []
    for what, words in (("seconds", "seconds of a step"), ("kept", "memory kept for backward")):
        for one, other in ((OURS, NONE), (OURS, TORCH), (TORCH, NONE), (FUSED, NONE)):
            ratios = [
                max(a["values"][what], 1e-9) / max(b["values"][what], 1e-9)
                for a, b in zip(arms[one], arms[other], strict=True)
            ]
            found.append(
                ratio_over_seeds(f"{what}_{key(one)}_over_{key(other)}", f"{words}: {one} over {other}", ratios)
            )
        unit, scale = ("ms", 1e3) if what == "seconds" else ("MB", 1e-6)
        for arm, of in arms.items():
            values = [scale * record["values"][what] for record in of]
            found.append(measure_over_seeds(f"{what}_{key(arm)}", f"{words}, {arm}", unit, values))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    ours, other = find(measures, "seconds_batchnorm_over_without"), find(measures, "seconds_torch_nn_over_without")
    against, fused = (
        find(measures, "seconds_batchnorm_over_torch_nn"),
        find(measures, "kept_batchnorm_relu_fused_over_without"),
    )
    kept = find(measures, "kept_batchnorm_over_without")
    reading = (
        f"A step with batchnorm takes {said(ours)} as long as one without batch normalization, with torch.nn "
        f"{said(other)}; batchnorm over torch.nn is {said(against)}. Memory kept for the backward pass is {said(kept)} "
        f"that without, and {said(fused)} with the ReLU fused into the layer."
    )
    holds = [ours.high <= CHEAP, against.high <= 1]
    return Verdict("shown" if all(holds) else "partly" if any(holds) else "not shown", ours, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Milliseconds and megabytes of each arm, every seed a dot."""
    from batchnorm.reporting.figures import BLUE, GREEN, GREY, ORANGE, panel

    figures: Figures = {}
    for what, title, axis in (("seconds", "Time of a training step", "ms"), ("kept", "Memory kept for backward", "MB")):
        drawing, axes = panel(title, "", axis)
        told = []
        for place, (arm, colour) in enumerate(zip(ARMS, (GREY, BLUE, ORANGE, GREEN), strict=True)):
            of = find(measures, f"{what}_{key(arm)}")
            axes.bar([place], [of.mean], width=0.6, color=colour, alpha=0.75)
            axes.plot([place] * len(of.values), of.values, color=colour, marker="o", linestyle="")
            told.append(f"{arm} {of.mean:.3g} {axis}")
        axes.set_xticks(range(len(ARMS)), [arm.replace(", ", ",\n") for arm in ARMS])
        figures[what] = (drawing, f"{title}, every seed a dot: {'; '.join(told)}.")
    return figures


def _as_arm(network: nn.Module, arm: str) -> nn.Module:
    """The network with torch.nn's layers, or with the ReLU inside of ours."""
    for block in network.modules():
        norm = getattr(block, "norm", None)
        if not isinstance(norm, BatchNorm2d):
            continue
        channels = int(norm.weight.numel())
        if arm == TORCH:
            block.norm = nn.BatchNorm2d(channels)
        elif arm == FUSED and isinstance(getattr(block, "activation", None), nn.ReLU):
            block.norm, block.activation = BatchNorm2d(channels, activation="relu"), nn.Identity()
    return network


def _step(network: nn.Module, x: Tensor, y: Tensor, rate: float) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _kept(network: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes that autograd keeps, parameters and the images left out."""
    given = {one.untyped_storage().data_ptr() for one in (*network.parameters(), *network.buffers(), x, y)}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = functional.cross_entropy(network(x), y)
    del loss
    return sum(seen.values())
