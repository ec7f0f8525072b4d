"""With batch normalization a wider range of initial scales trains."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import Job, Network, Run, Tier, Training, stacked
from batchnorm.lab.measures import (
    accuracy_over_seeds,
    at_best_rate,
    at_rate,
    best_rate,
    final_validation_accuracy,
    find,
    last,
    measure_over_seeds,
    of_arm,
    said,
    window,
)
from batchnorm.lab.train import train as run

__all__ = ["CARD", "figure", "jobs", "judge", "measure", "run"]

TRAINS = 0.85
"""A scale trains if the test accuracy after all steps is at least this."""
WIDER = 1.0
"""Shown: the window of scales that train is wider by at least this many powers of ten."""
SCALES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
RATES = (0.03, 0.1, 0.3, 1.0)
STEPS = 250

PLAIN, NORMALISED = "plain", "batch norm"

CARD = Card(
    name="initial_scale",
    title="A wider range of initial scales trains",
    claim="Batch normalization makes training far less dependent on the scale of the initial weights.",
    source="Ioffe & Szegedy 2015, abstract and section 3.3",
    paper_figure='no number: "allows us to [...] be less careful about initialization"',
    setup=f"Digits (pixels from 0 to 1), five hidden layers of 100 ReLU units, batches of 60, {STEPS} steps; standard "
    f"deviations of initial weights {', '.join(f'{scale:g}' for scale in SCALES)} (He's rule: about 0.14). Own best "
    f"rate: at every scale the one of {', '.join(f'{rate:g}' for rate in RATES)} with the highest final validation "
    f"accuracy. Equal rate: the one at which the plain network has the highest of all. A scale trains if the test "
    f"accuracy is at least {TRAINS:.0%} at the end; the window is the widest stretch of scales that do, its ends "
    f"interpolated between the scales tried.",
    caveat="The scale is the same in all layers, and the rates are three times apart: a finer search, a rate for each "
    "layer or many more steps could rescue some plain networks.",
    threshold=f"The window is wider by at least {WIDER:g} power of ten at own best rates, and wider at equal rate "
    f"(lower ends of the intervals). Partly: wider in one of the two.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """For each arm all seeds at all scales and rates."""
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
                init="gaussian",
                init_scale=scale,
            ),
            Training(inputs="unit", batch_size=60, steps=STEPS, evaluations=(STEPS // 2, STEPS)),
        )
        for arm in (NORMALISED, PLAIN)
        for seed in seeds
        for scale in SCALES
        for rate in RATES
    )


def measure(records: Sequence[Record]) -> list[Measure]:
    """Widths of the windows at own best rates and at equal rate."""
    plain, normalised = of_arm(records, PLAIN), of_arm(records, NORMALISED)
    equal = _plain_best_rate(plain)
    own = {PLAIN: _widths(_at_own_best(plain)), NORMALISED: _widths(_at_own_best(normalised))}
    same = {PLAIN: _widths(_at_equal(plain, equal)), NORMALISED: _widths(_at_equal(normalised, equal))}
    found = [
        measure_over_seeds(
            name, f"initial scales that train: powers of ten more with batch norm, {words}", "decades", _more(widths)
        )
        for name, words, widths in (
            ("wider_own", "own best rates", own),
            ("wider_equal", f"equal rate {equal:g}", same),
        )
    ]
    for words, suffix, widths in (("own best rates", "own", own), (f"rate {equal:g}", "equal", same)):
        for arm in (PLAIN, NORMALISED):
            name = f"window_{arm.replace(' ', '_')}_{suffix}"
            found.append(measure_over_seeds(name, f"scales that train, {arm}, {words}", "decades", widths[arm]))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    own, equal = find(measures, "wider_own"), find(measures, "wider_equal")
    plain, normalised = find(measures, "window_plain_own"), find(measures, "window_batch_norm_own")
    reading = (
        f"Each scale at its best rate, the initial scales that train span {plain.mean:.2f} powers of ten without batch "
        f"normalization and {normalised.mean:.2f} with it: {said(own)} more. At equal rate it is {said(equal)} more. "
        f"(What was tried spans {math.log10(SCALES[-1] / SCALES[0]):.1f}.)"
    )
    if own.low >= WIDER and equal.low > 0:
        return Verdict("shown", own, reading)
    return Verdict("partly" if own.low > 0 or equal.low > 0 else "not shown", own, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Test accuracy over the initial scale at own best rates: mean, interval and every seed."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREY, ORANGE, legend, log_axis, panel
    from batchnorm.reporting.spreads import over

    drawing, axes = panel(
        "Accuracy at each initial scale", "standard deviation of the initial weights", "test accuracy (%)"
    )
    for arm, colour, dashes in ((NORMALISED, BLUE, DASHES[0]), (PLAIN, ORANGE, DASHES[1])):
        chosen = _at_own_best(of_arm(records, arm))
        each = [accuracy_over_seeds(arm, arm, of) for of in chosen.values()]
        over(axes, list(chosen), each, color=colour, linestyle=dashes, label=arm)
    axes.axhline(100 * TRAINS, color=GREY, linewidth=1, linestyle=":")
    log_axis(axes.xaxis)
    axes.set_ylim(0, 100)
    legend(axes)
    widths = [find(measures, f"window_{arm}_own").mean for arm in ("batch_norm", "plain")]
    alt = (
        f"Test accuracy over the initial standard deviation on a logarithmic axis, each at its own best rate: mean, "
        f"interval and every seed. Above the dotted line at {TRAINS:.0%} are {widths[0]:.2f} powers of ten with batch "
        f"norm and {widths[1]:.2f} without."
    )
    return {"scales": (drawing, alt)}


_ByScale = dict[float, list[Record]]


def _scale(record: Record) -> float:
    return float(record["config"]["network"]["init_scale"])


def _at_own_best(records: Sequence[Record]) -> _ByScale:
    """Scale -> records at the rate that is best at that scale, one for each seed."""
    scales = sorted({_scale(record) for record in records})
    return {
        scale: at_best_rate([one for one in records if _scale(one) == scale], final_validation_accuracy)
        for scale in scales
    }


def _plain_best_rate(plain: Sequence[Record]) -> float:
    """The rate of the plain network at the scale where it does best."""
    at_best = _at_own_best(plain).values()
    best = max(at_best, key=lambda chosen: sum(final_validation_accuracy(one) for one in chosen))
    return best_rate(best, final_validation_accuracy)


def _at_equal(records: Sequence[Record], rate: float) -> _ByScale:
    scales = sorted({_scale(record) for record in records})
    return {scale: at_rate([one for one in records if _scale(one) == scale], rate) for scale in scales}


def _widths(chosen: _ByScale) -> list[float]:
    """The width of each seed's window, in powers of ten."""
    by_seed = zip(*chosen.values(), strict=True)
    scales = [math.log10(scale) for scale in chosen]
    windows = [window(scales, [last(one, "test_accuracy") for one in of_seed], TRAINS) for of_seed in by_seed]
    return [ends[1] - ends[0] if ends else 0.0 for ends in windows]


def _more(widths: dict[str, list[float]]) -> list[float]:
    return [ours - theirs for ours, theirs in zip(widths[NORMALISED], widths[PLAIN], strict=True)]
