"""Few images: batch normalization, dropout, both or neither; and an ensemble of six."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.lab.claim import Card, Figures, Measure, Record, Reported, Verdict
from batchnorm.lab.config import ImageNetwork, ImageTraining, Job, Run, Tier
from batchnorm.lab.data import Dataset
from batchnorm.lab.fit import fit
from batchnorm.lab.measures import (
    accuracy_over_seeds,
    at_best_rate,
    at_rate,
    best_rate,
    final_validation_accuracy,
    find,
    gain_over_seeds,
    key,
    measure_over_seeds,
    of_arm,
    said,
)

CLOSE = 0.5
"""Shown: with batch normalization, dropout adds less than so many points, and ..."""
STEPS = 1500
ROWS, BATCH = 1_000, 50
RATES = (0.03, 0.1, 0.3)
MEMBERS = 6
PLAIN, DROPOUT, NORMALISED, BOTH = "plain", "dropout", "batch norm", "batch norm + dropout"
_NETWORKS = {
    PLAIN: ImageNetwork(kind="dense", norm="none", depth=3, width=100),
    DROPOUT: ImageNetwork(kind="dense", norm="none", depth=3, width=100, dropout=0.3),
    NORMALISED: ImageNetwork(kind="dense", norm="batch", depth=3, width=100),
    BOTH: ImageNetwork(kind="dense", norm="batch", depth=3, width=100, dropout=0.3),
}

CARD = Card(
    name="regularisation",
    tier="standard",
    title="Batch normalization regularises, so that dropout can go",
    claim="Batch normalization acts as a regulariser: on few data it improves the test accuracy as dropout does, and "
    "dropout adds nothing to it. An ensemble of networks with it does better still.",
    source="Ioffe & Szegedy 2015, sections 3.4, 4.2.1 and 4.3",
    paper_figure="no ablation of dropout; an ensemble of six: top-5 error 4.9 % where one network has 5.8 %",
    setup=f"{ROWS} training images (pixels from 0 to 1), three hidden layers of 100 ReLU units, batches of {BATCH}, "
    f"{STEPS} steps, rates {', '.join(f'{rate:g}' for rate in RATES)}; own best rates have the highest final "
    f"validation accuracy. Dropout of 0.3. The ensemble: mean probabilities of {MEMBERS} networks that differ in "
    f"their seed.",
    caveat="One small dense network and one number of images; dropout's rate was not tuned. The ensemble needs six "
    "seeds and is trained for batch normalization alone.",
    threshold=f"Test accuracy at own best rates: batch norm less plain more than 0, and batch norm + dropout less "
    f"batch norm less than {CLOSE:g} points (lower and upper ends of the intervals). Partly: one of them.",
    reported=(Reported("ensemble_gain", 5.82 - 4.9, "paper: top-5 accuracy of Inception on ImageNet"),),
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each arm and rate; batch normalization with the first six seeds at least, in one job."""
    training = ImageTraining(
        rows=ROWS, inputs="unit", batch_size=BATCH, steps=STEPS, evaluations=(0, STEPS // 2, STEPS)
    )
    found = []
    for arm, network in _NETWORKS.items():
        of = sorted({*seeds, *range(MEMBERS)}) if arm == NORMALISED else seeds
        for rate in RATES:
            found.append(Job(CARD.name, tuple(Run(CARD.name, arm, seed, rate, network, training) for seed in of)))
    return found


def run(job: Job) -> list[dict[str, Any]]:
    """Train. Values: "ensemble", the accuracy of the six networks with batch normalization, in the sixth's record."""
    if job.runs[0].arm != NORMALISED:
        return fit(job)
    together: list[Tensor] = []
    return fit(job, lambda run, data: _Answers(run, data, together))


def measure(records: Sequence[Record]) -> list[Measure]:
    """Differences of test accuracy at own best and equal rates; accuracies; the ensemble."""
    arms = {arm: of_arm(records, arm) for arm in _NETWORKS}
    seeds = {record["seed"] for record in arms[PLAIN]}
    paired = {arm: [record for record in of if record["seed"] in seeds] for arm, of in arms.items()}
    own = {arm: at_best_rate(of, final_validation_accuracy) for arm, of in paired.items()}
    equal = own[PLAIN][0]["rate"]
    members = at_rate(arms[NORMALISED], best_rate(arms[NORMALISED], final_validation_accuracy))
    single = accuracy_over_seeds("accuracy_members", f"test accuracy, {len(members)} networks alone", members)
    (together,) = (100 * record["values"]["ensemble"] for record in members if "ensemble" in record["values"])
    pairs = (
        ("bn_over_plain", NORMALISED, PLAIN),
        ("dropout_over_plain", DROPOUT, PLAIN),
        ("both_over_bn", BOTH, NORMALISED),
        ("bn_over_dropout", NORMALISED, DROPOUT),
    )
    words = "test accuracy"
    same = at_rate(paired[NORMALISED], equal)
    return [
        *(
            gain_over_seeds(name, f"{words}, {one} less {other}, own best rates", own[one], own[other])
            for name, one, other in pairs
        ),
        gain_over_seeds("equal", f"{words}, batch norm less plain, equal rate {equal:g}", same, own[PLAIN]),
        *(
            accuracy_over_seeds(f"accuracy_{key(arm)}", f"{words}, {arm}, rate {of[0]['rate']:g}", of)
            for arm, of in own.items()
        ),
        single,
        measure_over_seeds("ensemble", f"{words}, ensemble of {MEMBERS}", "%", [together]),
        measure_over_seeds("ensemble_gain", f"{words} that the ensemble adds", "points", [together - single.mean]),
    ]


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    bn, dropout, both = (find(measures, name) for name in ("bn_over_plain", "dropout_over_plain", "both_over_bn"))
    ensemble, together = find(measures, "ensemble_gain"), find(measures, "ensemble")
    reading = (
        f"On {ROWS} images batch normalization adds {said(bn)} to the plain network, dropout adds {said(dropout)}, and "
        f"dropout on top of batch normalization {said(both)}. An ensemble reaches {together.mean:.2f} %, "
        f"{ensemble.mean:.2f} points more than its members on average."
    )
    holds = [bn.low > 0, both.high < CLOSE]
    return Verdict("shown" if all(holds) else "partly" if any(holds) else "not shown", bn, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Test accuracy of each arm at its own best rate, every seed a dot, and the ensemble."""
    from batchnorm.reporting.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, panel

    drawing, axes = panel("Test accuracy at own best rates", "", "test accuracy (%)")
    names = [*_NETWORKS, "ensemble"]
    told = []
    for place, (name, colour) in enumerate(zip(names, (ORANGE, PURPLE, BLUE, GREEN, GREY), strict=True)):
        of = find(measures, "ensemble" if name == "ensemble" else f"accuracy_{key(name)}")
        axes.plot([place] * len(of.values), of.values, color=colour, marker="o", linestyle="", alpha=0.6)
        axes.errorbar([place + 0.15], [of.mean], [[of.mean - of.low], [of.high - of.mean]], color=colour, marker="_")
        told.append(f"{name} {of.mean:.2f} %")
    axes.set_xticks(range(len(names)), [name.replace(" + ", "\n+ ") for name in names])
    return {
        "arms": (drawing, f"Test accuracy of each arm, every seed a dot with mean and interval: {'; '.join(told)}.")
    }


class _Answers:
    """Adds the probabilities of the test images to those of the members before; see `fit.ImageProbe`."""

    def __init__(self, run: Run, data: Dataset, together: list[Tensor]) -> None:
        self._last, self._seed, self._together = run.training.steps, run.seed, together
        self._x, self._y = torch.from_numpy(data.test.x), torch.from_numpy(data.test.y)
        self._found: dict[str, float] = {}

    def evaluated(self, network: nn.Module, step: int) -> None:
        """At the end; with the last member, how well the mean of all does."""
        if step != self._last or self._seed >= MEMBERS:
            return
        self._together.append(torch.cat([functional.softmax(network(x), dim=1) for x in torch.split(self._x, 1000)]))
        if len(self._together) == MEMBERS:
            mean = torch.stack(self._together).mean(dim=0)
            self._found["ensemble"] = float((mean.argmax(dim=1) == self._y).double().mean())

    def stepping(self, network: nn.Module, step: int, x: Tensor, y: Tensor, rate: float) -> None:
        """Nothing to see there."""

    def values(self) -> Mapping[str, Any]:
        """The accuracy of the ensemble, in the record of its last member."""
        return self._found
