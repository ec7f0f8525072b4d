"""Dense layers and small batches: batch normalization beside layer and group normalization, renorm, ghost batches."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import ImageNetwork, ImageNorm, ImageTraining, Job, Run, Tier
from batchnorm.lab.fit import fit as run
from batchnorm.lab.measures import (
    accuracy_over_seeds,
    at_best_rate,
    at_rate,
    final_validation_accuracy,
    find,
    gain_over_seeds,
    of_arm,
    said,
)

__all__ = ["CARD", "figure", "jobs", "judge", "measure", "run"]

LOSES = 5.0
"""Shown: from the usual to the smallest batch, batch normalization loses at least so many points ..."""
SIZES = (2, 8, 32, 128)
SMALL, USUAL = SIZES[0], 32
ROWS, EPOCHS = 2_000, 2
RATES = (0.03, 0.1, 0.3)
"""At the usual batch; elsewhere in proportion to it."""
BATCH, LAYER, GROUP, RENORM, GHOST = "batch", "layer", "group", "renorm", "ghost"
NORMS: dict[str, ImageNorm] = {BATCH: "batch", LAYER: "layer", GROUP: "group", RENORM: "renorm", GHOST: "ghost"}
"""No instance normalization: in a dense layer it would have one value for each mean."""

CARD = Card(
    name="dense_batches",
    tier="standard",
    title="In dense layers small batches ruin batch normalization, and not layer normalization",
    claim="With small batches a dense network with batch normalization loses accuracy, since its statistics are those "
    "of a few values; layer and group normalization do not, and batch renormalization loses less.",
    source="Ba et al. 2016 (arXiv 1607.06450), section 6.6; Ioffe 2017 (arXiv 1702.03275); Wu & He 2018 (arXiv "
    "1803.08494)",
    paper_figure="curves only for dense layers; convolutions: see the full study",
    setup=f"{ROWS} images, three hidden layers of 100 ReLU units, {EPOCHS} passes at every batch size, rates "
    f"{', '.join(f'{rate:g}' for rate in RATES)} at batch {USUAL} and in proportion to the batch elsewhere; at each "
    f"size every arm at its own best rate by final validation accuracy, and at batch normalization's. Group: 4 "
    f"groups. Renorm: r and d rise as in its paper, in a hundredth of the steps. Ghost: batches of 16 inside.",
    caveat=f"Few images and passes: it is not the end of a long training. Equal passes give a batch of {SIZES[-1]} few "
    "steps: it is undertrained in all arms, and is not compared.",
    threshold=f"Test accuracy at own best rates, batch {USUAL} less {SMALL}: batch normalization loses at least "
    f"{LOSES:g} points, and more than layer normalization (its lower end above the other's upper end). Partly: it "
    f"loses more than 0.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each run, the smallest batches first: those take longest."""
    return [
        Job(CARD.name, (Run(CARD.name, f"{name} {size}", seed, rate * size / USUAL, network, _training(size)),))
        for size in SIZES
        for name in _at(size)
        for network in (ImageNetwork(kind="dense", norm=NORMS[name], depth=3, width=100),)
        for seed in seeds
        for rate in RATES
    ]


def measure(records: Sequence[Record]) -> list[Measure]:
    """What each normalization loses, what others add to batch normalization, and all accuracies."""
    own = {
        (name, size): at_best_rate(of_arm(records, f"{name} {size}"), final_validation_accuracy)
        for size in SIZES
        for name in _at(size)
    }
    found = []
    for name in _at(SMALL):
        label = f"test accuracy lost from batch {USUAL} to {SMALL}, {name}, own best rates"
        found.append(gain_over_seeds(f"lost_{name}", label, own[name, USUAL], own[name, SMALL]))
    for name in _at(SMALL)[1:]:
        rate = own[BATCH, SMALL][0]["rate"]
        same = at_rate(of_arm(records, f"{name} {SMALL}"), rate)
        label = f"test accuracy that {name} adds to batch at batch {SMALL}"
        found.append(
            gain_over_seeds(f"{name}_over_batch", f"{label}, own best rates", own[name, SMALL], own[BATCH, SMALL])
        )
        found.append(gain_over_seeds(f"{name}_equal", f"{label}, equal rate {rate:g}", same, own[BATCH, SMALL]))
    for (name, size), of in own.items():
        label = f"test accuracy, {name}, batch {size}, rate {of[0]['rate']:g}"
        found.append(accuracy_over_seeds(f"accuracy_{name}_{size}", label, of))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    batch, layer, group, renorm = (find(measures, f"lost_{name}") for name in _at(SMALL))
    gap = find(measures, f"{LAYER}_over_batch")
    reading = (
        f"From batch {USUAL} to {SMALL} batch normalization loses {said(batch)}, layer normalization {said(layer)}, "
        f"group normalization {said(group)} and batch renormalization {said(renorm)} (less than 0: it gains). At batch "
        f"{SMALL} layer normalization is {said(gap)} ahead of batch normalization."
    )
    if batch.low >= LOSES and batch.low > layer.high:
        return Verdict("shown", batch, reading)
    return Verdict("partly" if batch.low > 0 else "not shown", batch, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Test accuracy over the batch size at own best rates, every seed a dot."""
    from batchnorm.reporting.figures import DASHES, PALETTE, legend, log_axis, panel

    drawing, axes = panel("Accuracy at each batch size, dense layers", "images in a batch", "test accuracy (%)")
    told = []
    for name, colour, dashes in zip(NORMS, PALETTE, DASHES, strict=False):
        sizes = [size for size in SIZES if name in _at(size)]
        of = [find(measures, f"accuracy_{name}_{size}") for size in sizes]
        axes.plot(sizes, [one.mean for one in of], color=colour, linestyle=dashes, label=name, marker="o")
        for size, one in zip(sizes, of, strict=True):
            axes.plot([size] * len(one.values), one.values, color=colour, linestyle="", marker=".", alpha=0.5)
        told.append(f"{name} {of[0].mean:.1f} to {of[-1].mean:.1f} %")
    log_axis(axes.xaxis)
    legend(axes)
    alt = f"Test accuracy over the batch size on a logarithmic axis, first and last: {'; '.join(told)}."
    return {"sizes": (drawing, alt)}


def _at(size: int) -> list[str]:
    """Ghost batches of 16 need larger batches than that."""
    return [name for name in NORMS if name != GHOST or size >= USUAL]


def _training(size: int) -> ImageTraining:
    steps = EPOCHS * ROWS // size
    return ImageTraining(rows=ROWS, batch_size=size, steps=steps, evaluations=(0, steps))
