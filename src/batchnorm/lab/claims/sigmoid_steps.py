"""Sigmoid networks reach a given accuracy in fewer steps with batch normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from batchnorm.lab.claim import Card, Figures, Measure, Record, Reported, Verdict
from batchnorm.lab.config import Inputs, Job, Network, Run, Tier, Training, spaced_steps, stacked
from batchnorm.lab.measures import (
    accuracy_over_seeds,
    at_rate,
    best_rate,
    find,
    gain_over_seeds,
    of_arm,
    ratio_over_seeds,
    said,
    steps_to,
)
from batchnorm.lab.train import train as run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CARD", "figure", "jobs", "judge", "measure", "run"]

LEVEL = 0.85
"""The given accuracy: one that a plain network, too, reaches in the steps it has."""
FEWER = 2.0
"""Shown: at each arm's own best rate at most one step where the plain network takes this many ..."""
STEPS = 1000
RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)

PLAIN, NORMALISED = "plain", "batch norm"
CONTROL = ", standardised inputs"
_INPUTS: dict[str, Inputs] = {"": "unit", CONTROL: "standardised"}

CARD = Card(
    name="sigmoid_steps",
    title="Sigmoid networks reach a given accuracy in fewer steps",
    claim="A network of sigmoid layers reaches a given test accuracy in fewer training steps with batch normalization.",
    source="Ioffe & Szegedy 2015, section 4.1 and figure 1(a); section 4.2.2 for Inception",
    paper_figure="Inception, steps to 72.2 %: 31.0M without it, 13.3M at the same rate, 2.1M at five times the rate",
    setup=f"Digits (pixels from 0 to 1), three hidden layers of 100 sigmoid units, initial weights with standard "
    f"deviation 0.1, batches of 60, {STEPS} steps, rates {', '.join(f'{rate:g}' for rate in RATES)}. An arm's own best "
    f"rate reaches {LEVEL:.0%} in the fewest validation steps; the equal rate is the plain network's best. The control "
    f"repeats all of it on standardised pixels. Steps are counted on the test rows, and looked at about 12 % apart.",
    caveat=f"A small network on small images. The ratio depends on the level ({LEVEL:.0%} was chosen after one trial "
    "seed, in which the plain network hardly reached 90 %) and on the inputs: plain sigmoid layers "
    "first stand still on a plateau, which standardised inputs shorten too, at no cost. And a step with batch "
    "normalization takes longer: see the figure over seconds.",
    threshold=f"Steps to {LEVEL:.0%} test accuracy, without over with: at least {FEWER:g} at each arm's own best rate, "
    f"and more than 1 at equal rate and in the control (lower ends of the intervals). Partly: more than 1 at the own "
    f"best rates or at equal rate.",
    reported=(
        Reported("ratio_own", 31.0 / 2.1, "paper: Inception on ImageNet, BN at five times the rate"),
        Reported("ratio_equal", 31.0 / 13.3, "paper: Inception on ImageNet, same rate"),
    ),
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """One job for each arm: all seeds at all rates."""
    return stacked(
        Run(
            CARD.name,
            arm + control,
            seed,
            rate,
            Network(depth=3, width=100, activation="sigmoid", norm="batch" if arm == NORMALISED else "none"),
            Training(inputs=inputs, batch_size=60, steps=STEPS, evaluations=spaced_steps(STEPS, 10, 1.12)),
        )
        for arm in (NORMALISED, PLAIN)
        for control, inputs in _INPUTS.items()
        for seed in seeds
        for rate in RATES
    )


def measure(records: Sequence[Record]) -> list[Measure]:
    """Ratios of steps at own best and at equal rates, with their control; steps and final accuracies by arm."""
    ratios, rest = [], []
    for control, suffix in (("", ""), (CONTROL, "_control")):
        plain, normalised = of_arm(records, PLAIN + control), of_arm(records, NORMALISED + control)
        rates = {arm: best_rate(of, _speed) for arm, of in ((PLAIN, plain), (NORMALISED, normalised))}
        slow, fast = at_rate(plain, rates[PLAIN]), at_rate(normalised, rates[NORMALISED])
        same = at_rate(normalised, rates[PLAIN])
        words = f"steps to {LEVEL:.0%}, plain over batch norm"
        ratios += [
            _ratio(f"ratio_own{suffix}", f"{words}, own best rates{control}", slow, fast),
            _ratio(f"ratio_equal{suffix}", f"{words}, equal rate {rates[PLAIN]:g}{control}", slow, same),
        ]
        rest += [
            _steps(f"steps_plain{suffix}", f"steps to {LEVEL:.0%}, plain, rate {rates[PLAIN]:g}{control}", slow),
            _steps(
                f"steps_batch_norm{suffix}",
                f"steps to {LEVEL:.0%}, batch norm, rate {rates[NORMALISED]:g}{control}",
                fast,
            ),
            accuracy_over_seeds(f"accuracy_plain{suffix}", f"accuracy after {STEPS} steps, plain{control}", slow),
            gain_over_seeds(f"gain{suffix}", f"accuracy that batch norm adds after {STEPS} steps{control}", fast, slow),
        ]
    return ratios + rest


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    own, equal, control = (find(measures, name) for name in ("ratio_own", "ratio_equal", "ratio_own_control"))
    plain, normalised, gain = (find(measures, name) for name in ("steps_plain", "steps_batch_norm", "gain"))
    reading = (
        f"To {LEVEL:.0%} test accuracy the plain network takes {plain.mean:.0f} steps and the one with batch "
        f"normalization {normalised.mean:.0f}, each at its own best rate: {said(own)}. At equal rate the ratio is "
        f"{said(equal)}; on standardised inputs, at own best rates, {said(control)}. After {STEPS} steps batch "
        f"normalization is {said(gain)} ahead."
    )
    if own.low >= FEWER and equal.low > 1 and control.low > 1:
        return Verdict("shown", own, reading)
    return Verdict("partly" if own.low > 1 or equal.low > 1 else "not shown", own, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Test accuracy over steps and over seconds, each arm at its own best rate, one line a seed."""
    from batchnorm.reporting.figures import panel

    figures: Figures = {}
    for control, name, title in (("", "steps", "Pixels from 0 to 1"), (CONTROL, "control", "Standardised pixels")):
        drawing, axes = panel(f"{title}, own best rates", "step", "test accuracy (%)")
        _draw(axes, records, control, "step")
        suffix = "_control" if control else ""
        steps = [find(measures, f"steps_{arm}{suffix}").mean for arm in ("batch_norm", "plain")]
        alt = (
            f"Test accuracy over {STEPS} steps on a logarithmic axis, one line a seed. The dotted line is {LEVEL:.0%}: "
            f"with batch norm it is reached after {steps[0]:.0f} steps, without after {steps[1]:.0f}."
        )
        figures[name] = (drawing, alt)
    drawing, axes = panel("The same over time", "seconds of training (one thread)", "test accuracy (%)")
    _draw(axes, records, "", "seconds")
    alt = "Test accuracy of both arms over seconds of training on a logarithmic axis, one line a seed."
    figures["seconds"] = (drawing, alt)
    return figures


def _draw(axes: Axes, records: Sequence[Record], control: str, against: str) -> None:
    """Test accuracy of both arms at their own best rates, one line a seed, against steps or seconds."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREY, ORANGE, legend, log_axis

    for arm, colour, dashes in ((NORMALISED, BLUE, DASHES[0]), (PLAIN, ORANGE, DASHES[1])):
        chosen = of_arm(records, arm + control)
        label: str | None = arm
        for record in at_rate(chosen, best_rate(chosen, _speed)):
            curves = record["curves"]
            accuracy = [100 * value for value in curves["test_accuracy"][1:]]  # step 0 has no place on this axis
            axes.plot(curves[against][1:], accuracy, color=colour, linestyle=dashes, label=label)
            label = None  # one entry in the legend for all seeds of an arm
    axes.axhline(100 * LEVEL, color=GREY, linewidth=1, linestyle=":")
    log_axis(axes.xaxis)
    axes.set_ylim(0, 100)
    legend(axes)


def _speed(record: Record) -> float:
    """Higher the sooner the level is reached on the validation rows; never counts as twice the steps there were."""
    return -math.log(steps_to(record, LEVEL, "validation_accuracy") or 2 * STEPS)


def _steps_or_all(record: Record) -> int:
    return steps_to(record, LEVEL, "test_accuracy") or STEPS


def _steps(name: str, label: str, records: Sequence[Record]) -> Measure:
    """Geometric mean of the steps; a run that never gets there counts with all of its steps, and the label says so."""
    late = sum(steps_to(record, LEVEL, "test_accuracy") is None for record in records)
    found = ratio_over_seeds(name, label + _not_reached(late, len(records)), [_steps_or_all(one) for one in records])
    return Measure(found.name, found.label, "steps", found.values, found.mean, found.low, found.high)


def _ratio(name: str, label: str, slow: Sequence[Record], fast: Sequence[Record]) -> Measure:
    never = sum(steps_to(record, LEVEL, "test_accuracy") is None for record in [*slow, *fast])
    ratios = [_steps_or_all(one) / _steps_or_all(other) for one, other in zip(slow, fast, strict=True)]
    return ratio_over_seeds(name, label + _not_reached(never, len(slow) + len(fast)), ratios)


def _not_reached(late: int, runs: int) -> str:
    return f" ({late} of {runs} runs never reach it and count {STEPS})" if late else ""
