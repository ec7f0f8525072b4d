"""Before or after the activation: where batch normalization belongs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import Activation, Job, Network, Placement, Run, Tier, Training, spaced_steps, stacked
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
    steps_to,
)
from batchnorm.lab.train import train as run

__all__ = ["CARD", "figure", "jobs", "judge", "measure", "run"]

BETTER = 0.0
"""Shown: before the activation, test accuracy is higher by more than this, with both activations."""
LEVEL = 0.85
STEPS = 600
RATES = (0.1, 0.3, 1.0, 3.0)

ACTIVATIONS: tuple[Activation, ...] = ("sigmoid", "relu")
_WORDS = {"sigmoid": "sigmoid", "relu": "ReLU"}
_PLACEMENTS: tuple[Placement, ...] = ("before", "after")

CARD = Card(
    name="placement",
    title="Batch normalization belongs before the activation",
    claim="Batch normalization works better before the activation (on the linear map's outputs) than after it.",
    source="Ioffe & Szegedy 2015, section 3.2",
    paper_figure="no number: before, since the linear map's outputs are more nearly normally distributed",
    setup=f"Digits (pixels from 0 to 1), three hidden layers of 100 units, sigmoid (initial weights with standard "
    f"deviation 0.1) or ReLU (He's), batches of 60, {STEPS} steps, rates {', '.join(f'{rate:g}' for rate in RATES)}. "
    f"Own best rates have the highest final validation accuracy; the equal rate is the best one before the activation. "
    f"Both have a scale and a shift for each unit; after the activation, the linear map keeps its bias as well.",
    caveat="Small dense networks: in practice the question is asked for deep convolutional ones, and answers differ. "
    "Differences of a point are a handful of the 497 test images.",
    threshold="Test accuracy before less test accuracy after the activation, each at its own best rate: above 0 with "
    "sigmoid and with ReLU (lower ends of the intervals). Partly: with one of them, and not below 0 with the other "
    "(upper end of the interval).",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """One job for each activation and placement: all seeds at all rates."""
    return stacked(
        Run(
            CARD.name,
            _arm(activation, placement),
            seed,
            rate,
            Network(
                depth=3,
                width=100,
                activation=activation,
                norm="batch",
                placement=placement,
                init="fan_in" if activation == "relu" else "gaussian",
                init_scale=math.sqrt(2.0) if activation == "relu" else 0.1,
            ),
            Training(inputs="unit", batch_size=60, steps=STEPS, evaluations=spaced_steps(STEPS, 10, 1.2)),
        )
        for activation in ACTIVATIONS
        for placement in _PLACEMENTS
        for seed in seeds
        for rate in RATES
    )


def measure(records: Sequence[Record]) -> list[Measure]:
    """What "before" adds in accuracy, and its ratio of steps, at own best and at equal rates; accuracies."""
    found, rest = [], []
    for activation in ACTIVATIONS:
        before, after = (of_arm(records, _arm(activation, placement)) for placement in _PLACEMENTS)
        ours, theirs = (at_best_rate(of, final_validation_accuracy) for of in (before, after))
        rates = ours[0]["rate"], theirs[0]["rate"]
        words = f"accuracy before less accuracy after {_WORDS[activation]}"
        same = at_rate(after, rates[0])
        steps = [_steps(late) / _steps(early) for early, late in zip(ours, theirs, strict=True)]
        found.append(gain_over_seeds(f"gain_{activation}", f"{words}, own best rates", ours, theirs))
        rest += [
            gain_over_seeds(f"gain_{activation}_equal", f"{words}, equal rate {rates[0]:g}", ours, same),
            ratio_over_seeds(
                f"steps_{activation}",
                f"steps to {LEVEL:.0%}, after over before {_WORDS[activation]}, own best rates",
                steps,
            ),
            *(
                accuracy_over_seeds(
                    f"accuracy_{activation}_{placement}",
                    f"accuracy, {placement} {_WORDS[activation]}, own best rate {rate:g}",
                    chosen,
                )
                for placement, rate, chosen in zip(_PLACEMENTS, rates, (ours, theirs), strict=True)
            ),
        ]
    return found + rest


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    gains = [find(measures, f"gain_{activation}") for activation in ACTIVATIONS]
    reading = " ".join(_sentence(measures, activation) for activation in ACTIVATIONS)
    better = [gain.low > BETTER for gain in gains]
    worse = [gain.high < -BETTER for gain in gains]
    if all(better):
        return Verdict("shown", gains[0], reading)
    return Verdict("partly" if any(better) and not any(worse) else "not shown", gains[0], reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Test accuracy over steps, each placement at its own best rate, one line a seed."""
    from batchnorm.reporting.figures import BLUE, DASHES, PURPLE, legend, log_axis, panel

    figures: Figures = {}
    for activation in ACTIVATIONS:
        drawing, axes = panel(f"{_WORDS[activation]}, own best rates", "step", "test accuracy (%)")
        for placement, colour, dashes in zip(_PLACEMENTS, (BLUE, PURPLE), DASHES, strict=False):
            label: str | None = placement
            for record in at_best_rate(of_arm(records, _arm(activation, placement)), final_validation_accuracy):
                accuracy = [100 * value for value in record["curves"]["test_accuracy"][1:]]
                axes.plot(record["curves"]["step"][1:], accuracy, color=colour, linestyle=dashes, label=label)
                label = None  # one entry in the legend for all seeds
        log_axis(axes.xaxis)
        axes.set_ylim(0, 100)
        legend(axes)
        ends = [find(measures, f"accuracy_{activation}_{placement}").mean for placement in _PLACEMENTS]
        alt = (
            f"Test accuracy over {STEPS} steps on a logarithmic axis with batch normalization before and after "
            f"{_WORDS[activation]}, one line a seed. At the end: {ends[0]:.1f} % before, {ends[1]:.1f} % after."
        )
        figures[activation] = (drawing, alt)
    return figures


def _sentence(measures: Sequence[Measure], activation: Activation) -> str:
    before, after = (find(measures, f"accuracy_{activation}_{placement}") for placement in _PLACEMENTS)
    gain, equal, steps = (find(measures, name.format(activation)) for name in ("gain_{}", "gain_{}_equal", "steps_{}"))
    return (
        f"With {_WORDS[activation]}, each placement at its own best rate, test accuracy is {before.mean:.1f} % before "
        f"and {after.mean:.1f} % after the activation, a difference of {said(gain)}; at equal rate {said(equal)}. "
        f"Steps to {LEVEL:.0%}, after over before: {said(steps)}."
    )


def _arm(activation: Activation, placement: Placement) -> str:
    return f"{placement} {_WORDS[activation]}"


def _steps(record: Record) -> int:
    """Steps to the level; a run that never gets there counts with all of its steps."""
    return steps_to(record, LEVEL, "test_accuracy") or STEPS
