"""Your network: how predictable its gradient is along its own step, with and without its batch normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.claims.landscape import EVERY, MEASURED, REACHES, Along
from batchnorm.lab.claims.own_rates import ARMS, OWN, WITHOUT
from batchnorm.lab.config import ImageTraining, Job, OwnNetwork, Run, Tier
from batchnorm.lab.fit import fit
from batchnorm.lab.measures import (
    at_best_rate,
    final_validation_accuracy,
    find,
    key,
    median_of,
    of_arm,
    ratio_over_seeds,
    said,
)

STEPS, BATCH = 100, 64
RATES = (0.03, 0.1, 0.3)

CARD = Card(
    name="own_landscape",
    tier="network",
    title="Along its own steps your network is smoother with its batch normalization",
    claim="Along a step of your network the gradient stays more predictive with its batch normalization than without.",
    source="Santurkar et al. 2018 (arXiv 1805.11604), section 3.1",
    paper_figure="",
    setup=f"{STEPS} steps of plain SGD, batches of {BATCH}, rates {', '.join(f'{rate:g}' for rate in RATES)}; own best "
    f"rates have the highest final validation accuracy. At every {EVERY}th step loss and gradient of the batch are "
    f"measured {REACHES[0]:g} to {REACHES[-1]:g} learning rates along the negative gradient; medians over the steps.",
    caveat="Each arm along its own step at its own rate. Dropout is drawn anew for each look.",
    threshold="Change of the gradient relative to it, without over with, own best rates: more than 1 (lower end of the "
    "interval). Partly: the mean is.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each run."""
    training = ImageTraining(batch_size=BATCH, steps=STEPS, evaluations=(0, STEPS))
    return [
        Job(CARD.name, (Run(CARD.name, arm, seed, rate, OwnNetwork(norm=kind), training),))
        for arm, kind in ARMS.items()
        for seed in seeds
        for rate in RATES
    ]


def run(job: Job) -> list[dict[str, Any]]:
    """Train, and look along the step; values as in `landscape`."""
    return fit(job, Along)


def measure(records: Sequence[Record]) -> list[Measure]:
    """Each arm over batch normalization, and the medians."""
    own = {arm: at_best_rate(of_arm(records, arm), final_validation_accuracy) for arm in ARMS}
    found = []
    for what, words in MEASURED.items():
        for arm in ARMS:
            if arm != OWN:
                ratios = [
                    median_of(one, what) / median_of(other, what) for one, other in zip(own[arm], own[OWN], strict=True)
                ]
                label = f"{words}: {arm} over {OWN}, own best rates"
                found.append(ratio_over_seeds(f"{what}_{key(arm)}", label, ratios))
    for what, words in MEASURED.items():
        for arm, of in own.items():
            label = f"{words}, {arm}, rate {of[0]['rate']:g}"
            found.append(ratio_over_seeds(f"{what}_of_{key(arm)}", label, [median_of(one, what) for one in of]))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    gradient, band, beta = (find(measures, f"{what}_{WITHOUT}") for what in ("predictiveness", "band", "beta"))
    reading = (
        f"Along its own step the gradient changes {said(gradient)} as much without batch normalization as with it; the "
        f"loss varies {said(band)} as much, and beta is {said(beta)} as large."
    )
    return Verdict("shown" if gradient.low > 1 else "partly" if gradient.mean > 1 else "not shown", gradient, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """The change of the gradient over steps, each arm at its own best rate, one line a seed."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREEN, ORANGE, legend, log_axis, panel

    drawing, axes = panel("Change of the gradient along the step", "step", "relative")
    for arm, colour, dashes in zip(ARMS, (BLUE, ORANGE, GREEN), DASHES, strict=False):
        label: str | None = arm
        for record in at_best_rate(of_arm(records, arm), final_validation_accuracy):
            values = record["values"]["predictiveness"]
            axes.plot([EVERY * k for k in range(len(values))], values, color=colour, linestyle=dashes, label=label)
            label = None
    log_axis(axes.yaxis)
    legend(axes)
    told = "; ".join(f"{arm} {find(measures, f'predictiveness_of_{key(arm)}').mean:.3g}" for arm in ARMS)
    return {"gradient": (drawing, f"Change of the gradient over steps on a logarithmic axis; medians: {told}.")}
