"""Your network: how small a batch may be, with batch normalization and with group normalization in its place."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import ImageTraining, Job, OwnNetwork, OwnNorm, Run, Tier
from batchnorm.lab.fit import fit as run
from batchnorm.lab.measures import (
    accuracy_over_seeds,
    find,
    gain_over_seeds,
    key,
    of_arm,
    said,
)

__all__ = ["CARD", "figure", "jobs", "judge", "measure", "run"]

LOSES = 3.0
"""Shown: it loses less than so many points at the smallest batch."""
SIZES = (2, 4, 8, 16, 32, 64)
SMALL, LARGE = SIZES[0], SIZES[-1]
SEEN, RATE_AT_LARGE = 3_200, 0.1
OWN, GROUP = "batch norm", "group norm"
ARMS: dict[str, OwnNorm] = {OWN: "own", GROUP: "group"}

CARD = Card(
    name="own_batches",
    tier="network",
    title="Your network bears small batches",
    claim="Your network loses little when the batches are small.",
    source="the question of whoever has little memory; Wu & He 2018 (arXiv 1803.08494) answer it for ResNet-50",
    paper_figure="",
    setup=f"{SEEN} images seen at every batch size, rate {RATE_AT_LARGE:g} at batch {LARGE} and in "
    f"proportion to the batch elsewhere, plain SGD.",
    caveat="Rates are scaled by rule and not tuned for each size; few passes.",
    threshold=f"Test accuracy at batch {LARGE} less that at {SMALL}: less than {LOSES:g} points (upper end of the "
    f"interval). Partly: it loses less than group normalization.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each run, the smallest batches first: those take longest."""
    return [
        Job(CARD.name, (Run(CARD.name, f"{arm} {size}", seed, RATE_AT_LARGE * size / LARGE, network, _training(size)),))
        for size in SIZES
        for arm, norm in ARMS.items()
        for network in (OwnNetwork(norm=norm),)
        for seed in seeds
    ]


def measure(records: Sequence[Record]) -> list[Measure]:
    """What both lose, and all accuracies."""
    found = []
    for arm in ARMS:
        large, small = of_arm(records, f"{arm} {LARGE}"), of_arm(records, f"{arm} {SMALL}")
        label = f"test accuracy lost from batch {LARGE} to {SMALL}, {arm}"
        found.append(gain_over_seeds(f"lost_{key(arm)}", label, large, small))
    for arm in ARMS:
        for size in SIZES:
            of = of_arm(records, f"{arm} {size}")
            found.append(accuracy_over_seeds(f"{key(arm)}_{size}", f"test accuracy, {arm}, batch {size}", of))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    own, group = (find(measures, f"lost_{key(arm)}") for arm in ARMS)
    reading = (
        f"From batch {LARGE} to {SMALL} your network loses {said(own)}, with group normalization {said(group)} (less "
        f"than 0: it gains)."
    )
    if own.high < LOSES:
        return Verdict("shown", own, reading)
    return Verdict("partly" if own.mean < group.mean else "not shown", own, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Test accuracy over the batch size, every seed a dot."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREEN, legend, log_axis, panel
    from batchnorm.reporting.spreads import over

    drawing, axes = panel("Accuracy at each batch size", "images in a batch", "test accuracy (%)")
    told = []
    for arm, colour, dashes in zip(ARMS, (BLUE, GREEN), DASHES, strict=False):
        of = [find(measures, f"{key(arm)}_{size}") for size in SIZES]
        over(axes, SIZES, of, color=colour, linestyle=dashes, label=arm)
        told.append(f"{arm} {of[0].mean:.1f} to {of[-1].mean:.1f} %")
    log_axis(axes.xaxis)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set_ylim(bottom=0)
    legend(axes)
    return {"sizes": (drawing, f"Test accuracy over the batch size, smallest to largest: {'; '.join(told)}.")}


def _training(size: int) -> ImageTraining:
    steps = SEEN // size
    return ImageTraining(batch_size=size, steps=steps, evaluations=(0, steps))
