"""Noise that shifts distributions after batch normalization: does it undo the gain? (Santurkar et al. 2018)."""

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
    said,
)

__all__ = ["CARD", "figure", "jobs", "judge", "measure", "run"]

CLOSE = 2.0
"""Shown: noisy batch normalization ends less than so many points below the quiet one ..."""
STEPS = 400
RATES = (0.03, 0.1, 0.3)
PLAIN, NORMALISED, NOISY = "plain", "batch norm", "noisy batch norm"
_NETWORKS = {
    PLAIN: ImageNetwork(kind="vgg", norm="none"),
    NORMALISED: ImageNetwork(kind="vgg", norm="batch"),
    NOISY: ImageNetwork(kind="vgg", norm="noisy"),
}

CARD = Card(
    name="noisy",
    tier="full",
    title="Unstable distributions after batch normalization do no harm",
    claim="If noise with a mean and a variance that change at every step follows batch normalization, the network "
    "still trains nearly as well as with batch normalization alone, and better than without: so it is not the "
    "stability of distributions that helps.",
    source="Santurkar et al. 2018 (arXiv 1805.11604), section 2.2, figure 2",
    paper_figure="VGG on CIFAR-10: the curves of noisy and quiet batch normalization nearly coincide",
    setup=f"10000 images averaged down to 16x16, a VGG of six convolutions, batches of 64, {STEPS} steps, rates "
    f"{', '.join(f'{rate:g}' for rate in RATES)}; own best rates have the highest final validation accuracy. Noise: "
    "each normalised value times 1 + s plus m plus noise of its own, m and s normal with standard deviation 0.5, drawn "
    "for each channel and step.",
    caveat="The size of the noise decides; the paper's is not given for this network. A few hundred steps only: the "
    "paper trains to the end.",
    threshold=f"Noisy less quiet batch normalization, own best rates: more than -{CLOSE:g} points of test accuracy, "
    f"and noisy over plain more than 0 (lower ends of the intervals). Partly: one of them.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each run."""
    training = ImageTraining(rows=10_000, side=16, batch_size=64, steps=STEPS, evaluations=even_steps(STEPS, 50))
    return [
        Job(CARD.name, (Run(CARD.name, arm, seed, rate, network, training),))
        for arm, network in _NETWORKS.items()
        for seed in seeds
        for rate in RATES
    ]


def measure(records: Sequence[Record]) -> list[Measure]:
    """Differences at own best and equal rates, and the accuracies."""
    own = {arm: at_best_rate(of_arm(records, arm), final_validation_accuracy) for arm in _NETWORKS}
    rate = own[NORMALISED][0]["rate"]
    same = at_rate(of_arm(records, NOISY), rate)
    words = "test accuracy"
    return [
        gain_over_seeds("noisy_over_quiet", f"{words}, noisy less quiet, own best rates", own[NOISY], own[NORMALISED]),
        gain_over_seeds("noisy_over_plain", f"{words}, noisy less plain, own best rates", own[NOISY], own[PLAIN]),
        gain_over_seeds("equal", f"{words}, noisy less quiet, equal rate {rate:g}", same, own[NORMALISED]),
        *(
            accuracy_over_seeds(f"accuracy_{arm.replace(' ', '_')}", f"{words}, {arm}, rate {of[0]['rate']:g}", of)
            for arm, of in own.items()
        ),
    ]


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    quiet, plain, equal = (find(measures, name) for name in ("noisy_over_quiet", "noisy_over_plain", "equal"))
    reading = (
        f"At own best rates noisy batch normalization ends {said(quiet)} above the quiet one (less than 0: below), and "
        f"{said(plain)} above the plain network; at equal rate {said(equal)} above the quiet one."
    )
    holds = [quiet.low > -CLOSE, plain.low > 0]
    return Verdict("shown" if all(holds) else "partly" if any(holds) else "not shown", quiet, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Validation accuracy over steps at own best rates, one line a seed."""
    from batchnorm.reporting.figures import BLUE, DASHES, ORANGE, PURPLE, legend, panel

    drawing, axes = panel("Accuracy over steps, own best rates", "step", "validation accuracy (%)")
    told = []
    for arm, colour, dashes in zip(_NETWORKS, (ORANGE, BLUE, PURPLE), DASHES, strict=False):
        of = at_best_rate(of_arm(records, arm), final_validation_accuracy)
        label: str | None = arm
        for record in of:
            accuracy = [100 * value for value in record["curves"]["validation_accuracy"]]
            axes.plot(record["curves"]["step"], accuracy, color=colour, linestyle=dashes, label=label)
            label = None
        told.append(f"{arm} {100 * sum(map(final_validation_accuracy, of)) / len(of):.1f} %")
    axes.set_ylim(bottom=0)
    legend(axes)
    return {"steps": (drawing, f"Validation accuracy over steps, one line a seed; at the end {'; '.join(told)}.")}
