"""Which mean and variance at inference: the batch's, a mean of batches, a moving average, or the population's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.lab.claim import Card, Figures, Measure, Record, Verdict
from batchnorm.lab.config import Job, Network, Run, Tier, Training, at_least, stacked
from batchnorm.lab.data import load
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
from batchnorm.lab.models import Stack
from batchnorm.lab.record import significant
from batchnorm.lab.train import train
from batchnorm.layers.batch_norm import BatchNorm
from batchnorm.reporting.numbers import number
from batchnorm.stats import Moments, Running, mean_of_batches, population

LAGS = 5.0
"""Shown: early in training, population statistics are at least this many points of accuracy ahead of the slow moving
average ..."""
CATCHES_UP = 1.0
"""... and late in training, less than this many points lie between them and the usual one."""
EARLY, LATE = 20, 640
STEPS = LATE
CHECKPOINTS = (10, EARLY, 40, 80, 160, 320, LATE)
RATES = (0.1, 0.3, 1.0)
BATCH = 60
AT_LEAST_SEEDS = 5

SLOW, USUAL = "momentum 0.01", "momentum 0.1"
_MOMENTA = {SLOW: 0.01, USUAL: 0.1}
_BATCH, _MEAN, _MOVING, _POPULATION, _TRUTH = "batch", "mean of batches", "moving average", "population", "truth"

CARD = Card(
    name="inference_statistics",
    title="At inference, population statistics are right at once; a moving average lags",
    claim="At inference the network should use statistics of the population, not of the batch. A moving average kept "
    "while training tracks them, but lags early, while the network changes fast.",
    source="Ioffe & Szegedy 2015, section 3.1 and Alg. 2; Wu & Johnson 2021 (arXiv 2105.07576), section 3",
    paper_figure="no number in the first; in the second, moving averages lag early in training and at large batches",
    setup=f"Digits (pixels from 0 to 1), three hidden layers of 100 ReLU units, He's initial weights, batches of "
    f"{BATCH}, {STEPS} steps, rates {', '.join(f'{rate:g}' for rate in RATES)}; the best one has the highest final "
    f"validation accuracy. At least {AT_LEAST_SEEDS} seeds. All estimates are of the same network at the same step, so "
    f"the rate is equal by design. Mean of batches (Alg. 2) and population come from the training rows in batches, "
    f"which pass the layers below with statistics of their own, as in training. The truth is another reading: all "
    f"training rows as one batch, so that each layer gets what exact statistics in the layers below it give. Distance: "
    f"2-Wasserstein between the two normal distributions, in the truth's standard deviations, mean over units and "
    f"layers.",
    caveat="Small dense layers and well-shuffled batches, with which the mean of batches is close to the population. "
    "Sorted or small batches would part them: the mean of batches leaves out the variance between batches. Three seeds "
    "had left the interval of the early gap reaching below 0; five are the least since. The threshold stayed.",
    threshold=f"At step {EARLY}, test accuracy with population statistics less that with the moving average of "
    f"momentum 0.01: at least {LAGS:g} points, and the moving average is farther from the truth (lower ends of the "
    f"intervals); at step {LATE}, population and moving average of momentum 0.1 are less than {CATCHES_UP:g} point "
    f"apart (mean). Partly: early, the moving average is farther from the truth.",
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """One job for each momentum: all seeds at all rates. The weights do not depend on the momentum."""
    return stacked(
        Run(
            CARD.name,
            arm,
            seed,
            rate,
            Network(
                depth=3,
                width=100,
                activation="relu",
                norm="batch",
                init="fan_in",
                init_scale=math.sqrt(2.0),
                momentum=momentum,
            ),
            Training(inputs="unit", batch_size=BATCH, steps=STEPS, evaluations=CHECKPOINTS),
        )
        for arm, momentum in _MOMENTA.items()
        for seed in at_least(seeds, AT_LEAST_SEEDS)
        for rate in RATES
    )


def run(job: Job) -> list[dict[str, Any]]:
    """Train the runs and estimate the statistics at each evaluation.

    Their values: "accuracy" on the test rows and "distance" to the truth, each estimate -> one number for each
    evaluation. ("batch": accuracy in test batches of 60, each with statistics of its own; distance of single training
    batches, mean over them.)
    """
    return train(job, _Estimates(job))


def measure(records: Sequence[Record]) -> list[Measure]:
    """Gaps in accuracy and ratios of distance, early and late; accuracy and distance of each estimate."""
    usual, slow = of_arm(records, USUAL), of_arm(records, SLOW)
    rate = best_rate(usual, final_validation_accuracy)
    chosen = {USUAL: at_rate(usual, rate), SLOW: at_rate(slow, rate)}
    found = []
    for when, step in (("early", EARLY), ("late", LATE)):
        for arm, key in ((SLOW, "slow"), (USUAL, "usual")):
            gap = [
                100 * (_at(one, "accuracy", _POPULATION, step) - _at(one, "accuracy", _MOVING, step))
                for one in chosen[arm]
            ]
            label = f"accuracy: population less moving average, {arm}, step {step}"
            found.append(measure_over_seeds(f"gap_{when}_{key}", label, "points", gap))
            ratio = [
                _at(one, "distance", _MOVING, step) / _at(one, "distance", _POPULATION, step) for one in chosen[arm]
            ]
            label = f"distance to the truth: moving average over population, {arm}, step {step}"
            found.append(ratio_over_seeds(f"distance_ratio_{when}_{key}", label, ratio))
    for what, unit, scale in (("accuracy", "%", 100.0), ("distance", "std", 1.0)):
        for when, step in (("early", EARLY), ("late", LATE)):
            for estimate, arm, words in _ESTIMATES:
                if estimate == _TRUTH and what == "distance":
                    continue
                values = [scale * _at(one, what, estimate, step) for one in chosen[arm]]
                name = f"{what}_{words.replace(' ', '_').replace(',', '')}_{when}"
                found.append(measure_over_seeds(name, f"{what}, {words}, step {step}, rate {rate:g}", unit, values))
    return found


_ESTIMATES = (
    (_BATCH, USUAL, _BATCH),
    (_MEAN, USUAL, _MEAN),
    (_MOVING, SLOW, f"{_MOVING}, {SLOW}"),
    (_MOVING, USUAL, f"{_MOVING}, {USUAL}"),
    (_POPULATION, USUAL, _POPULATION),
    (_TRUTH, USUAL, _TRUTH),
)


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    lag, usual, caught = (find(measures, name) for name in ("gap_early_slow", "gap_early_usual", "gap_late_usual"))
    ratio = find(measures, "distance_ratio_early_slow")
    late = {word: find(measures, f"{word}_late") for word in ("accuracy_batch", "accuracy_population")}
    far = {word: find(measures, f"distance_{word}_late").mean for word in ("batch", "mean_of_batches", "population")}
    reading = (
        f"After {EARLY} steps population statistics give {said(lag)} more test accuracy than a moving average with "
        f"momentum 0.01, and {said(usual)} more than one with 0.1; the moving average (0.01) is {said(ratio)} as far "
        f"from the truth as they are. After {LATE} steps population and moving average (0.1) are {said(caught)} apart. "
        f"Distances to the truth then: "
        f"one batch {number(far['batch'])}, mean of batches {number(far['mean_of_batches'])}, population "
        f"{number(far['population'])} standard deviations. Each test batch with statistics of its own gives "
        f"{late['accuracy_batch'].mean:.1f} %, population statistics {late['accuracy_population'].mean:.1f} %."
    )
    if lag.low >= LAGS and ratio.low > 1 and abs(caught.mean) < CATCHES_UP:
        return Verdict("shown", lag, reading)
    return Verdict("partly" if ratio.low > 1 else "not shown", lag, reading)


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Test accuracy and distance to the truth over steps, for each estimate; means of the seeds."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREEN, GREY, ORANGE, PURPLE, legend, log_axis, panel

    rate = best_rate(of_arm(records, USUAL), final_validation_accuracy)
    looks = tuple(zip((BLUE, GREEN, ORANGE, PURPLE, GREY), DASHES, strict=False))
    order = (_POPULATION, _MEAN, f"{_MOVING}, {SLOW}", f"{_MOVING}, {USUAL}", _BATCH)
    figures: Figures = {}
    for what, title, axis in (
        ("accuracy", "Accuracy with each estimate", "test accuracy (%)"),
        ("distance", "Distance to the truth", "standard deviations"),
    ):
        drawing, axes = panel(title, "step", axis, height=1.15)
        told = []
        for words, (colour, dashes) in zip(order, looks, strict=True):
            estimate, arm, _ = next(one for one in _ESTIMATES if one[2] == words)
            of = at_rate(of_arm(records, arm), rate)
            values = np.array([one["values"][what][estimate] for one in of], dtype=float).mean(axis=0)
            values = 100 * values if what == "accuracy" else values
            steps = of[0]["curves"]["step"]
            axes.plot(steps, values, color=colour, linestyle=dashes, label=words.replace("momentum ", ""))
            told.append(f"{words} {values[0]:.3g} to {values[-1]:.3g}")
        log_axis(axes.xaxis)
        if what == "distance":
            log_axis(axes.yaxis)
        legend(axes, columns=2)
        alt = f"{title} over steps on a logarithmic axis, mean of the seeds, first to last: {'; '.join(told)}."
        figures[what] = (drawing, alt)
    return figures


class _Estimates:
    """Estimates the statistics of every layer in several ways at each evaluation; see `train.Probe`."""

    def __init__(self, job: Job) -> None:
        training = job.runs[0].training
        data = load(training.data, training.inputs)
        shuffled = np.random.default_rng(0).permutation(len(data.train.y))
        self._rows = torch.from_numpy(data.train.x[shuffled])[None]
        self._test = torch.from_numpy(data.test.x)[None]
        self._labels = torch.from_numpy(data.test.y)
        self._size = training.batch_size
        self._found: list[dict[str, dict[str, list[float]]]] = [{"accuracy": {}, "distance": {}} for _ in job.runs]

    def __call__(self, stack: Stack, step: int) -> None:
        """Estimate, and note accuracies and distances."""
        batches = [stack.trace(rows, "batch").moments for rows in torch.split(self._rows, self._size, dim=1)]
        layers: list[tuple[Moments, ...]] = list(zip(*batches, strict=True))
        full = [layer[: self._rows.shape[1] // self._size] for layer in layers]
        truth = [_unbiased(moments) for moments in stack.trace(self._rows, "batch").moments]
        estimates = {
            _MEAN: [mean_of_batches(layer) for layer in full],
            _MOVING: [_running(norm) for norm in stack.norms],
            _POPULATION: [population(layer) for layer in layers],
            _TRUTH: truth,
        }
        for name, estimate in estimates.items():
            logits = stack.trace(self._test, estimate).logits
            self._note("accuracy", name, self._accuracy(logits))
            self._note("distance", name, distance(estimate, truth))
        logits = torch.cat(
            [stack.trace(rows, "batch").logits for rows in torch.split(self._test, self._size, dim=1)], dim=1
        )
        self._note("accuracy", _BATCH, self._accuracy(logits))
        single = [distance([_unbiased(one) for one in batch], truth) for batch in zip(*full, strict=True)]
        self._note("distance", _BATCH, torch.stack(single).mean(dim=0))

    def values(self) -> Sequence[Mapping[str, Any]]:
        """Accuracies and distances of each run."""
        return self._found

    def _accuracy(self, logits: Tensor) -> Tensor:
        return (logits.argmax(dim=-1) == self._labels).double().mean(dim=1)

    def _note(self, what: str, estimate: str, values: Tensor) -> None:
        for found, value in zip(self._found, values.tolist(), strict=True):
            found[what].setdefault(estimate, []).append(significant(value))


def distance(estimate: Sequence[Running], truth: Sequence[Running], eps: float = 1e-5) -> Tensor:
    """How far estimated statistics are from the true ones, for each network of a stack.

    sqrt((mean - mean*)^2 + (std - std*)^2) / std*: the 2-Wasserstein distance between the two normal distributions in
    units of the true standard deviation, the error that the layer's output gets from its statistics (root mean square,
    for normal inputs, to first order in the error).

    Args:
        estimate: Of each layer, (K, units) each.
        truth: Likewise.
        eps: As in the layer: added to the variances, since this is what the layer divides by.

    Returns:
        (K,), float64: mean over the units, then over the layers.
    """
    layers = []
    for ours, true in zip(estimate, truth, strict=True):
        std, true_std = (torch.sqrt(one.var.double() + eps) for one in (ours, true))
        layers.append((torch.hypot(ours.mean.double() - true.mean.double(), std - true_std) / true_std).mean(dim=1))
    return torch.stack(layers).mean(dim=0)


def _unbiased(moments: Moments) -> Running:
    return Running(moments.mean, moments.unbiased_var)


def _running(norm: torch.nn.Module) -> Running:
    assert isinstance(norm, BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return Running(norm.running_mean, norm.running_var)


def _at(record: Record, what: str, estimate: str, step: int) -> float:
    return float(record["values"][what][estimate][record["curves"]["step"].index(step)])
