"""Inference statistics of a convolutional network, early and late; batches of one class; training against inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import ImageNetwork, ImageTraining, Job, Run, Tier
from batchnorm.lab.data import Dataset, Split
from batchnorm.lab.fit import accuracy_and_loss, fit
from batchnorm.lab.measures import (
    find,
    key,
    measure_over_seeds,
    of_arm,
    said,
)
from batchnorm.lab.record import significant
from batchnorm.recalibration import recalibrate

LAGS = 5.0
"""Shown: early, population statistics are at least this many points ahead of the slow moving average, and ..."""
RUINS = 10.0
"""... training in batches of one class costs at least this many points at inference."""
EARLY, LATE = 40, 320
STEPS, LOOKS = LATE, (20, 40, 80, 160, 320)
RATE = 0.3
SAMPLE, TESTED = 1_000, 2_000
SLOW, USUAL, LAST, BY_CLASS = "momentum 0.01", "momentum 0.1", "momentum 1", "batches of one class"
_MOMENTA = {SLOW: 0.01, USUAL: 0.1, LAST: 1.0, BY_CLASS: 0.1}
MOVING, POPULATION, BATCH = "moving average", "population", "batch"

CARD = Card(
    name="image_statistics",
    tier="full",
    title="Early in training a moving average lags; batches of one class ruin inference",
    claim="A moving average of slow momentum lags early in training, population statistics do not; and where batches "
    "differ from the population, as those of one class do, training and inference are inconsistent.",
    source="Wu & Johnson 2021 (arXiv 2105.07576), sections 3 and 4; Ioffe & Szegedy 2015, section 3.1",
    paper_figure="moving averages lag early and with large batches; training on batches with a pattern makes "
    "inference fail",
    setup=f"A VGG with batch normalization on 10000 images averaged down to 16x16, batches of 64, rate {RATE:g}, "
    f"momenta 0.01, 0.1 and 1, {STEPS} steps. At steps {', '.join(map(str, LOOKS))} {TESTED} validation images are "
    f"classified with the moving average, with population statistics of {SAMPLE} training images, and with those of "
    "each batch of 64. One arm trains on batches that hold one class each.",
    caveat="The rate is high on purpose: where weights move slowly a moving average keeps up. Rates are equal by "
    "design, as all estimates are of the same network.",
    threshold=f"At step {EARLY}, population less moving average (momentum 0.01): at least {LAGS:g} points; and in "
    f"the arm of one class, accuracy on its own kind of batches with their statistics less that with the moving "
    f"average: at least {RUINS:g} points at step {LATE} (lower ends of the intervals). Partly: one of them.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each run."""
    training = ImageTraining(rows=10_000, side=16, batch_size=64, steps=STEPS, evaluations=(0, *LOOKS))
    by_class = ImageTraining(
        rows=10_000, side=16, batch_size=64, steps=STEPS, evaluations=(0, *LOOKS), order="by_class"
    )
    return [
        Job(CARD.name, (Run(CARD.name, arm, seed, RATE, network, by_class if arm == BY_CLASS else training),))
        for arm, momentum in _MOMENTA.items()
        for network in (ImageNetwork(kind="vgg", norm="batch", momentum=momentum),)
        for seed in seeds
    ]


def run(job: Job) -> list[dict[str, Any]]:
    """Train and classify. Values: estimate -> accuracy at each evaluation."""
    return fit(job, _Estimates)


def measure(records: Sequence[Record]) -> list[Measure]:
    """Gaps early and late, the inconsistency of the arm of one class, and all accuracies."""
    found = []
    for arm in _MOMENTA:
        of = of_arm(records, arm)
        for when, step in (("early", EARLY), ("late", LATE)):
            for estimate in (POPULATION, BATCH):
                label = f"accuracy: {estimate} less {MOVING}, {arm}, step {step}"
                values = [100 * (_at(record, estimate, step) - _at(record, MOVING, step)) for record in of]
                found.append(measure_over_seeds(f"{estimate}_gap_{when}_{key(arm)}", label, "points", values))
    for arm in _MOMENTA:
        for estimate in (MOVING, POPULATION, BATCH):
            for when, step in (("early", EARLY), ("late", LATE)):
                values = [100 * _at(record, estimate, step) for record in of_arm(records, arm)]
                label = f"accuracy, {estimate}, {arm}, step {step}"
                found.append(measure_over_seeds(f"{key(estimate)}_{when}_{key(arm)}", label, "%", values))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    lag = find(measures, f"{POPULATION}_gap_early_{key(SLOW)}")
    usual = find(measures, f"{POPULATION}_gap_early_{key(USUAL)}")
    late, alone = (find(measures, f"{POPULATION}_gap_late_{key(arm)}") for arm in (SLOW, LAST))
    between = find(measures, f"{BATCH}_gap_late_{key(USUAL)}")
    ruined = find(measures, f"{BATCH}_gap_late_{key(BY_CLASS)}")
    end = find(measures, f"{key(MOVING)}_late_{key(BY_CLASS)}")
    reading = (
        f"After {EARLY} steps population statistics are {said(lag)} ahead of a moving average of momentum 0.01 and "
        f"{said(usual)} ahead of one of 0.1; after {LATE} steps {said(late)} ahead of the slow one, and {said(alone)} "
        f"ahead of the last batch alone (momentum 1). With the statistics of each batch, as in training, a network of "
        f"momentum 0.1 then classifies {said(between)} better than at inference. A network that "
        f"trained on batches of one class classifies such batches {said(ruined)} better with their own statistics than "
        f"with its moving average, with which it ends at {end.mean:.1f} %."
    )
    holds = [lag.low >= LAGS, ruined.low >= RUINS]
    return Verdict("shown" if all(holds) else "partly" if any(holds) else "not shown", lag, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Accuracy with each estimate over steps, a panel for each arm; means of the seeds."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREY, ORANGE, legend, log_axis, panel

    figures: Figures = {}
    for arm in _MOMENTA:
        of = of_arm(records, arm)
        drawing, axes = panel(arm.capitalize(), "step", "accuracy (%)")
        told = []
        for (estimate, colour), dashes in zip(
            ((POPULATION, BLUE), (MOVING, ORANGE), (BATCH, GREY)), DASHES, strict=False
        ):
            steps = of[0]["curves"]["step"][1:]
            heights = [[100 * value for value in record["values"][estimate][1:]] for record in of]
            mean = [sum(column) / len(column) for column in zip(*heights, strict=True)]
            axes.plot(steps, mean, color=colour, linestyle=dashes, label=estimate)
            for one in heights:
                axes.plot(steps, one, color=colour, linestyle="", marker=".", alpha=0.5)
            told.append(f"{estimate} {mean[0]:.1f} to {mean[-1]:.1f} %")
        log_axis(axes.xaxis)
        axes.set_ylim(bottom=0)
        legend(axes)
        alt = f"Accuracy over steps on a logarithmic axis, {arm}, first to last, mean of the seeds: {'; '.join(told)}."
        figures[key(arm)] = (drawing, alt)
    return figures


class _Estimates:
    """Classifies with three kinds of statistics at each evaluation; see `fit.ImageProbe`."""

    def __init__(self, run: Run, data: Dataset) -> None:
        self._sample = list(torch.split(torch.from_numpy(data.train.x[:SAMPLE]), 250))
        x, y = data.validation.x[:TESTED], data.validation.y[:TESTED]
        self._whole = Split(x, y)
        if run.arm == BY_CLASS:  # batches of the kind that it trains on
            order = y.argsort(kind="stable")
            x, y = x[order], y[order]
        self._parts = [Split(x[start : start + 64], y[start : start + 64]) for start in range(0, len(y) - 63, 64)]
        self._found: dict[str, list[float]] = {MOVING: [], POPULATION: [], BATCH: []}

    def evaluated(self, network: nn.Module, step: int) -> None:
        """Moving average as it is, population statistics, and the batch's own."""
        kept = {name: value.clone() for name, value in network.state_dict().items()}
        self._note(MOVING, accuracy_and_loss(network, self._whole)[0])
        recalibrate(network, self._sample, reading="batch")
        self._note(POPULATION, accuracy_and_loss(network, self._whole)[0])
        network.train()
        accuracies = [accuracy_and_loss(network, part)[0] for part in self._parts]
        network.eval()
        network.load_state_dict(kept)
        self._note(BATCH, sum(accuracies) / len(accuracies) if accuracies else self._found[MOVING][-1])

    def stepping(self, network: nn.Module, step: int, x: Tensor, y: Tensor, rate: float) -> None:
        """Nothing to see there."""

    def values(self) -> Mapping[str, Any]:
        """The accuracies."""
        return self._found

    def _note(self, estimate: str, accuracy: float) -> None:
        self._found[estimate].append(significant(accuracy))


def _at(record: Record, estimate: str, step: int) -> float:
    return float(record["values"][estimate][record["curves"]["step"].index(step)])
