"""Your network: gradients over depth at initialisation, with and without its batch normalization."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.claims.own_rates import ARMS, OWN, WITHOUT
from batchnorm.lab.config import ImageTraining, Job, OwnNetwork, Run, Tier
from batchnorm.lab.fit import batches, data_of, network_of
from batchnorm.lab.gradients import loss_and_gradients, norm, weights_of
from batchnorm.lab.measures import (
    find,
    key,
    of_arm,
    ratio_over_seeds,
    said,
)
from batchnorm.lab.record import make_record, significant
from batchnorm.lab.train import one_thread

LEVEL = 10.0
"""Shown: no layer's relative gradient is more than so many times the median one, or less than one part in it."""
BATCH = 64

CARD = Card(
    name="own_gradients",
    tier="network",
    title="Your network's gradients are level over its layers",
    claim="At initialisation the gradients of your network neither vanish nor explode with depth.",
    source="Ioffe & Szegedy 2015, section 3.3; Yang et al. 2019 (arXiv 1902.08129)",
    paper_figure="",
    setup=f"No training: one batch of {BATCH} images. For each convolution and linear map the norm of the weights' "
    "gradient over the norm of the weights, from the input to the output.",
    caveat="Initialisation only. Relative to the weights, since batch normalization makes their scale irrelevant.",
    threshold=f"Largest over smallest relative gradient of a layer, with batch normalization: at most {LEVEL:g} "
    f"squared (upper end of the interval). Partly: less than without batch normalization.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each arm, all seeds."""
    training = ImageTraining(batch_size=BATCH, steps=0, evaluations=(0,))
    return [
        Job(CARD.name, tuple(Run(CARD.name, arm, seed, 0.0, OwnNetwork(norm=kind), training) for seed in seeds))
        for arm, kind in ARMS.items()
    ]


def run(job: Job) -> list[dict[str, Any]]:
    """Take the gradients of one batch. Values: "norms", relative, those of each layer from the input on."""
    with one_thread():
        return [_run(one, job.images) for one in job.runs]


def measure(records: Sequence[Record]) -> list[Measure]:
    """Largest over smallest relative gradient, by arm; first over last layer."""
    found = []
    for arm in ARMS:
        norms = [np.maximum(np.array(record["values"]["norms"], float), 1e-30) for record in of_arm(records, arm)]
        label = f"largest over smallest relative gradient of a layer, {arm}"
        found.append(ratio_over_seeds(f"spread_{key(arm)}", label, [float(one.max() / one.min()) for one in norms]))
        label = f"relative gradient, first layer over last, {arm}"
        found.append(ratio_over_seeds(f"first_{key(arm)}", label, [float(one[0] / one[-1]) for one in norms]))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    own, without = find(measures, f"spread_{key(OWN)}"), find(measures, f"spread_{key(WITHOUT)}")
    first = find(measures, f"first_{key(OWN)}")
    reading = (
        f"The largest relative gradient of a layer is {said(own)} the smallest one with batch normalization, "
        f"{said(without)} without. The first layer's is {said(first)} the last one's."
    )
    if own.high <= LEVEL**2:
        return Verdict("shown", own, reading)
    return Verdict("partly" if own.mean < without.mean else "not shown", own, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Relative gradients by layer, geometric mean of the seeds."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREEN, ORANGE, legend, log_axis, panel

    drawing, axes = panel("Gradients at initialisation", "layer, from the input", "gradient / weights")
    for arm, colour, dashes in zip(ARMS, (BLUE, ORANGE, GREEN), DASHES, strict=False):
        norms = np.maximum(np.array([record["values"]["norms"] for record in of_arm(records, arm)], float), 1e-30)
        mean = np.exp(np.log(norms).mean(axis=0))
        axes.plot(range(1, len(mean) + 1), mean, color=colour, linestyle=dashes, label=arm)
    log_axis(axes.yaxis)
    legend(axes)
    told = "; ".join(f"{arm} {find(measures, f'spread_{key(arm)}').mean:.3g}" for arm in ARMS)
    alt = f"Gradients relative to weights by layer on a logarithmic axis. Largest over smallest: {told}."
    return {"layers": (drawing, alt)}


def _run(run: Run, images: str) -> dict[str, Any]:
    started = time.perf_counter()
    data = data_of(run, images)
    network = network_of(run, data)
    x, y = next(batches(data.train, size=run.training.batch_size, seed=run.seed))
    weights = weights_of(network)
    _, gradients = loss_and_gradients(network, x, y, weights)
    norms = [norm([g]) / max(norm([w]), 1e-30) for g, w in zip(gradients, weights, strict=True)]
    return make_record(
        run,
        curves={"step": [0]},
        values={"norms": [significant(one) for one in norms]},
        seconds=time.perf_counter() - started,
        data_sha256=data.sha256,
    )
