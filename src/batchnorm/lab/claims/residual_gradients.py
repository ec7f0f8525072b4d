"""Gradients over depth at initialisation: batch normalization with ReLU explodes, residual connections tame it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from batchnorm.lab.claim import Card, Figures, Measure, Record, Reported, Verdict
from batchnorm.lab.config import ImageNetwork, ImageTraining, Job, Run, Tier
from batchnorm.lab.fit import batches, data_of, image_shape
from batchnorm.lab.gradients import loss_and_gradients, norm, weights_of
from batchnorm.lab.measures import (
    find,
    key,
    of_arm,
    ratio_over_seeds,
    said,
)
from batchnorm.lab.networks import build
from batchnorm.lab.record import make_record, significant
from batchnorm.lab.train import one_thread

EXPLODES = 1.1
"""Shown: without shortcuts the gradient grows by at least this a layer towards the input, and ..."""
TAMED = 1.05
"""... with them by at most this."""
MEAN_FIELD = math.sqrt(math.pi / (math.pi - 1))
DEPTH, WIDTH, BATCH = 21, 16, 128
_NETWORKS = {
    "plain": ImageNetwork(kind="plain", norm="none", depth=DEPTH, width=WIDTH),
    "plain + BN": ImageNetwork(kind="plain", norm="batch", depth=DEPTH, width=WIDTH),
    "residual": ImageNetwork(kind="residual", norm="none", depth=DEPTH, width=WIDTH),
    "residual + BN": ImageNetwork(kind="residual", norm="batch", depth=DEPTH, width=WIDTH),
}

CARD = Card(
    name="residual_gradients",
    tier="full",
    title="Batch normalization with ReLU makes gradients explode with depth; shortcuts prevent it",
    claim="At initialisation the gradients of a deep network with batch normalization and ReLU grow exponentially "
    "towards the input; residual connections keep them level.",
    source="Yang et al. 2019 (arXiv 1902.08129); De & Smith 2020 (arXiv 2002.10444)",
    paper_figure=f"a factor of {MEAN_FIELD:.2f} a layer at infinite width and batch in the "
    "first; about 1 for residual blocks in the second",
    setup=f"No training: one batch of {BATCH} images averaged down to 16x16 through {DEPTH} 3x3 convolutions of "
    f"{WIDTH} channels, He's initial weights. For each convolution the norm of its weights' gradient; the factor a "
    "layer is the slope of a straight line through their logarithms, first and last layer left out.",
    caveat="Initialisation only: after a few steps gammas and weights have moved. Narrow convolutions, for which the "
    "factor differs from the one in the limit.",
    threshold=f"Factor a layer towards the input: at least {EXPLODES:g} for plain + BN, at most {TAMED:g} for "
    f"residual + BN (ends of the intervals). Partly: one of them.",
    reported=(Reported("factor_plain_bn", MEAN_FIELD, "mean-field theory, infinite width and batch"),),
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each network, all seeds."""
    training = ImageTraining(rows=2_000, side=16, batch_size=BATCH, steps=0, evaluations=(0,))
    return [
        Job(CARD.name, tuple(Run(CARD.name, arm, seed, 0.0, network, training) for seed in seeds))
        for arm, network in _NETWORKS.items()
    ]


def run(job: Job) -> list[dict[str, Any]]:
    """Take the gradients of one batch. Values: "norms", those of each convolution, from the input on."""
    with one_thread():
        return [_run(one, job.images) for one in job.runs]


def measure(records: Sequence[Record]) -> list[Measure]:
    """Factor of the gradient a layer, towards the input."""
    return [
        ratio_over_seeds(f"factor_{key(arm)}", f"gradient a layer towards the input, {arm}", _factors(records, arm))
        for arm in _NETWORKS
    ]


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    plain, bn, residual, both = (find(measures, f"factor_{key(arm)}") for arm in _NETWORKS)
    reading = (
        f"From layer to layer towards the input gradients are multiplied by {said(bn)} with batch normalization, "
        f"{said(both)} with shortcuts around every two layers as well, {said(plain)} without either and "
        f"{said(residual)} with shortcuts alone. Over {DEPTH} layers that is a factor of {bn.mean**DEPTH:.3g} with "
        f"batch normalization and {both.mean**DEPTH:.3g} with shortcuts as well."
    )
    holds = [bn.low >= EXPLODES, both.high <= TAMED]
    return Verdict("shown" if all(holds) else "partly" if any(holds) else "not shown", bn, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Gradient norms by layer, relative to the last convolution; mean of the seeds."""
    from batchnorm.reporting.figures import DASHES, PALETTE, legend, log_axis, panel

    drawing, axes = panel("Gradients at initialisation", "layer, from the input", "norm, last layer = 1")
    for arm, colour, dashes in zip(_NETWORKS, PALETTE, DASHES, strict=False):
        norms = np.array([record["values"]["norms"] for record in of_arm(records, arm)])
        relative = np.exp(np.log(norms / norms[:, -1:]).mean(axis=0))
        axes.plot(range(1, norms.shape[1] + 1), relative, color=colour, linestyle=dashes, label=arm)
    log_axis(axes.yaxis)
    legend(axes, columns=2)
    told = "; ".join(f"{arm} {find(measures, f'factor_{key(arm)}').mean:.2f}" for arm in _NETWORKS)
    return {"layers": (drawing, f"Norms of gradients by layer on a logarithmic axis. Factor a layer: {told}.")}


def _run(run: Run, images: str) -> dict[str, Any]:
    started = time.perf_counter()
    data, training = data_of(run, images), run.training
    assert isinstance(run.network, ImageNetwork)
    network = build(run.network, image_shape(data), data.classes, seed=run.seed)
    x, y = next(batches(data.train, size=training.batch_size, seed=run.seed))
    torch.manual_seed(run.seed)
    _, gradients = loss_and_gradients(network, x, y, weights_of(network)[:-1])
    norms = [significant(norm([gradient])) for gradient in gradients]
    seconds = time.perf_counter() - started
    return make_record(run, curves={"step": [0]}, values={"norms": norms}, seconds=seconds, data_sha256=data.sha256)


def _factors(records: Sequence[Record], arm: str) -> list[float]:
    factors = []
    for record in of_arm(records, arm):
        logarithms = np.log(np.maximum(np.array(record["values"]["norms"], dtype=float), 1e-300))[1:-1]
        slope = np.polyfit(np.arange(len(logarithms)), logarithms, 1)[0]
        factors.append(float(np.exp(-slope)))
    return factors
