"""With batch normalization the distribution of a layer's inputs drifts less while the network trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import Job, Network, Run, Tier, Training, even_steps, stacked
from batchnorm.lab.drift import Looks
from batchnorm.lab.measures import (
    at_rate,
    best_rate,
    final_validation_accuracy,
    find,
    measure_over_seeds,
    of_arm,
    ratio_over_seeds,
    said,
)
from batchnorm.lab.train import train
from batchnorm.reporting.numbers import number

SHOWN = 1.5
"""Shown: without batch normalization the inputs drift at least this many times as far, at own best rates."""
STEPS, EVERY = 1000, 25
RATES = (0.5, 1.0, 2.0, 4.0)

PLAIN, NORMALISED = "plain", "batch norm"

CARD = Card(
    name="distribution_drift",
    title="The distribution of a layer's inputs drifts less during training",
    claim="Batch normalization makes the distribution of a layer's inputs more stable while the layers below it learn.",
    source="Ioffe & Szegedy 2015, section 4.1 and figures 1(b) and 1(c)",
    paper_figure="no number: the 15th, 50th and 85th percentiles of a typical sigmoid's input over 50,000 steps, "
    "steady with batch normalization and not without",
    setup=f"Digits (pixels from 0 to 1), three hidden layers of 100 sigmoid units, initial weights with standard "
    f"deviation 0.1, batches of 60, {STEPS} steps, rates {', '.join(f'{rate:g}' for rate in RATES)}; an arm's own best "
    f"one has the highest final validation accuracy, the equal one is the plain network's best. Every {EVERY} steps "
    f"the 300 validation images go through as one batch, and the inputs of the last hidden layer's sigmoids are looked "
    f"at. Drift: how far a unit's three percentiles move from look to look, summed over training, in units of their "
    f"own spread (the 85th less the 15th, mean over all looks), averaged over percentiles and units.",
    caveat="Batch normalization fixes mean and variance of these inputs up to a learned scale and shift, so part of "
    "this holds by construction; the drift of the linear map before it is measured beside it. That less drift is WHY "
    "training is faster does not follow, and is disputed (Santurkar et al. 2018). Drift was first "
    "taken in units of the spread at the moment; the mean spread over all of training makes the ratio far smaller.",
    threshold=f"Drift without over drift with batch normalization: at least {SHOWN:g} at each arm's own best rate, and "
    f"more than 1 at equal rate (lower ends of the intervals). Partly: more than 1 in one of the two.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """One job for each arm: all seeds at all rates."""
    return stacked(
        Run(
            CARD.name,
            arm,
            seed,
            rate,
            Network(depth=3, width=100, activation="sigmoid", norm="batch" if arm == NORMALISED else "none"),
            Training(inputs="unit", batch_size=60, steps=STEPS, evaluations=even_steps(STEPS, EVERY)),
        )
        for arm in (NORMALISED, PLAIN)
        for seed in seeds
        for rate in RATES
    )


def run(job: Job) -> list[dict[str, Any]]:
    """Train the runs and look at the last hidden layer at each evaluation.

    Their values: "drift" and "drift_before" from each look to the next, averaged over units and percentiles, of what
    the sigmoids get and of the linear maps before normalisation; "typical": the "percentiles" at each look of the unit
    whose drift is the median of all units, its number, and "histograms" half-way and at the end.
    """
    return train(job, Looks(job))


def measure(records: Sequence[Record]) -> list[Measure]:
    """Ratios of drift at own best and equal rates; drift by arm, and before normalisation."""
    plain, normalised = of_arm(records, PLAIN), of_arm(records, NORMALISED)
    own = best_rate(plain, final_validation_accuracy)
    theirs, ours = at_rate(plain, own), at_rate(normalised, best_rate(normalised, final_validation_accuracy))
    same = at_rate(normalised, own)
    words = "drift of the inputs, plain over batch norm"
    return [
        _ratio("ratio_own", f"{words}, own best rates", theirs, ours),
        _ratio("ratio_equal", f"{words}, equal rate {own:g}", theirs, same),
        _drift("drift_plain", f"drift, plain, rate {own:g}", theirs, "drift"),
        _drift("drift_batch_norm", f"drift, batch norm, rate {ours[0]['rate']:g}", ours, "drift"),
        _drift("drift_before", "drift of the linear map before batch norm", ours, "drift_before"),
    ]


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    own, equal = find(measures, "ratio_own"), find(measures, "ratio_equal")
    plain, normalised, before = (find(measures, f"drift_{name}") for name in ("plain", "batch_norm", "before"))
    reading = (
        f"Over {STEPS} steps the inputs of the last hidden layer's sigmoids move {number(plain.mean)} times their own "
        f"spread without batch normalization and {number(normalised.mean)} times with it, each at its own best rate: "
        f"{said(own)}. At equal rate the ratio is {said(equal)}. Before the normalisation, what the linear map gives "
        f"moves {number(before.mean)} times its spread."
    )
    if own.low >= SHOWN and equal.low > 1:
        return Verdict("shown", own, reading)
    return Verdict("partly" if own.low > 1 or equal.low > 1 else "not shown", own, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """The percentiles of a typical unit over steps, and its histograms with fitted normal densities."""
    from batchnorm.reporting.figures import BLUE, GREY, ORANGE, legend, panel

    figures: Figures = {}
    for arm, colour, name in ((PLAIN, ORANGE, "plain"), (NORMALISED, BLUE, "batch_norm")):
        chosen = of_arm(records, arm)
        record = at_rate(chosen, best_rate(chosen, final_validation_accuracy))[0]
        typical, steps = record["values"]["typical"], record["curves"]["step"]
        low, middle, high = np.array(typical["percentiles"], dtype=float).T
        drawing, axes = panel(f"{arm.capitalize()}: input of a typical sigmoid", "step", "input of the sigmoid")
        axes.fill_between(steps, low, high, color=colour, alpha=0.25, label="15th to 85th percentile")
        axes.plot(steps, middle, color=colour, linestyle="-", label="median")
        legend(axes, columns=2)
        alt = (
            f"Percentiles of the input of unit {typical['unit']} ({arm}, rate {record['rate']:g}) over {steps[-1]} "
            f"steps: the median goes from {middle[0]:.2f} to {middle[-1]:.2f}, between {middle.min():.2f} and "
            f"{middle.max():.2f}; the spread from {high[0] - low[0]:.2f} to {high[-1] - low[-1]:.2f}."
        )
        figures[name] = (drawing, alt)
        drawing, axes = panel(f"{arm.capitalize()}: half-way and end, normal fitted", "input of the sigmoid", "density")
        half_way, end = typical["histograms"]
        for histogram, shade in ((half_way, GREY), (end, colour)):
            edges = np.linspace(histogram["low"], histogram["high"], len(histogram["counts"]) + 1)
            density = np.array(histogram["counts"]) / sum(histogram["counts"]) / (edges[1] - edges[0])
            axes.stairs(density, edges, color=shade, alpha=0.45, fill=True)
            mean, std = histogram["mean"], histogram["std"]
            x = np.linspace(mean - 3.5 * std, mean + 3.5 * std, 200)
            normal = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
            axes.plot(x, normal, color=shade, linestyle="-", label=f"step {histogram['step']}")
        legend(axes, columns=2)
        alt = (
            f"Histograms of the same inputs with fitted normal densities ({arm}): mean {half_way['mean']:.2f} and "
            f"standard deviation {half_way['std']:.2f} at step {half_way['step']}, {end['mean']:.2f} and "
            f"{end['std']:.2f} at step {end['step']}."
        )
        figures[f"{name}_histograms"] = (drawing, alt)
    return figures


def _total(record: Record, which: str) -> float:
    return float(np.sum(record["values"][which]))


def _drift(name: str, label: str, records: Sequence[Record], which: str) -> Measure:
    return measure_over_seeds(name, label, "spreads", [_total(record, which) for record in records])


def _ratio(name: str, label: str, theirs: Sequence[Record], ours: Sequence[Record]) -> Measure:
    pairs = zip(theirs, ours, strict=True)
    return ratio_over_seeds(name, label, [_total(plain, "drift") / _total(other, "drift") for plain, other in pairs])
