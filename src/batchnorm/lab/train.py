"""job -> records: trains the runs of a job as one stack, on one thread, the same numbers every time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import ArgumentError
from batchnorm.lab.config import ImageTraining, Job, Network
from batchnorm.lab.data import Dataset, Split, load
from batchnorm.lab.models import Stack
from batchnorm.lab.pictures import load_images
from batchnorm.lab.record import make_record, significant
from batchnorm.lab.watching import Watcher

_LARGEST_WEIGHT = 1e6
"""A network with a larger weight counts as diverged. It is far beyond anything that trains, and still so small that no
activation overflows: batch normalisation would leave the statistics of the whole stack alone at a value that is not
finite, and so one network would touch another."""

ORDER_STREAM = 1  # apart from the stream of the initial weights


class Probe(Protocol):
    """Looks at a stack at each evaluation and says afterwards what it saw."""

    def __call__(self, stack: Stack, step: int) -> None:
        """Look at the stack, in evaluation mode and without gradients; leave it as it is."""

    def values(self) -> Sequence[Mapping[str, Any]]:
        """One mapping for each run, which joins the `values` of its record."""


def train(job: Job, probe: Probe | None = None) -> list[dict[str, Any]]:
    """Train the runs of a job.

    Args:
        job: Runs that differ in seed, rate and initial scale only.
        probe: Called at each evaluation.

    Returns:
        One record for each run, in their order. Its curves, at each evaluation step: "train_loss" (mean of the
        mini-batch losses since the last evaluation; at the first one, None), "validation_loss",
        "validation_accuracy", "test_accuracy" (fractions) and "seconds" of training so far (of the stack, divided by
        its runs, evaluations left out). Its values: "diverged_at", the step after which a weight was not finite or
        passed 1e6, or None. From there on the network stands still at zero.

    Raises:
        ArgumentError: The runs differ in more than seed, rate and initial scale.
    """
    started = time.perf_counter()
    with one_thread():
        training = job.runs[0].training
        if any(run.training != training for run in job.runs):
            raise ArgumentError("expected runs with the same training: put the others into another job")
        data = features_of(job)
        networks = [run.network for run in job.runs if isinstance(run.network, Network)]
        stack = Stack(
            networks,
            [run.seed for run in job.runs],
            inputs=data.train.x.shape[1],
            classes=data.classes,
        )
        with closing(Watcher(job.watch, job.runs)) as watcher:
            curves, diverged_at = _descend(job, stack, data, probe, watcher)
    seconds = (time.perf_counter() - started) / len(job.runs)
    seen: Sequence[Mapping[str, Any]] = probe.values() if probe is not None else [{}] * len(job.runs)
    return [
        make_record(
            run,
            curves={
                "step": list(training.evaluations),
                **{name: [at[k] for at in curve] for name, curve in curves.items()},
            },
            values={"diverged_at": diverged_at[k], **seen[k]},
            seconds=seconds,
            data_sha256=data.sha256,
        )
        for k, run in enumerate(job.runs)
    ]


def features_of(job: Job) -> Dataset:
    """The data of a job with a row of features for each example, images flattened."""
    training = job.runs[0].training
    if not isinstance(training, ImageTraining):
        return load(training.data, training.inputs)
    data = load_images(job.images, rows=training.rows, side=training.side, inputs=training.inputs)
    train, validation, test = (
        Split(part.x.reshape(len(part.y), -1), part.y) for part in (data.train, data.validation, data.test)
    )
    return replace(data, train=train, validation=validation, test=test)


def _descend(
    job: Job, stack: Stack, data: Dataset, probe: Probe | None, watcher: Watcher
) -> tuple[dict[str, list[list[float]]], list[int | None]]:
    training, count = job.runs[0].training, stack.count
    batches = _batches(data.train, [run.seed for run in job.runs], training.batch_size)
    rates = torch.tensor([run.rate for run in job.runs])
    parameters = [parameter for parameter in stack.parameters() if parameter.requires_grad]
    held_out = _HeldOut(data)
    names = ("train_loss", "validation_loss", "validation_accuracy", "test_accuracy", "seconds")
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
    diverged_at: list[int | None] = [None] * count
    summed, since, trained = torch.zeros(count), 0, 0.0

    for step in range(training.steps + 1):
        if step in training.evaluations:
            mean_loss = summed / since if since else torch.full((count,), torch.nan)
            stack.eval()
            with torch.no_grad():
                for name, values in zip(names, (mean_loss, *held_out.evaluate(stack)), strict=False):
                    curves[name].append([significant(value) for value in values.tolist()])
                if probe is not None:
                    probe(stack, step)
            stack.train()
            watcher.evaluated(step, [{name: curves[name][-1][k] for name in names[:-1]} for k in range(count)])
            curves["seconds"].append([significant(trained / count, 4)] * count)
            summed, since = torch.zeros(count), 0
        if step == training.steps:
            break
        clock = time.perf_counter()
        x, y = next(batches)
        losses = stack.losses(stack(x), y)
        torch.autograd.backward(losses.sum(), inputs=parameters)
        summed += losses.detach()
        since += 1
        for k in _step(parameters, rates):
            diverged_at[k] = step + 1
        trained += time.perf_counter() - clock
        watcher.stepped(step, losses.detach())
    return curves, diverged_at


@torch.no_grad()
def _step(parameters: Sequence[torch.nn.Parameter], rates: Tensor) -> list[int]:
    """One step of SGD, each network at its own rate; gives the networks that diverged in it, stopped at zero."""
    squares = 0.0
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.addcmul_(parameter.grad, rates.view(-1, *[1] * (parameter.dim() - 1)), value=-1.0)
        parameter.grad = None
        squares += float(torch.dot(parameter.view(-1), parameter.view(-1)))
    if squares <= _LARGEST_WEIGHT**2:  # then no single weight is larger; the sum costs little, the maxima do not
        return []
    largest = torch.stack([parameter.flatten(1).abs().amax(dim=1) for parameter in parameters]).amax(dim=0)
    diverged = ~(largest <= _LARGEST_WEIGHT)  # so that NaN counts as well
    rates[diverged] = 0.0
    for parameter in parameters:
        parameter[diverged] = 0.0
    return [int(k) for k in diverged.nonzero()]


def _batches(split: Split, seeds: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Mini-batches x (K, N, features) and y (K, N) without end: the order of a network depends on its seed alone."""
    x, y = torch.from_numpy(split.x), torch.from_numpy(split.y)
    distinct = sorted(set(seeds))
    generators = [np.random.default_rng((seed, ORDER_STREAM)) for seed in distinct]
    which = torch.tensor([distinct.index(seed) for seed in seeds])
    while True:
        order = torch.from_numpy(np.stack([generator.permutation(len(split.y)) for generator in generators]))
        for start in range(0, len(split.y) - batch_size + 1, batch_size):
            rows = order[:, start : start + batch_size]
            if len(distinct) == 1:
                yield x[rows].expand(len(seeds), -1, -1), y[rows].expand(len(seeds), -1)
            else:
                yield x[rows][which], y[rows][which]


class _HeldOut:
    """The validation and the test rows, evaluated in one pass."""

    def __init__(self, data: Dataset) -> None:
        self.x = torch.from_numpy(np.concatenate([data.validation.x, data.test.x]))[None]
        self.y = torch.from_numpy(np.concatenate([data.validation.y, data.test.y]))
        self.validation = len(data.validation.y)

    def evaluate(self, stack: Stack) -> tuple[Tensor, Tensor, Tensor]:
        """Validation loss, validation accuracy and test accuracy of each network, (K,)."""
        logits, cut = stack(self.x), self.validation
        loss = stack.losses(logits[:, :cut], self.y[:cut].expand(stack.count, -1))
        correct = (logits.argmax(dim=-1) == self.y).double()
        return loss, correct[:, :cut].mean(dim=1), correct[:, cut:].mean(dim=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, so that two workers do not fight for two cores, and denormal numbers taken as 0.

    Where signals vanish, processors take ten times as long for numbers below 1e-38, which change nothing. Both
    settings are put back (torch cannot be asked for the second one, and starts with it off).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
