"""Gradients vanish with depth in sigmoid networks, and do not with batch normalization."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from batchnorm.lab.claim import Card, Figures, Measure, Record, Reported, Verdict
from batchnorm.lab.config import Job, Network, Run, Tier, Training
from batchnorm.lab.data import load
from batchnorm.lab.measures import (
    at_best_rate,
    at_rate,
    final_validation_accuracy,
    find,
    last,
    measure_over_seeds,
    of_arm,
    ratio_over_seeds,
)
from batchnorm.lab.models import Stack
from batchnorm.lab.record import make_record, significant
from batchnorm.lab.train import train
from batchnorm.reporting.numbers import number

VANISHES = 0.3
"""Shown: the plain sigmoid network keeps at most this part of the gradient a layer: 0.25 from the sigmoid's slope, and
room for the weights, whose factor is 1 on average but not in each draw; ..."""
SURVIVES = 0.8
"""... and with batch normalization at least this part is kept."""
EXPLODES = 1.1
"""The counter-finding stands if batch normalization with ReLU multiplies the gradient by at least this a layer."""
MEAN_FIELD = math.sqrt(math.pi / (math.pi - 1))
"""What mean-field theory gives for batch normalization with ReLU at infinite width and batch (Yang et al. 2019)."""
AT_LEAST_SEEDS = 5

DEPTH, WIDTH, BATCH = 20, 100, 200
ARMS: dict[str, Network] = {
    "sigmoid": Network(DEPTH, WIDTH, "sigmoid", init="fan_in", init_scale=1.0),
    "sigmoid + BN": Network(DEPTH, WIDTH, "sigmoid", norm="batch", init="fan_in", init_scale=1.0),
    "ReLU": Network(DEPTH, WIDTH, "relu", init="fan_in", init_scale=math.sqrt(2.0)),
    "Maxout": Network(DEPTH, WIDTH, "maxout", init="fan_in", init_scale=1.0),
    "ReLU + BN": Network(DEPTH, WIDTH, "relu", norm="batch", init="fan_in", init_scale=math.sqrt(2.0)),
}

# The norm's weights start at 1 and its biases at 0 in all arms with batch normalization.
TRAINED_DEPTH, TRAINED_WIDTH, STEPS = 10, 64, 200
RATES = (0.1, 1.0, 10.0)
TRAINED = ("sigmoid", "sigmoid + BN")


CARD = Card(
    name="vanishing_gradients",
    title="Gradients vanish with depth in sigmoid networks, and do not with batch normalization",
    claim="Through each sigmoid layer the gradient shrinks to a quarter or less, so that deep sigmoid networks do not "
    "train; batch normalization keeps its size, as other activations do.",
    source="Ioffe & Szegedy 2015, sections 1 and 3.3; courses on deep learning; the counter-finding: Yang et al. 2019, "
    "A Mean Field Theory of Batch Normalization",
    paper_figure="at most 0.25 a layer from the slope of the sigmoid; for batch normalization with ReLU, mean-field "
    f"theory gives {MEAN_FIELD:.2f} a layer",
    setup=f"Dense networks of {DEPTH} hidden layers of {WIDTH} units on standardised digits: the gradient of one batch "
    f"of {BATCH} at the initial weights (variance 1/inputs; 2/inputs with ReLU), at least {AT_LEAST_SEEDS} seeds. The "
    "factor a layer is the geometric mean of the ratios of gradient norms (Euclidean, of the weights) between a hidden "
    f"layer and the one above it. Then sigmoid networks of {TRAINED_DEPTH} layers of {TRAINED_WIDTH} units train for "
    f"{STEPS} steps of 60 at rates {', '.join(f'{rate:g}' for rate in RATES)}; the best rate is chosen on the "
    "validation rows.",
    caveat="Gradient norms at the initial weights, not along the training. Batch normalization does not fix the norm "
    "at 1 a layer: with ReLU it makes gradients explode with depth.",
    threshold=f"The plain sigmoid network keeps at most {VANISHES:g} of the gradient a layer (0.25, and room for the "
    f"draw of the weights) and the one with batch normalization at least {SURVIVES:g} (ends of the intervals). Partly: "
    "one of the two.",
    reported=(
        Reported("factor_sigmoid", 0.25, "the most that the sigmoid's slope allows"),
        Reported("factor_relu_bn", MEAN_FIELD, "mean-field theory, infinite width and batch"),
    ),
)


def jobs(seeds: Sequence[int], tier: Tier) -> list[Job]:
    """The deep sigmoid networks that are trained, longest first; then one look at each arm's first gradient."""
    trained = Training(inputs="standardised", steps=STEPS, evaluations=tuple(range(0, STEPS + 1, 25)))
    at_start = Training(inputs="standardised", batch_size=BATCH, steps=0, evaluations=(0,))
    several = tuple(sorted({*seeds, *range(AT_LEAST_SEEDS)})) if len(seeds) < AT_LEAST_SEEDS else tuple(seeds)
    found = []
    for arm in TRAINED:
        network = replace(ARMS[arm], depth=TRAINED_DEPTH, width=TRAINED_WIDTH)
        runs = tuple(
            Run(CARD.name, f"{arm}, trained", seed, rate, network, trained) for seed in seeds for rate in RATES
        )
        found.append(Job(CARD.name, runs))
    for arm, network in ARMS.items():
        found.append(Job(CARD.name, tuple(Run(CARD.name, arm, seed, 0.0, network, at_start) for seed in several)))
    return found


def run(job: Job) -> list[dict[str, Any]]:
    """Train the deep networks; for the others, take the gradient of one batch at the initial weights.

    The values of the latter: "gradient_norms", the Euclidean norm of the gradient of each hidden layer's weights, from
    the input on.
    """
    return train(job) if job.runs[0].training.steps else _first_gradients(job)


def _first_gradients(job: Job) -> list[dict[str, Any]]:
    started = time.perf_counter()
    training = job.runs[0].training
    data = load(training.data, training.inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stack = Stack(
            [run.network for run in job.runs if isinstance(run.network, Network)],
            [run.seed for run in job.runs],
            inputs=data.train.x.shape[1],
            classes=data.classes,
        )
        rows = [
            np.random.default_rng(run.seed).permutation(len(data.train.y))[: training.batch_size] for run in job.runs
        ]
        x = torch.from_numpy(np.stack([data.train.x[row] for row in rows]))
        y = torch.from_numpy(np.stack([data.train.y[row] for row in rows]))
        torch.autograd.backward(stack.losses(stack(x), y).sum())
    finally:
        torch.set_num_threads(threads)
    hidden = list(stack.weights)[:-1]
    norms = [torch.linalg.vector_norm(weight.grad.double(), dim=(1, 2)) for weight in hidden if weight.grad is not None]
    by_run = torch.stack(norms, dim=1).tolist()
    seconds = (time.perf_counter() - started) / len(job.runs)
    return [
        make_record(
            run,
            curves={"step": [0]},
            values={"gradient_norms": [significant(norm) for norm in by_run[k]]},
            seconds=seconds,
            data_sha256=data.sha256,
        )
        for k, run in enumerate(job.runs)
    ]


def factor(norms: Sequence[float]) -> float:
    """What the gradient norm is multiplied by from a hidden layer to the one below it, as a geometric mean.

    The first layer is left out: it alone has another number of inputs.

    >>> factor([7.0, 1.0, 2.0, 4.0])
    0.5
    """
    return float((norms[1] / norms[-1]) ** (1.0 / (len(norms) - 2)))


def measure(records: Sequence[Record]) -> list[Measure]:
    """Factors a layer at the initial weights; test accuracy of the trained networks at best and at equal rates."""
    found = []
    for arm in ARMS:
        factors = [factor(one["values"]["gradient_norms"]) for one in at_rate(of_arm(records, arm), 0.0)]
        label = f"gradient norm, factor a layer towards the input, {arm}"
        found.append(ratio_over_seeds(_key("factor", arm), label, factors))
    for arm in TRAINED:
        trained = of_arm(records, f"{arm}, trained")
        label = f"test accuracy, {TRAINED_DEPTH} layers, {arm}"
        runs = at_best_rate(trained, final_validation_accuracy)
        found.append(_accuracy(_key("accuracy", arm), f"{label}, own best rate {runs[0]['rate']:g}", runs))
        found += [
            _accuracy(_key("accuracy", f"{arm} at {rate:g}"), f"{label}, rate {rate:g}", at_rate(trained, rate))
            for rate in RATES
        ]
    return found


def judge(measures: Sequence[Measure]) -> Verdict:
    """The verdict by the thresholds that the card states."""
    plain, normalised, explosion = (find(measures, _key("factor", arm)) for arm in (*TRAINED, "ReLU + BN"))
    mean = {one.name: number(one.mean) for one in measures}
    passed = (plain.high <= VANISHES) + (normalised.low >= SURVIVES)
    layers = DEPTH - 2
    reading = (
        f"Towards the input, each layer of the plain sigmoid network multiplies the gradient norm by "
        f"{number(plain.mean)}: over {layers} layers {number(plain.mean**layers)} is left. With batch normalization "
        f"the factor is {number(normalised.mean)}. ReLU ({mean[_key('factor', 'ReLU')]}) and Maxout "
        f"({mean[_key('factor', 'Maxout')]}) keep the gradient without it. Trained with {TRAINED_DEPTH} layers, each "
        f"at its own best rate, the plain sigmoid network reaches {mean[_key('accuracy', TRAINED[0])]} % test accuracy "
        f"(chance is 10 %), the one with batch normalization {mean[_key('accuracy', TRAINED[1])]} %. The "
        f"counter-finding {'stands' if explosion.low >= EXPLODES else 'does not show'}: with ReLU, batch normalization "
        f"multiplies the gradient by {number(explosion.mean)} a layer (theory: {MEAN_FIELD:.2f}), "
        f"{number(explosion.mean**layers)} times over {layers} layers."
    )
    return Verdict(_VERDICTS[passed], plain, reading)


_VERDICTS: tuple[Literal["not shown"], Literal["partly"], Literal["shown"]] = ("not shown", "partly", "shown")


def figure(records: Sequence[Record], measures: Sequence[Measure]) -> Figures:
    """Gradient norms over depth, and the accuracy of the trained networks over steps."""
    from batchnorm.reporting.figures import BLUE, DASHES, GREY, ORANGE, PURPLE, RED, legend, log_axis, panel

    means = {one.name: one.mean for one in measures}
    colours = dict(zip(ARMS, (ORANGE, BLUE, GREY, PURPLE, RED), strict=True))
    norms, axes = panel(
        "Gradient norm by layer, before training", "hidden layer, 1 is next to the input", "gradient norm"
    )
    for (arm, colour), dashes in zip(colours.items(), DASHES, strict=False):
        each = np.log([one["values"]["gradient_norms"] for one in records if one["arm"] == arm])
        axes.plot(range(1, DEPTH + 1), np.exp(each.mean(axis=0)), color=colour, linestyle=dashes, label=arm)
    log_axis(axes.yaxis)
    axes.set_xticks([1, 5, 10, 15, 20])
    legend(axes, columns=3)
    factors = ", ".join(f"{arm} {number(means[_key('factor', arm)])}" for arm in ARMS)
    alt = f"Gradient norms of {DEPTH} hidden layers on a logarithmic axis. Factor a layer towards the input: {factors}."

    training, axes = panel(f"{TRAINED_DEPTH} sigmoid layers, best rates", "step", "test accuracy (%)")
    for arm, dashes in zip(TRAINED, DASHES, strict=False):
        label: str | None = arm
        for one in at_best_rate(of_arm(records, f"{arm}, trained"), final_validation_accuracy):
            accuracy = 100.0 * np.array(one["curves"]["test_accuracy"], dtype=float)
            axes.plot(one["curves"]["step"], accuracy, color=colours[arm], linestyle=dashes, label=label)
            label = None  # one entry in the legend for all seeds of an arm
    axes.axhline(10.0, color=GREY, linewidth=1, linestyle=":", label="chance")
    axes.set_ylim(0, 100)
    legend(axes)
    reached = ", ".join(f"{arm} {number(means[_key('accuracy', arm)])} %" for arm in TRAINED)
    return {
        "norms": (norms, alt),
        "training": (training, f"Test accuracy over {STEPS} steps, one line a seed. Reached: {reached}."),
    }


def _accuracy(name: str, label: str, runs: Sequence[Record]) -> Measure:
    return measure_over_seeds(name, label, "%", [100.0 * last(one, "test_accuracy") for one in runs])


def _key(what: str, arm: str) -> str:
    return f"{what}_{arm.lower().replace(' + ', '_').replace(' ', '_')}"
