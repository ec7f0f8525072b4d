"""Whitening the activations (decorrelated batch normalization) against standardising them: quality and cost."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import ImageNetwork, ImageTraining, Job, Run, Tier, even_steps
from batchnorm.lab.fit import fit as run
from batchnorm.lab.measures import (
    accuracy_over_seeds,
    at_best_rate,
    at_rate,
    final_validation_accuracy,
    find,
    gain_over_seeds,
    of_arm,
    ratio_over_seeds,
    said,
)

__all__ = ["CARD", "figure", "jobs", "judge", "measure", "run"]

STEPS, EVERY = 300, 25
RATES = (0.03, 0.1, 0.3)
STANDARDISED, WHITENED = "batch norm", "decorrelated batch norm"
_NETWORKS = {
    STANDARDISED: ImageNetwork(kind="vgg", norm="batch"),
    WHITENED: ImageNetwork(kind="vgg", norm="decorrelated"),
}

CARD = Card(
    name="whitening",
    tier="full",
    title="Whitening trains better than standardising, at a price",
    claim="Whitening the activations of a layer, which also takes out their correlations, trains a network better than "
    "standardising each of them.",
    source="Huang et al. 2018 (arXiv 1804.08450), section 4; turned down as too costly by Ioffe & Szegedy 2015, "
    "section 3",
    paper_figure="CIFAR-10, deep VGG and residual networks: about half a point to one point less error",
    setup=f"10000 images averaged down to 16x16, a VGG of six convolutions, batches of 64, {STEPS} steps, rates "
    f"{', '.join(f'{rate:g}' for rate in RATES)}; own best rates have the highest final validation accuracy. Exact ZCA "
    "in eight groups of channels.",
    caveat="A few hundred steps. Seconds are of training on one thread: the price depends on the machine.",
    threshold="Test accuracy at own best rates, whitened less standardised: more than 0 (lower end of the interval). "
    "Partly: more than 0 at equal rate.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each run."""
    training = ImageTraining(rows=10_000, side=16, batch_size=64, steps=STEPS, evaluations=even_steps(STEPS, EVERY))
    return [
        Job(CARD.name, (Run(CARD.name, arm, seed, rate, network, training),))
        for arm, network in reversed(_NETWORKS.items())
        for seed in seeds
        for rate in RATES
    ]


def measure(records: Sequence[Record]) -> list[Measure]:
    """Gains at own best and equal rates, the price in seconds, accuracies."""
    own = {arm: at_best_rate(of_arm(records, arm), final_validation_accuracy) for arm in _NETWORKS}
    equal = own[STANDARDISED][0]["rate"]
    same = at_rate(of_arm(records, WHITENED), equal)
    words = "test accuracy, whitened less standardised"
    prices = [_seconds(one) / _seconds(other) for one, other in zip(own[WHITENED], own[STANDARDISED], strict=True)]
    return [
        gain_over_seeds("gain_own", f"{words}, own best rates", own[WHITENED], own[STANDARDISED]),
        gain_over_seeds("gain_equal", f"{words}, equal rate {equal:g}", same, own[STANDARDISED]),
        ratio_over_seeds("price", "seconds of training, whitened over standardised", prices),
        *(
            accuracy_over_seeds(
                f"accuracy_{arm.replace(' ', '_')}", f"test accuracy, {arm}, rate {of[0]['rate']:g}", of
            )
            for arm, of in own.items()
        ),
    ]


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    own, equal, price = (find(measures, name) for name in ("gain_own", "gain_equal", "price"))
    reading = (
        f"At own best rates whitening adds {said(own)} of test accuracy to batch normalization, at equal rate "
        f"{said(equal)}; training takes {said(price)} as long."
    )
    return Verdict("shown" if own.low > 0 else "partly" if equal.low > 0 else "not shown", own, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Validation accuracy over steps and over seconds at own best rates, one line a seed."""
    from batchnorm.reporting.figures import BLUE, DASHES, PURPLE, legend, panel

    figures: Figures = {}
    for against, words in (("step", "step"), ("seconds", "seconds of training (one thread)")):
        drawing, axes = panel(f"Accuracy over {against}s".replace("ss", "s"), words, "validation accuracy (%)")
        told = []
        for (arm, colour), dashes in zip(zip(_NETWORKS, (BLUE, PURPLE), strict=True), DASHES, strict=False):
            of = at_best_rate(of_arm(records, arm), final_validation_accuracy)
            label: str | None = arm
            for record in of:
                accuracy = [100 * value for value in record["curves"]["validation_accuracy"]]
                axes.plot(record["curves"][against], accuracy, color=colour, linestyle=dashes, label=label)
                label = None
            told.append(f"{arm} {100 * sum(map(final_validation_accuracy, of)) / len(of):.1f} %")
        axes.set_ylim(bottom=0)
        legend(axes)
        figures[against] = (
            drawing,
            f"Validation accuracy over {words}, one line a seed; at the end {'; '.join(told)}.",
        )
    return figures


def _seconds(record: Record) -> float:
    return max(float(record["curves"]["seconds"][-1]), 1e-9)
