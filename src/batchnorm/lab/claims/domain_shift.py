"""Other data at inference: recomputed statistics (AdaBN) help against some shifts and ruin others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
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
from batchnorm.recalibration import recalibrate

HELPS = 5.0
"""Shown: against at least two of the shifts recomputed statistics gain at least so many points, and ..."""
RUINS = 5.0
"""... where the new data hold one class only they lose at least so many."""
STEPS, RATE = 600, 0.1
TESTED = 2_000
ARM = "batch norm"
CLASS = "one class only"
SHIFTS = ("none", "brightness", "contrast", "noise", "inversion", CLASS)

CARD = Card(
    name="domain_shift",
    tier="full",
    title="New statistics for new data: a cure for some shifts, a ruin for others",
    claim="When the data at inference differ from the training data, recomputing the statistics of batch normalization "
    "on unlabelled new data (AdaBN) restores much of the accuracy.",
    source="Li et al. 2016 (arXiv 1603.04779); the other side: Wu & Johnson 2021 (arXiv 2105.07576), section 5",
    paper_figure="Office-31, AlexNet to other cameras: a few points gained on average",
    setup=f"A VGG with batch normalization on 10000 images averaged down to 16x16, batches of 64, {STEPS} steps at "
    f"rate {RATE:g}. {TESTED} test images, changed: brightness (all pixels up by one standard deviation), contrast "
    "(0.3 of it), noise (of one standard deviation), inversion; and those of one class alone, unchanged, class by "
    "class. Each with the statistics of the training data and with the population statistics of the new images, "
    "labels unused.",
    caveat="Strong, uniform shifts by design, and all of the new data there at once. What helps here need not help "
    "on a camera's real shift; whether it does can be seen on a few labelled images only.",
    threshold=f"Test accuracy with new statistics less with old: at least {HELPS:g} points for two of brightness, "
    f"contrast, noise and inversion, and at most -{RUINS:g} points for one class only (lower and upper ends of the "
    f"intervals). Partly: it helps against one of them.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each seed."""
    training = ImageTraining(rows=10_000, side=16, batch_size=64, steps=STEPS, evaluations=(0, STEPS))
    network = ImageNetwork(kind="vgg", norm="batch")
    return [Job(CARD.name, (Run(CARD.name, ARM, seed, RATE, network, training),)) for seed in seeds]


def run(job: Job) -> list[dict[str, Any]]:
    """Train, and test on changed images. Values: "old" and "new", shift -> accuracy, at the end."""
    return fit(job, _Shifts)


def measure(records: Sequence[Record]) -> list[Measure]:
    """What new statistics gain against each shift, and the accuracies."""
    of = of_arm(records, ARM)
    found = []
    for shift in SHIFTS:
        gains = [100 * (one["values"]["new"][shift] - one["values"]["old"][shift]) for one in of]
        label = f"accuracy that new statistics add, {shift}"
        found.append(measure_over_seeds(f"gain_{key(shift)}", label, "points", gains))
    for which in ("old", "new"):
        for shift in SHIFTS:
            values = [100 * one["values"][which][shift] for one in of]
            label = f"accuracy, {which} statistics, {shift}"
            found.append(measure_over_seeds(f"{which}_{key(shift)}", label, "%", values))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    gains = {shift: find(measures, f"gain_{key(shift)}") for shift in SHIFTS}
    listed = "; ".join(f"{shift} {said(gain)}" for shift, gain in gains.items())
    helped = [shift for shift in SHIFTS[1:-1] if gains[shift].low >= HELPS]
    ruined = gains[CLASS].high <= -RUINS
    best = max(SHIFTS[1:-1], key=lambda shift: gains[shift].mean)
    reading = f"Accuracy that new statistics add to the old ones: {listed}."
    if len(helped) >= 2 and ruined:
        return Verdict("shown", gains[best], reading)
    return Verdict("partly" if helped else "not shown", gains[best], reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Accuracy with old and new statistics for each shift; every seed a dot."""
    from batchnorm.reporting.figures import BLUE, ORANGE, legend, panel

    drawing, axes = panel("Accuracy on changed images", "", "test accuracy (%)", height=1.1)
    for which, colour, aside in (("old", ORANGE, -0.15), ("new", BLUE, 0.15)):
        of = [find(measures, f"{which}_{key(shift)}") for shift in SHIFTS]
        places = [place + aside for place in range(len(SHIFTS))]
        axes.bar(places, [one.mean for one in of], width=0.28, color=colour, label=f"{which} statistics", alpha=0.75)
        for place, one in zip(places, of, strict=True):
            axes.plot([place] * len(one.values), one.values, color=colour, marker=".", linestyle="")
    axes.set_xticks(range(len(SHIFTS)), [shift.replace(" only", "") for shift in SHIFTS], rotation=20)
    legend(axes)
    told = "; ".join(f"{shift} {find(measures, f'gain_{key(shift)}').mean:+.1f}" for shift in SHIFTS)
    alt = f"Test accuracy with old and with new statistics; points that the new ones add: {told}."
    return {"shifts": (drawing, alt)}


class _Shifts:
    """Tests on changed images at the end; see `fit.ImageProbe`."""

    def __init__(self, run: Run, data: Dataset) -> None:
        self._last = run.training.steps
        self._test = Split(data.test.x[:TESTED], data.test.y[:TESTED])
        self._noise = np.random.default_rng(run.seed)
        self._found: dict[str, dict[str, float]] = {"old": {}, "new": {}}

    def evaluated(self, network: nn.Module, step: int) -> None:
        """At the end, every shift with old and new statistics."""
        if step != self._last:
            return
        kept = {name: value.clone() for name, value in network.state_dict().items()}
        for shift in SHIFTS:
            parts = self._parts(shift)
            for which in ("old", "new"):
                right = 0.0
                for part in parts:
                    if which == "new":
                        batches = list(torch.split(torch.from_numpy(part.x), 250))
                        recalibrate(network, batches, reading="batch")
                    right += accuracy_and_loss(network, part)[0] * len(part.y)
                    network.load_state_dict(kept)
                self._found[which][shift] = right / sum(len(part.y) for part in parts)

    def stepping(self, network: nn.Module, step: int, x: Tensor, y: Tensor, rate: float) -> None:
        """Nothing to see there."""

    def values(self) -> Mapping[str, Any]:
        """Accuracies with old and new statistics."""
        return self._found

    def _parts(self, shift: str) -> list[Split]:
        """The changed images: standardised pixels, so that one is a standard deviation."""
        x, y = self._test.x, self._test.y
        if shift == CLASS:
            return [Split(x[y == label], y[y == label]) for label in np.unique(y) if (y == label).sum() > 1]
        noise = self._noise.standard_normal(x.shape, dtype=np.float32) if shift == "noise" else np.float32(0)
        scale, offset = {"brightness": (1.0, 1.0), "contrast": (0.3, 0.0), "inversion": (-1.0, 0.0)}.get(
            shift, (1.0, 0.0)
        )
        return [Split(np.asarray(x * scale + offset + noise, dtype=np.float32), y)]
