"""Your network: does what it does in evaluation agree with what it does in training?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import ImageTraining, Job, OwnNetwork, Run, Tier
from batchnorm.lab.data import Dataset, Split
from batchnorm.lab.fit import accuracy_and_loss, fit
from batchnorm.lab.measures import (
    at_best_rate,
    final_validation_accuracy,
    find,
    measure_over_seeds,
    of_arm,
    said,
)
from batchnorm.lab.record import significant
from batchnorm.recalibration import recalibrate

CLOSE = 2.0
"""Shown: at the end, moving average and population statistics are less than so many points apart."""
STEPS, BATCH = 150, 64
LOOKS = (15, 50, STEPS)
RATES = (0.03, 0.1, 0.3)
SAMPLE, TESTED = 1_000, 1_000
ARM = "batch norm"
MOVING, POPULATION = "moving average", "population"

CARD = Card(
    name="own_statistics",
    tier="network",
    title="Your network's moving averages are as good as population statistics",
    claim="The running statistics that your network keeps while it trains are good enough at inference.",
    source="Ioffe & Szegedy 2015, section 3.1; Wu & Johnson 2021 (arXiv 2105.07576), section 3",
    paper_figure="",
    setup=f"{STEPS} steps of plain SGD, batches of {BATCH}, rates {', '.join(f'{rate:g}' for rate in RATES)}, the "
    f"best one by final validation accuracy. At steps {', '.join(map(str, LOOKS))} up to {TESTED} validation images "
    f"are classified with the moving average as your layers keep it, and with the population statistics of up to "
    f"{SAMPLE} training images.",
    caveat="With a longer training and a lower rate at its end moving averages catch up. If they lag here, call "
    "recalibrate before you evaluate early, and after any change of the weights.",
    threshold=f"Accuracy, population less moving average, at the end: less than {CLOSE:g} points (upper end of the "
    f"interval). Partly: the mean is.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each run."""
    training = ImageTraining(batch_size=BATCH, steps=STEPS, evaluations=(0, *LOOKS))
    return [
        Job(CARD.name, (Run(CARD.name, ARM, seed, rate, OwnNetwork(), training),)) for seed in seeds for rate in RATES
    ]


def run(job: Job) -> list[dict[str, Any]]:
    """Train and classify. Values: estimate -> accuracy at each evaluation."""
    return fit(job, _Estimates)


def measure(records: Sequence[Record]) -> list[Measure]:
    """Gaps and accuracies at each look."""
    of = at_best_rate(of_arm(records, ARM), final_validation_accuracy)
    steps = of[0]["curves"]["step"][1:]
    found = []
    for place, step in enumerate(steps, start=1):
        gaps = [100 * (one["values"][POPULATION][place] - one["values"][MOVING][place]) for one in of]
        label = f"accuracy: {POPULATION} less {MOVING}, step {step}, rate {of[0]['rate']:g}"
        found.append(measure_over_seeds(f"gap_{'end' if step == steps[-1] else step}", label, "points", gaps))
    for estimate in (MOVING, POPULATION):
        values = [100 * one["values"][estimate][-1] for one in of]
        name = f"accuracy_{estimate.replace(' ', '_')}"
        found.append(measure_over_seeds(name, f"accuracy, {estimate}, at the end", "%", values))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    end, first = find(measures, "gap_end"), measures[0]
    reading = (
        f"At the first look population statistics classify {said(first)} better than your network's moving averages, "
        f"at the end {said(end)}."
    )
    return Verdict("shown" if end.high < CLOSE else "partly" if end.mean < CLOSE else "not shown", end, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Accuracy over steps with both, every seed a dot."""
    from batchnorm.reporting.figures import BLUE, DASHES, ORANGE, legend, panel

    of = at_best_rate(of_arm(records, ARM), final_validation_accuracy)
    drawing, axes = panel("Accuracy with each estimate", "step", "validation accuracy (%)")
    told = []
    for (estimate, colour), dashes in zip(((POPULATION, BLUE), (MOVING, ORANGE)), DASHES, strict=False):
        rows = [[100 * value for value in one["values"][estimate]] for one in of]
        mean = [sum(column) / len(column) for column in zip(*rows, strict=True)]
        axes.plot(of[0]["curves"]["step"], mean, color=colour, linestyle=dashes, label=estimate)
        for row in rows:
            axes.plot(of[0]["curves"]["step"], row, color=colour, linestyle="", marker=".")
        told.append(f"{estimate} {mean[-1]:.1f} %")
    axes.set_ylim(bottom=0)
    legend(axes)
    return {"steps": (drawing, f"Validation accuracy over steps with both estimates; at the end {'; '.join(told)}.")}


class _Estimates:
    """Classifies with both kinds of statistics at each evaluation; see `fit.ImageProbe`."""

    def __init__(self, run: Run, data: Dataset) -> None:
        self._sample = list(torch.split(torch.from_numpy(data.train.x[:SAMPLE]), 100))
        self._part = Split(data.validation.x[:TESTED], data.validation.y[:TESTED])
        self._found: dict[str, list[float]] = {MOVING: [], POPULATION: []}

    def evaluated(self, network: nn.Module, step: int) -> None:
        """Moving average as it is, then population statistics."""
        kept = {name: value.clone() for name, value in network.state_dict().items()}
        self._found[MOVING].append(significant(accuracy_and_loss(network, self._part)[0]))
        recalibrate(network, self._sample, reading="batch")
        self._found[POPULATION].append(significant(accuracy_and_loss(network, self._part)[0]))
        network.load_state_dict(kept)

    def stepping(self, network: nn.Module, step: int, x: Tensor, y: Tensor, rate: float) -> None:
        """Nothing to see there."""

    def values(self) -> Mapping[str, Any]:
        """The accuracies."""
        return self._found
