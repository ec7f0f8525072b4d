"""Your network: at which learning rates it trains, with its batch normalization, without, and with group norm."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import ImageTraining, Job, OwnNetwork, OwnNorm, Run, Tier
from batchnorm.lab.fit import fit as run
from batchnorm.lab.measures import (
    accuracy_over_seeds,
    at_best_rate,
    at_rate,
    final_validation_accuracy,
    find,
    gain_over_seeds,
    key,
    of_arm,
    said,
)

__all__ = ["ARMS", "CARD", "figure", "jobs", "judge", "measure", "run"]

STEPS, BATCH = 150, 64
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
OWN, WITHOUT, GROUP = "batch norm", "without", "group norm"
ARMS: dict[str, OwnNorm] = {OWN: "own", WITHOUT: "none", GROUP: "group"}

CARD = Card(
    name="own_rates",
    tier="network",
    title="Your network trains better with its batch normalization",
    claim="At its best learning rate, and at a wide range of rates, your network trains better with batch "
    "normalization than without, and than with group normalization in its place.",
    source="the question of whoever chooses a normalization",
    paper_figure="",
    setup=f"Your network on your images, {STEPS} steps of plain SGD, batches of {BATCH}, rates "
    f"{', '.join(f'{rate:g}' for rate in RATES)}; own best rates have the highest final validation accuracy. Without: "
    "each batch normalization layer is a bias. Group norm: 32 groups where the channels allow it.",
    caveat="The first steps only, with plain SGD: it shows how easily the network starts to learn, not where it "
    "ends. The factory's own initial weights are kept in all arms, though without normalization others may be better.",
    threshold="Test accuracy at own best rates: batch norm less without, and less group norm, more than 0 (lower "
    "ends of the intervals). Partly: one of them.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each run."""
    training = ImageTraining(batch_size=BATCH, steps=STEPS, evaluations=(0, STEPS))
    return [
        Job(CARD.name, (Run(CARD.name, arm, seed, rate, OwnNetwork(norm=norm), training),))
        for arm, norm in ARMS.items()
        for seed in seeds
        for rate in RATES
    ]


def measure(records: Sequence[Record]) -> list[Measure]:
    """Gains at own best and equal rates; accuracies at own best and at each rate."""
    own = {arm: at_best_rate(of_arm(records, arm), final_validation_accuracy) for arm in ARMS}
    found = []
    for arm in (WITHOUT, GROUP):
        label = f"test accuracy, {OWN} less {arm}"
        found.append(gain_over_seeds(f"over_{key(arm)}", f"{label}, own best rates", own[OWN], own[arm]))
        rate = own[arm][0]["rate"]
        same = at_rate(of_arm(records, OWN), rate)
        found.append(gain_over_seeds(f"equal_{key(arm)}", f"{label}, equal rate {rate:g}", same, own[arm]))
    for arm, of in own.items():
        label = f"test accuracy, {arm}, own best rate {of[0]['rate']:g}"
        found.append(accuracy_over_seeds(f"best_{key(arm)}", label, of))
    for arm in ARMS:
        for rate in RATES:
            of = at_rate(of_arm(records, arm), rate)
            found.append(accuracy_over_seeds(f"{key(arm)}_at_{rate:g}", f"test accuracy, {arm}, rate {rate:g}", of))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    without, group = find(measures, "over_without"), find(measures, "over_group_norm")
    reading = (
        f"At own best rates your network ends {said(without)} higher with its batch normalization than without, and "
        f"{said(group)} higher than with group normalization in its place (less than 0: lower)."
    )
    holds = [without.low > 0, group.low > 0]
    return Verdict("shown" if all(holds) else "partly" if any(holds) else "not shown", without, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Test accuracy over the rate, mean, interval and every seed."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREEN, ORANGE, legend, log_axis, panel
    from batchnorm.reporting.spreads import over

    drawing, axes = panel("Accuracy at each learning rate", "learning rate", "test accuracy (%)")
    told = []
    for arm, colour, dashes in zip(ARMS, (BLUE, ORANGE, GREEN), DASHES, strict=False):
        of = [find(measures, f"{key(arm)}_at_{rate:g}") for rate in RATES]
        over(axes, RATES, of, color=colour, linestyle=dashes, label=arm)
        told.append(f"{arm} {find(measures, f'best_{key(arm)}').mean:.1f} %")
    log_axis(axes.xaxis)
    axes.set_ylim(bottom=0)
    legend(axes)
    return {"rates": (drawing, f"Test accuracy over the learning rate; at own best rates {'; '.join(told)}.")}
