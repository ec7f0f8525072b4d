"""Convolutions and small batches: batch normalization beside group, layer, instance, renorm and ghost batches."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.lab.claim import Card, Figures, Measure, Record, Reported, Verdict
from batchnorm.lab.config import ImageNetwork, ImageNorm, ImageTraining, Job, Run, Tier
from batchnorm.lab.fit import fit as run
from batchnorm.lab.measures import (
    accuracy_over_seeds,
    find,
    gain_over_seeds,
    measure_over_seeds,
    of_arm,
    said,
)

__all__ = ["CARD", "figure", "jobs", "judge", "measure", "run"]

LOSES = 3.0
"""Shown: at the smallest batch, batch normalization loses at least so many points to its own largest batch ..."""
SIZES = (2, 8, 32, 128)
SMALL, LARGE = SIZES[0], 32
ROWS, EPOCHS = 4_000, 2
RATE_AT_LARGE = 0.1
NORMS: dict[str, ImageNorm] = {
    "batch": "batch",
    "group": "group",
    "layer": "layer",
    "instance": "instance",
    "renorm": "renorm",
}
ERRORS = {
    "batch": {2: 34.7, 4: 27.3, 8: 24.8, 16: 23.7, 32: 23.6},
    "group": {2: 24.1, 4: 24.2, 8: 24.0, 16: 24.2, 32: 24.1},
}
"""Table 2 of Wu & He: error in % by the number of images in a batch."""
WHERE = "Wu & He: ResNet-50 on ImageNet"
GHOST = "ghost"
"""Ghost batches of 16 need larger batches than that: they stand at the two largest sizes only."""

CARD = Card(
    name="small_batches",
    tier="full",
    title="Small batches hurt batch normalization more than group normalization",
    claim="With small batches batch normalization loses accuracy, since its statistics become noisy; group "
    "normalization does not, and batch renormalization loses less.",
    source="Wu & He 2018 (arXiv 1803.08494), table 2; Ioffe 2017 (arXiv 1702.03275)",
    paper_figure="ImageNet, ResNet-50, error at batch 32 and 2: batch norm 23.6 % and 34.7 %, group norm about 24.1 %",
    setup=f"{ROWS} images averaged down to 16x16, a VGG of six convolutions, {EPOCHS} passes at every batch size, rate "
    f"{RATE_AT_LARGE:g} at batch {LARGE} and in proportion to the batch elsewhere, as the papers scale it. Group: 8 "
    f"groups. Renorm: r and d rise as in its paper, in a hundredth of the steps. Ghost: batches of 16 inside.",
    caveat="In a convolution each channel has height x width values for every image, so that a batch of 2 is not as "
    "small as in a dense layer. Equal passes give a batch of 128 few steps: it is undertrained, and is not compared. "
    "Rates are scaled by rule, not tuned for each size.",
    threshold=f"Test accuracy of batch normalization at batch {LARGE} less that at {SMALL}: at least {LOSES:g} points, "
    f"and group normalization loses fewer points (lower ends of the intervals). Partly: it loses more than 0.",
    reported=(
        *(Reported(f"lost_{name}", of[SMALL] - of[LARGE], WHERE) for name, of in ERRORS.items()),
        *(
            Reported(f"group_over_batch_{size}", ERRORS["batch"][size] - ERRORS["group"][size], WHERE)
            for size in (SMALL, LARGE)
        ),
    ),
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each run, the smallest batches first: those take longest."""
    arms = [(f"{name} {size}", norm, size) for size in SIZES for name, norm in NORMS.items()]
    ghosts: list[tuple[str, ImageNorm, int]] = [(f"{GHOST} {size}", "ghost", size) for size in SIZES if size >= LARGE]
    return [
        Job(CARD.name, (Run(CARD.name, arm, seed, RATE_AT_LARGE * size / LARGE, _network(norm), _training(size)),))
        for arm, norm, size in (*arms, *ghosts)
        for seed in seeds
    ]


def measure(records: Sequence[Record]) -> list[Measure]:
    """What each normalisation loses, its difference to batch normalization, and all accuracies."""
    found = []
    for name in NORMS:
        large, small = of_arm(records, f"{name} {LARGE}"), of_arm(records, f"{name} {SMALL}")
        label = f"test accuracy lost from batch {LARGE} to {SMALL}, {name}"
        found.append(gain_over_seeds(f"lost_{name}", label, large, small))
    for size in SIZES:
        label = f"test accuracy that group adds to batch at batch {size}"
        ours, theirs = of_arm(records, f"group {size}"), of_arm(records, f"batch {size}")
        found.append(gain_over_seeds(f"group_over_batch_{size}", label, ours, theirs))
    for name in (*NORMS, GHOST):
        for size in SIZES:
            if name != GHOST or size >= LARGE:
                label = f"test accuracy, {name}, batch {size}"
                found.append(accuracy_over_seeds(f"accuracy_{name}_{size}", label, of_arm(records, f"{name} {size}")))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    batch, group, renorm = (find(measures, f"lost_{name}") for name in ("batch", "group", "renorm"))
    gap = find(measures, f"group_over_batch_{SMALL}")
    reading = (
        f"From batch {LARGE} to {SMALL} batch normalization loses {said(batch)}, group normalization {said(group)} and "
        f"batch renormalization {said(renorm)} (less than 0: it gains). At batch {SMALL} group normalization is "
        f"{said(gap)} ahead of batch normalization."
    )
    if batch.low >= LOSES and batch.low > group.high:
        return Verdict("shown", batch, reading)
    return Verdict("partly" if batch.low > 0 else "not shown", batch, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Test accuracy over the batch size, and what small batches lose beside what the paper's lose."""
    from batchnorm.reporting.figures import BLUE, DASHES, ORANGE, PALETTE, legend, log_axis, panel
    from batchnorm.reporting.spreads import REPORTED, over

    drawing, axes = panel("Accuracy at each batch size", "images in a batch", "test accuracy (%)", height=1.15)
    told = []
    for name, colour, dashes in zip((*NORMS, GHOST), PALETTE, DASHES, strict=True):
        sizes = [size for size in SIZES if name != GHOST or size >= LARGE]
        of = [find(measures, f"accuracy_{name}_{size}") for size in sizes]
        over(axes, sizes, of, color=colour, linestyle=dashes, label=name)
        told.append(f"{name} {of[0].mean:.1f} to {of[-1].mean:.1f} %")
    log_axis(axes.xaxis)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    legend(axes)
    alt = f"Test accuracy over the batch size on a logarithmic axis, first and last: {'; '.join(told)}."
    lost, axes = panel("Accuracy less that at batch 32", "images in a batch", "percentage points", height=1.15)
    sizes = [size for size in SIZES if size <= LARGE]
    for (name, errors), colour, line in zip(ERRORS.items(), (BLUE, ORANGE), DASHES, strict=False):
        large = find(measures, f"accuracy_{name}_{LARGE}").values
        of = [_less(find(measures, f"accuracy_{name}_{size}"), large) for size in sizes]
        over(axes, sizes, of, color=colour, linestyle=line, label=f"{name}, here")
        gone = [errors[LARGE] - error for error in errors.values()]
        axes.plot(list(errors), gone, **{**REPORTED, "color": colour}, label=f"{name}, {WHERE}")
    log_axis(axes.xaxis)
    axes.set_xticks(list(ERRORS["batch"]), [str(size) for size in ERRORS["batch"]])
    legend(axes, columns=1)
    beside = "; ".join(f"{name} {errors[LARGE] - errors[SMALL]:.1f}" for name, errors in ERRORS.items())
    return {
        "sizes": (drawing, alt),
        "lost": (lost, f"Accuracy less that at batch {LARGE}. Reported at batch {SMALL} ({WHERE}): {beside} points."),
    }


def _less(measure: Measure, others: Sequence[float]) -> Measure:
    values = [value - other for value, other in zip(measure.values, others, strict=True)]
    return measure_over_seeds(measure.name, measure.label, "points", values)


def _network(norm: ImageNorm) -> ImageNetwork:
    return ImageNetwork(kind="vgg", norm=norm)


def _training(size: int) -> ImageTraining:
    steps = EPOCHS * ROWS // size
    return ImageTraining(rows=ROWS, side=16, batch_size=size, steps=steps, evaluations=(0, steps))
