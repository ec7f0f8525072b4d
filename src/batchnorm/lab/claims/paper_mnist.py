"""The paper's section 4.1 whole: three layers of 100 sigmoids on binarised images, 50,000 steps of batch 60."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import ImageTraining, Job, Network, Norm, Run, Tier, spaced_steps, stacked
from batchnorm.lab.drift import Looks
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
from batchnorm.lab.train import train

LEVEL = 0.95
"""Accuracy to which steps are counted: the plain network of the paper's figure passes it on the way."""
FEWER = 2.0
"""Shown: to that accuracy the plain network takes at least so many times the steps, at the paper-like rate ..."""
STEPS, BATCH = 50_000, 60
PAPER_LIKE, FAST = 0.1, 3.0
"""The paper gives no rate: one at which the plain network stands still for long, as in its figure, and the best one."""
PLAIN, NORMALISED = "plain", "batch norm"

CARD = Card(
    name="paper_mnist",
    tier="standard",
    title="The paper's first experiment: faster, and steadier inputs",
    claim="A network of three hidden layers of 100 sigmoids trains faster to a higher test accuracy with batch "
    "normalization, and the inputs of its last hidden layer stay steadier.",
    source="Ioffe & Szegedy 2015, section 4.1, figure 1",
    paper_figure="50,000 steps: the curve with batch normalization lies above the other one all the way; percentiles "
    "of a typical unit steady with it, wandering without (no numbers)",
    setup=f"Binarised images, three hidden layers of 100 sigmoid units, initial weights with standard deviation 0.1, "
    f"{STEPS} steps of batch {BATCH}, constant rates {PAPER_LIKE:g} and {FAST:g} (the paper gives neither the rate nor "
    f"the standard deviation). Own best rates have the highest final validation accuracy. Percentiles: of the last "
    f"hidden layer's sigmoid inputs on the validation images.",
    caveat=f"How much faster depends on the rate: at {PAPER_LIKE:g} the plain network stands still for thousands of "
    "steps, at its best rate it does not, and both are reported. On three layers with a tuned rate batch normalization "
    "need not end higher.",
    threshold=f"Steps to {LEVEL:.0%} test accuracy at rate {PAPER_LIKE:g}, plain over batch norm: at least {FEWER:g}; "
    f"and drift of the last layer's inputs at own best rates, plain over batch norm: more than 1 (lower ends of the "
    f"intervals). Partly: one of them.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A stack of all seeds for each arm and rate."""
    training = ImageTraining(
        inputs="binarised", batch_size=BATCH, steps=STEPS, evaluations=spaced_steps(STEPS, 50, 1.1)
    )
    networks = {arm: Network(depth=3, width=100, activation="sigmoid", norm=kind) for arm, kind in _NORMS.items()}
    return [
        job
        for rate in (PAPER_LIKE, FAST)
        for job in stacked(
            Run(CARD.name, arm, seed, rate, network, training) for arm, network in networks.items() for seed in seeds
        )
    ]


def run(job: Job) -> list[dict[str, Any]]:
    """Train the stack, and look at the last hidden layer's inputs; values as those of `drift.Looks`."""
    return train(job, Looks(job))


def measure(records: Sequence[Record]) -> list[Measure]:
    """Ratios of steps at both rates and of drift; accuracies."""
    arms = {arm: of_arm(records, arm) for arm in _NORMS}
    own = {arm: at_best_rate(of, final_validation_accuracy) for arm, of in arms.items()}
    found = []
    for name, rate in (("paper_like", PAPER_LIKE), ("fast", FAST)):
        slow, quick = (at_rate(of, rate) for of in arms.values())
        late = sum(steps_to(one, LEVEL, "test_accuracy") is None for one in [*slow, *quick])
        aside = f" ({late} of {len(slow) + len(quick)} runs never reach it and count {STEPS})" if late else ""
        label = f"steps to {LEVEL:.0%}, plain over batch norm, rate {rate:g}{aside}"
        ratios = [_steps(one) / _steps(other) for one, other in zip(slow, quick, strict=True)]
        found.append(ratio_over_seeds(f"steps_{name}", label, ratios))
        label = f"accuracy that batch norm adds after {STEPS} steps, rate {rate:g}"
        found.append(gain_over_seeds(f"gain_{name}", label, quick, slow))
    drifts = [_drift(one) / _drift(other) for one, other in zip(*own.values(), strict=True)]
    found.append(
        ratio_over_seeds("drift", "drift of the last layer's inputs, plain over batch norm, own best rates", drifts)
    )
    gain = gain_over_seeds("gain_own", "accuracy that batch norm adds, own best rates", own[NORMALISED], own[PLAIN])
    found.append(gain)
    for arm, of in arms.items():
        for rate in (PAPER_LIKE, FAST):
            name = f"accuracy_{arm.replace(' ', '_')}_{'fast' if rate == FAST else 'paper_like'}"
            found.append(accuracy_over_seeds(name, f"test accuracy, {arm}, rate {rate:g}", at_rate(of, rate)))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    steps, fast, drift = (find(measures, name) for name in ("steps_paper_like", "steps_fast", "drift"))
    gain, own = find(measures, "gain_paper_like"), find(measures, "gain_own")
    reading = (
        f"At rate {PAPER_LIKE:g} the plain network takes {said(steps)} as many steps to {LEVEL:.0%}, at rate {FAST:g} "
        f"{said(fast)}. After {STEPS} steps batch normalization is {said(gain)} ahead at rate {PAPER_LIKE:g} and "
        f"{said(own)} at own best rates. The inputs of the last hidden layer drift {said(drift)} as far without it."
    )
    holds = [steps.low >= FEWER, drift.low > 1]
    return Verdict("shown" if all(holds) else "partly" if any(holds) else "not shown", steps, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """The paper's figure 1: accuracy over steps, and the percentiles of a typical unit of both networks."""
    from batchnorm.reporting.figures import BLUE, DASHES, ORANGE, legend, log_axis, panel

    figures: Figures = {}
    for name, rate in (("paper_like", PAPER_LIKE), ("fast", FAST)):
        drawing, axes = panel(f"Test accuracy, rate {rate:g}", "step", "test accuracy (%)")
        for (arm, colour), dashes in zip(((NORMALISED, BLUE), (PLAIN, ORANGE)), DASHES, strict=False):
            label: str | None = arm
            for record in at_rate(of_arm(records, arm), rate):
                accuracy = [100 * value for value in record["curves"]["test_accuracy"][1:]]
                axes.plot(record["curves"]["step"][1:], accuracy, color=colour, linestyle=dashes, label=label)
                label = None
        log_axis(axes.xaxis)
        axes.set_ylim(0, 100)
        legend(axes)
        ratio = find(measures, f"steps_{name}")
        alt = (
            f"Test accuracy over steps on a logarithmic axis at rate {rate:g}, one line a seed; to {LEVEL:.0%} the "
            f"plain network takes {ratio.mean:.1f} times the steps."
        )
        figures[f"accuracy_{name}"] = (drawing, alt)
    for arm, colour in ((PLAIN, ORANGE), (NORMALISED, BLUE)):
        record = at_rate(of_arm(records, arm), PAPER_LIKE)[0]
        typical, steps = record["values"]["typical"], record["curves"]["step"]
        low, middle, high = np.array(typical["percentiles"], dtype=float).T
        drawing, axes = panel(f"{arm.capitalize()}: input of a typical sigmoid", "step", "15th, 50th, 85th percentile")
        for line in (low, middle, high):
            axes.plot(steps[1:], line[1:], color=colour, linestyle="-")
        log_axis(axes.xaxis)
        alt = (
            f"Percentiles of the input of unit {typical['unit']} ({arm}, rate {PAPER_LIKE:g}) over steps: the median "
            f"goes from {middle[0]:.2f} to {middle[-1]:.2f}, the spread from "
            f"{high[0] - low[0]:.2f} to {high[-1] - low[-1]:.2f}."
        )
        figures[f"percentiles_{arm.replace(' ', '_')}"] = (drawing, alt)
    return figures


_NORMS: dict[str, Norm] = {PLAIN: "none", NORMALISED: "batch"}


def _steps(record: Record) -> int:
    return steps_to(record, LEVEL, "test_accuracy") or STEPS


def _drift(record: Record) -> float:
    return max(float(sum(record["values"]["drift"])), 1e-9)
