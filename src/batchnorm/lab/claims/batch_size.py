"""Small batches hurt batch normalization; layer normalization stands beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchnorm.lab.claim import Card, Figures, Measure, Record, Reported, Verdict
from batchnorm.lab.config import Job, Network, Norm, Run, Tier, Training, stacked
from batchnorm.lab.measures import (
    accuracy_over_seeds,
    at_best_rate,
    at_rate,
    best_rate,
    final_validation_accuracy,
    find,
    gain_over_seeds,
    measure_over_seeds,
    of_arm,
    said,
)
from batchnorm.lab.train import train as run

__all__ = ["CARD", "figure", "jobs", "judge", "measure", "run"]

HURTS = 5.0
"""Shown: from the usual to the smallest batch, batch normalization loses at least this many points of accuracy ..."""
SIZES = (2, 4, 8, 16, 32, 64, 128)
USUAL, SMALLEST = 32, 2
EPOCHS = 4
RATES_AT_USUAL = (0.1, 0.3, 1.0)
"""Rates at the usual batch size; at others they are proportional to the batch."""

NORMALISED, LAYER = "batch norm", "layer norm"
_NORMS: dict[str, Norm] = {NORMALISED: "batch", LAYER: "layer"}
_TRAIN_ROWS = 1000

CARD = Card(
    name="batch_size",
    title="Small batches hurt batch normalization",
    claim="Batch normalization loses accuracy when batches are small, because their statistics are poor estimates; "
    "layer normalization, which needs no batch, does not.",
    source="Ioffe 2017 (arXiv 1702.03275); Wu & He 2018 (arXiv 1803.08494), figure 1",
    paper_figure="ResNet-50 on ImageNet, error at batch 32 and at batch 2: 23.6 % and 34.7 % (Group Norm: 24.1 %)",
    setup=f"Digits (pixels from 0 to 1), three hidden layers of 100 ReLU units, He's initial weights, batches of "
    f"{', '.join(map(str, SIZES))}. Every size sees each image {EPOCHS} times, and its rate is proportional to the "
    f"batch: {', '.join(f'{rate:g}' for rate in RATES_AT_USUAL)} times batch / {USUAL}. An arm's own best rate is "
    f"chosen on validation accuracy at each size; also measured: the one that is best at batch {USUAL}, scaled to all "
    f"sizes, and the same rates for both arms.",
    caveat=f"Dense layers, where a channel has one value an image: a convolution has height times width as many, and "
    f"suffers less. With equal epochs a batch of 128 makes only {EPOCHS * (_TRAIN_ROWS // 128)} updates and is "
    f"undertrained in both arms.",
    threshold=f"From batch {USUAL} to batch {SMALLEST}, batch normalization loses at least {HURTS:g} points of test "
    f"accuracy at its own best rate for each size, and more than layer normalization does (lower ends of the "
    f"intervals). Partly: it loses some, or more than layer normalization.",
    reported=(Reported("loss", 34.7 - 23.6, "Wu & He: ResNet-50 on ImageNet"),),
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """For each arm and batch size one job, the smallest batches first, which take longest."""
    return stacked(
        Run(
            CARD.name,
            arm,
            seed,
            rate * size / USUAL,
            Network(depth=3, width=100, activation="relu", norm=_NORMS[arm], init="fan_in", init_scale=math.sqrt(2.0)),
            _training(size),
        )
        for size in SIZES
        for arm in _NORMS
        for seed in seeds
        for rate in RATES_AT_USUAL
    )


def measure(records: Sequence[Record]) -> list[Measure]:
    """Losses of accuracy from the usual to the smallest batch, tuned in three ways; accuracies by size."""
    tuned = {arm: {size: _at_own_best(records, arm, size) for size in SIZES} for arm in _NORMS}
    base = {arm: best_rate(_of(records, arm, USUAL), final_validation_accuracy) for arm in _NORMS}
    found = [
        _loss("loss", "own best rate at each size", NORMALISED, tuned[NORMALISED]),
        _loss("loss_layer", "own best rate at each size", LAYER, tuned[LAYER]),
        _excess("excess", "own best rate at each size", tuned),
    ]
    scaled = {arm: _scaled(records, arm, base[arm]) for arm in _NORMS}
    found += [
        _loss(f"loss_scaled{suffix}", f"rate {base[arm]:g} at batch {USUAL}, proportional", arm, scaled[arm])
        for arm, suffix in ((NORMALISED, ""), (LAYER, "_layer"))
    ]
    equal = {arm: _scaled(records, arm, base[NORMALISED]) for arm in _NORMS}
    found.append(_excess("excess_equal", f"equal rates, {base[NORMALISED]:g} at batch {USUAL}, proportional", equal))
    found += [
        accuracy_over_seeds(f"accuracy_{_NORMS[arm]}_{size}", f"accuracy, {arm}, batch {size}, own best rate", chosen)
        for arm, by_size in tuned.items()
        for size, chosen in by_size.items()
    ]
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    loss, layer, excess = (find(measures, name) for name in ("loss", "loss_layer", "excess"))
    scaled, equal = find(measures, "loss_scaled"), find(measures, "excess_equal")
    usual, small = (find(measures, f"accuracy_batch_{size}") for size in (USUAL, SMALLEST))
    reading = (
        f"With batch normalization test accuracy goes from {usual.mean:.1f} % at batch {USUAL} to {small.mean:.1f} % "
        f"at batch {SMALLEST}, at the best rate for each size: a loss of {said(loss)}. The same loss is "
        f"{said(layer)} with layer normalization, {said(excess)} less. With the rate that is best at batch {USUAL} and "
        f"proportional to the batch it loses {said(scaled)}; at equal rates {said(equal)} more than layer "
        f"normalization."
    )
    if loss.low >= HURTS and excess.low > 0:
        return Verdict("shown", loss, reading)
    return Verdict("partly" if loss.low > 0 or excess.low > 0 else "not shown", loss, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Test accuracy over the batch size, both arms at their own best rates."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREEN, legend, panel
    from batchnorm.reporting.spreads import over

    drawing, axes = panel("Accuracy at each batch size, own best rates", "batch size", "test accuracy (%)")
    for arm, colour, dashes in ((NORMALISED, BLUE, DASHES[0]), (LAYER, GREEN, DASHES[1])):
        by_size = [find(measures, f"accuracy_{_NORMS[arm]}_{size}") for size in SIZES]
        over(axes, SIZES, by_size, color=colour, linestyle=dashes, label=arm)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    legend(axes)
    means = {arm: [find(measures, f"accuracy_{_NORMS[arm]}_{size}").mean for size in SIZES] for arm in _NORMS}
    words = "; ".join(f"{arm} {', '.join(f'{value:.1f}' for value in values)}" for arm, values in means.items())
    alt = f"Test accuracy in % at batch sizes {', '.join(map(str, SIZES))}, mean, interval and every seed: {words}."
    return {"sizes": (drawing, alt)}


def _training(size: int) -> Training:
    steps = EPOCHS * (_TRAIN_ROWS // size)
    return Training(inputs="unit", batch_size=size, steps=steps, evaluations=(steps // 2, steps))


def _of(records: Sequence[Record], arm: str, size: int) -> list[Record]:
    return [one for one in of_arm(records, arm) if one["config"]["training"]["batch_size"] == size]


def _at_own_best(records: Sequence[Record], arm: str, size: int) -> list[Record]:
    return at_best_rate(_of(records, arm, size), final_validation_accuracy)


def _scaled(records: Sequence[Record], arm: str, rate: float) -> dict[int, list[Record]]:
    """Size -> the records at a rate that is `rate` at the usual size and proportional to the batch."""
    return {size: at_rate(_of(records, arm, size), rate * size / USUAL) for size in (SMALLEST, USUAL)}


def _loss(name: str, tuning: str, arm: str, by_size: dict[int, list[Record]]) -> Measure:
    label = f"accuracy lost from batch {USUAL} to {SMALLEST}, {arm}, {tuning}"
    return gain_over_seeds(name, label, by_size[USUAL], by_size[SMALLEST])


def _excess(name: str, tuning: str, by_arm: dict[str, dict[int, list[Record]]]) -> Measure:
    losses = {arm: _loss(arm, tuning, arm, by_size).values for arm, by_size in by_arm.items()}
    more = [ours - theirs for ours, theirs in zip(losses[NORMALISED], losses[LAYER], strict=True)]
    label = f"what batch norm loses more than layer norm from batch {USUAL} to {SMALLEST}, {tuning}"
    return measure_over_seeds(name, label, "points", more)
