"""The loss along each network's own step is smoother with batch normalization (Santurkar et al. 2018)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import ImageNetwork, ImageTraining, Job, Run, Tier, even_steps
from batchnorm.lab.data import Dataset
from batchnorm.lab.fit import fit
from batchnorm.lab.gradients import difference, loss_and_gradients, norm, put_back
from batchnorm.lab.measures import (
    at_best_rate,
    at_rate,
    final_validation_accuracy,
    find,
    key,
    median_of,
    of_arm,
    ratio_over_seeds,
    said,
)
from batchnorm.lab.record import significant

SMOOTHER = 1.5
"""Shown: the gradient is at least so many times as predictable along the step, and the loss varies less."""
STEPS, EVERY = 300, 10
REACHES = (0.5, 1.0, 2.0, 3.0, 4.0)
"""Lengths of the steps that are looked along, in learning rates."""
RATES = (0.03, 0.1, 0.3)
PLAIN, NORMALISED, NOISY = "plain", "batch norm", "noisy batch norm"
LINEAR, LINEAR_BN = "deep linear", "deep linear + batch norm"
_NETWORKS = {
    PLAIN: ImageNetwork(kind="vgg", norm="none"),
    NORMALISED: ImageNetwork(kind="vgg", norm="batch"),
    NOISY: ImageNetwork(kind="vgg", norm="noisy"),
    LINEAR: ImageNetwork(kind="dense", norm="none", activation="identity", depth=10, width=64),
    LINEAR_BN: ImageNetwork(kind="dense", norm="batch", activation="identity", depth=10, width=64),
}
MEASURED = {
    "band": "range of the loss along the step",
    "predictiveness": "change of the gradient along the step",
    "beta": "effective beta-smoothness",
}

CARD = Card(
    name="landscape",
    tier="full",
    title="Along its own steps the loss is smoother with batch normalization",
    claim="Batch normalization makes the optimisation landscape smoother: along a step the loss varies less and the "
    "gradient stays more predictive; with noise after it that shifts the distributions, too.",
    source="Santurkar et al. 2018 (arXiv 1805.11604), section 3.1, figure 4",
    paper_figure="curves only; with it the range of the loss and the change of the gradient are several times smaller",
    setup=f"10000 images averaged down to 16x16, a VGG of six convolutions and a deep linear network of ten layers, "
    f"batches of 64, {STEPS} steps, rates {', '.join(f'{rate:g}' for rate in RATES)}; each arm at its own best rate by "
    f"final validation accuracy, and all at the plain network's. At every {EVERY}th step the loss and the gradient of "
    f"that batch are measured {REACHES[0]:g} to {REACHES[-1]:g} learning rates along the negative gradient. Range: "
    f"largest less smallest loss. Change: largest norm of gradient there less gradient here, over the norm here. Beta: "
    f"largest of that norm over the distance. Each is the median over the steps.",
    caveat="Along each network's own step at its own rate, as in the paper: two networks with other rates are looked "
    "at on other scales. The change of the gradient is given relative to the gradient, so that a mere difference in "
    "scale does not count; the paper shows the absolute one.",
    threshold=f"Change of the gradient, plain over batch norm, each at its own best rate: at least {SMOOTHER:g}, and "
    f"range of the loss, plain over batch norm: more than 1 (lower ends of the intervals). Partly: one of them is more "
    f"than 1.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """A job for each run."""
    training = ImageTraining(
        rows=10_000, side=16, batch_size=64, steps=STEPS, evaluations=even_steps(STEPS, STEPS // 3)
    )
    return [
        Job(CARD.name, (Run(CARD.name, arm, seed, rate, network, training),))
        for arm, network in _NETWORKS.items()
        for seed in seeds
        for rate in RATES
    ]


def run(job: Job) -> list[dict[str, Any]]:
    """Train, and look along the step. Values: "band", "predictiveness", "beta", one number a look."""
    return fit(job, Along)


def measure(records: Sequence[Record]) -> list[Measure]:
    """Ratios of plain over batch norm for all three, at own best and at equal rates; noisy and deep linear likewise."""
    own = {arm: _at_own(records, arm) for arm in _NETWORKS}
    equal = own[PLAIN][0]["rate"]
    found = []
    for what, words in MEASURED.items():
        pairs = (
            (f"{what}_own", PLAIN, own[PLAIN], NORMALISED, own[NORMALISED], "own best rates"),
            (
                f"{what}_equal",
                PLAIN,
                own[PLAIN],
                NORMALISED,
                at_rate(of_arm(records, NORMALISED), equal),
                f"equal rate {equal:g}",
            ),
            (f"{what}_noisy", PLAIN, own[PLAIN], NOISY, own[NOISY], "own best rates"),
            (f"{what}_linear", LINEAR, own[LINEAR], LINEAR_BN, own[LINEAR_BN], "own best rates"),
        )
        for name, first, ours, second, theirs, how in pairs:
            ratios = [median_of(one, what) / median_of(other, what) for one, other in zip(ours, theirs, strict=True)]
            found.append(ratio_over_seeds(name, f"{words}: {first} over {second}, {how}", ratios))
    for arm, of in own.items():
        for what, words in MEASURED.items():
            values = [median_of(one, what) for one in of]
            label = f"{words}, {arm}, rate {of[0]['rate']:g}"
            found.append(ratio_over_seeds(f"{what}_of_{key(arm)}", label, values))
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    gradient, band, beta = (find(measures, f"{what}_own") for what in ("predictiveness", "band", "beta"))
    equal, noisy, linear = (find(measures, f"predictiveness_{how}") for how in ("equal", "noisy", "linear"))
    reading = (
        f"Along its own step the gradient of the plain network changes {said(gradient)} as much as with batch "
        f"normalization, its loss varies {said(band)} as much, and beta is {said(beta)} as large. At equal rate the "
        f"change of the gradient is {said(equal)}; against noisy batch normalization {said(noisy)}; in a deep linear "
        f"network {said(linear)}."
    )
    if gradient.low >= SMOOTHER and band.low > 1:
        return Verdict("shown", gradient, reading)
    return Verdict("partly" if gradient.low > 1 or band.low > 1 else "not shown", gradient, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """The three measures over steps, VGG arms at their own best rates; one line a seed."""
    from batchnorm.reporting.figures import BLUE, DASHES, ORANGE, PURPLE, legend, log_axis, panel

    figures: Figures = {}
    looks = ((PLAIN, ORANGE), (NORMALISED, BLUE), (NOISY, PURPLE))
    for what, words in MEASURED.items():
        drawing, axes = panel(words.capitalize(), "step", "relative" if what == "predictiveness" else "")
        told = []
        for (arm, colour), dashes in zip(looks, DASHES, strict=False):
            label: str | None = arm
            of = _at_own(records, arm)
            for record in of:
                values = record["values"][what]
                steps = [EVERY * k for k in range(len(values))]
                axes.plot(steps, values, color=colour, linestyle=dashes, label=label, alpha=0.8)
                label = None
            told.append(f"{arm} {statistics.fmean(median_of(one, what) for one in of):.3g}")
        log_axis(axes.yaxis)
        legend(axes)
        alt = f"{words.capitalize()} over steps on a logarithmic axis, one line a seed; medians: {'; '.join(told)}."
        figures[what] = (drawing, alt)
    return figures


class Along:
    """Looks along the negative gradient; see `fit.ImageProbe`."""

    def __init__(self, run: Run, data: Dataset) -> None:
        self._found: dict[str, list[float]] = {name: [] for name in MEASURED}

    def evaluated(self, network: nn.Module, step: int) -> None:
        """Nothing to see there."""

    def stepping(self, network: nn.Module, step: int, x: Tensor, y: Tensor, rate: float) -> None:
        """At every tenth step, loss and gradient at several distances."""
        if step % EVERY:
            return
        with put_back(network):
            parameters = list(network.parameters())
            start = [parameter.detach().clone() for parameter in parameters]
            here, gradients = loss_and_gradients(network, x, y)
            length = norm(gradients)
            losses, changes, betas = [here], [], []
            for reach in REACHES:
                with torch.no_grad():
                    for parameter, value, gradient in zip(parameters, start, gradients, strict=True):
                        parameter.copy_(value - reach * rate * gradient)
                loss, there = loss_and_gradients(network, x, y)
                change = difference(there, gradients)
                losses.append(loss)
                changes.append(change / max(length, 1e-30))
                betas.append(change / max(reach * rate * length, 1e-30))
        seen = max(losses) - min(losses), max(changes), max(betas)
        for name, number in zip(MEASURED, seen, strict=True):
            self._found[name].append(significant(number))

    def values(self) -> Mapping[str, Any]:
        """The three measures, one number a look."""
        return self._found


def _at_own(records: Sequence[Record], arm: str) -> list[Record]:
    return at_best_rate(of_arm(records, arm), final_validation_accuracy)
