"""Internal covariate shift, measured as Santurkar et al. define it: what lower layers' steps do to a gradient."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import ImageNetwork, ImageTraining, Job, Run, Tier
from batchnorm.lab.data import Dataset
from batchnorm.lab.fit import fit
from batchnorm.lab.gradients import cosine, difference, loss_and_gradients, norm, put_back, weights_of
from batchnorm.lab.measures import (
    at_best_rate,
    at_rate,
    final_validation_accuracy,
    find,
    measure_over_seeds,
    median_of,
    of_arm,
    ratio_over_seeds,
    said,
)
from batchnorm.lab.record import significant

LESS = 1.0
"""Shown: the shift without batch normalization is larger than with it by both measures, at own best rates."""
STEPS, EVERY = 300, 20
RATES = (0.03, 0.1, 0.3)
PLAIN, NORMALISED = "plain", "batch norm"
_NETWORKS = {PLAIN: ImageNetwork(kind="vgg", norm="none"), NORMALISED: ImageNetwork(kind="vgg", norm="batch")}

CARD = Card(
    name="covariate_shift",
    tier="full",
    title="Less internal covariate shift, if it is measured by gradients",
    claim="Batch normalization works because it reduces internal covariate shift: the change of the distribution of a "
    "layer's inputs as the layers below it learn.",
    source="Ioffe & Szegedy 2015, section 2; measured as disputed by Santurkar et al. 2018 (arXiv 1805.11604), "
    "definition 2.1, figure 2",
    paper_figure="No number in the first. In the second, batch normalization does not reduce it, and often raises it",
    setup=f"10000 images averaged down to 16x16, a VGG of six convolutions, batches of 64, {STEPS} steps, rates "
    f"{', '.join(f'{rate:g}' for rate in RATES)}. At every {EVERY}th step, for each layer: G is the gradient of its "
    f"weights on the batch, G' that after the layers below it have made their step. Shift: the norm of G - G' over the "
    f"norm of G, and one less the cosine between them; mean over the layers above the first, median over the steps.",
    caveat="What comes out depends on the measure and on the rate, which is why every rate is shown. The norm is "
    "relative to G, since batch normalization changes the scale of gradients; the paper shows it absolute.",
    threshold="Relative norm and cosine, each at the arm's own best rate: plain over batch norm more than 1 in both "
    "(lower ends of the intervals). Partly: in one of them.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each run."""
    training = ImageTraining(rows=10_000, side=16, batch_size=64, steps=STEPS, evaluations=(0, STEPS))
    return [
        Job(CARD.name, (Run(CARD.name, arm, seed, rate, network, training),))
        for arm, network in _NETWORKS.items()
        for seed in seeds
        for rate in RATES
    ]


def run(job: Job) -> list[dict[str, Any]]:
    """Train, and measure the shift. Values: "norm" and "angle" (one less the cosine), one number a look."""
    return fit(job, _Shift)


def measure(records: Sequence[Record]) -> list[Measure]:
    """Ratios at own best rates and at each rate; the shifts themselves."""
    own = {arm: _at_own(records, arm) for arm in (PLAIN, NORMALISED)}
    found = []
    for what, words in _WORDS.items():
        found.append(_ratio(f"{what}_own", f"{words}: plain over batch norm, own best rates", what, *own.values()))
        for rate in RATES:
            of = [at_rate(of_arm(records, arm), rate) for arm in own]
            found.append(_ratio(f"{what}_at_{rate:g}", f"{words}: plain over batch norm, rate {rate:g}", what, *of))
        for arm, of_own in own.items():
            label = f"{words}, {arm}, rate {of_own[0]['rate']:g}"
            values = [median_of(one, what) for one in of_own]
            found.append(measure_over_seeds(f"{what}_{arm.replace(' ', '_')}", label, "", values))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    length, angle = find(measures, "norm_own"), find(measures, "angle_own")
    rates = "; ".join(
        f"at rate {rate:g} {said(find(measures, f'norm_at_{rate:g}'))} and {said(find(measures, f'angle_at_{rate:g}'))}"
        for rate in RATES
    )
    reading = (
        f"At own best rates the shift without batch normalization is {said(length)} that with it by relative norm and "
        f"{said(angle)} by angle. At equal rates: {rates}."
    )
    holds = [one.low > LESS for one in (length, angle)]
    return Verdict("shown" if all(holds) else "partly" if any(holds) else "not shown", length, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Both shifts over steps, each arm at its own best rate, one line a seed."""
    from batchnorm.reporting.figures import BLUE, DASHES, ORANGE, legend, log_axis, panel

    figures: Figures = {}
    for what, words in _WORDS.items():
        drawing, axes = panel(words.capitalize(), "step", "")
        for (arm, colour), dashes in zip(((PLAIN, ORANGE), (NORMALISED, BLUE)), DASHES, strict=False):
            label: str | None = arm
            for record in _at_own(records, arm):
                values = record["values"][what]
                steps = [EVERY * k for k in range(len(values))]
                axes.plot(steps, values, color=colour, linestyle=dashes, label=label)
                label = None
        log_axis(axes.yaxis)
        legend(axes)
        ratio = find(measures, f"{what}_own")
        alt = f"{words.capitalize()} over steps, one line a seed; plain over batch norm is {ratio.mean:.2f} on average."
        figures[what] = (drawing, alt)
    return figures


_WORDS = {"norm": "shift as relative norm of G - G'", "angle": "shift as 1 - cosine of G and G'"}


class _Shift:
    """Measures the shift at every layer; see `fit.ImageProbe`."""

    def __init__(self, run: Run, data: Dataset) -> None:
        self._found: dict[str, list[float]] = {name: [] for name in _WORDS}

    def evaluated(self, network: nn.Module, step: int) -> None:
        """Nothing to see there."""

    def stepping(self, network: nn.Module, step: int, x: Tensor, y: Tensor, rate: float) -> None:
        """Lets the layers step from the input to the output, and takes each layer's gradient just before its own."""
        if step % EVERY:
            return
        with put_back(network):
            weights = weights_of(network)
            _, before = loss_and_gradients(network, x, y, weights)
            lengths, angles = [], []
            for layer, weight in enumerate(weights[1:], start=1):
                with torch.no_grad():
                    weights[layer - 1].sub_(rate * before[layer - 1])
                _, (after,) = loss_and_gradients(network, x, y, [weight])
                lengths.append(difference([before[layer]], [after]) / max(norm([before[layer]]), 1e-30))
                angles.append(1 - cosine([before[layer]], [after]))
        self._found["norm"].append(significant(statistics.fmean(lengths)))
        self._found["angle"].append(significant(statistics.fmean(angles)))

    def values(self) -> Mapping[str, Any]:
        """Both measures, one number a look."""
        return self._found


def _at_own(records: Sequence[Record], arm: str) -> list[Record]:
    return at_best_rate(of_arm(records, arm), final_validation_accuracy)


def _ratio(name: str, label: str, what: str, ours: Sequence[Record], theirs: Sequence[Record]) -> Measure:
    ratios = [median_of(one, what) / median_of(other, what) for one, other in zip(ours, theirs, strict=True)]
    return ratio_over_seeds(name, label, ratios)
