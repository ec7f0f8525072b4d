"""job -> records: trains networks for images one after the other, on one thread, the same numbers every time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.errors import ArgumentError
from batchnorm.lab.config import ImageNetwork, ImageTraining, Job, OwnNetwork, Run
from batchnorm.lab.data import Dataset, Split
from batchnorm.lab.networks import build
from batchnorm.lab.own import build_own
from batchnorm.lab.pictures import load_images
from batchnorm.lab.record import make_record, significant
from batchnorm.lab.train import ORDER_STREAM, one_thread
from batchnorm.lab.watching import Watcher

_LARGEST_LOSS = 1e4
"""A network with a larger loss counts as diverged."""
CURVES = ("step", "train_loss", "validation_loss", "validation_accuracy", "test_accuracy", "seconds")
_CHUNK = 500
"""Images in one forward pass of an evaluation."""


class ImageProbe(Protocol):
    """Looks at a network while it trains, and says afterwards what it saw. One is made for each run."""

    def evaluated(self, network: nn.Module, step: int) -> None:
        """After an evaluation, in evaluation mode and without gradients; leave the network as it is."""

    def stepping(self, network: nn.Module, step: int, x: Tensor, y: Tensor, rate: float) -> None:
        """Before update number `step`, in training mode, gradients there; leave network and gradients as they are."""

    def values(self) -> Mapping[str, Any]:
        """What joins the `values` of the record."""


class MakeProbe(Protocol):
    """Makes the probe of a run."""

    def __call__(self, run: Run, data: Dataset) -> ImageProbe:
        """The probe; `data` is what the run trains on."""


def fit(job: Job, make_probe: MakeProbe | None = None) -> list[dict[str, Any]]:
    """Train the runs of a job, one after the other.

    Args:
        job: runs with an `ImageNetwork` and an `ImageTraining`.
        make_probe: what looks on.

    Returns:
        One record for each run, in their order. Its curves, at each evaluation step: "train_loss" (mean of the
        mini-batch losses since the last evaluation; at the first one, None), "validation_loss", "validation_accuracy"
        (fraction), and "seconds" of training so far, evaluations and probes left out; "test_accuracy" at the last
        evaluation, None before. Its values: "diverged_at", the step at which the loss was not finite or passed 1e4,
        or None; from there on the network stands still at zero. "parameters", how many numbers are trained.

    Raises:
        ArgumentError: a run describes something else than a network for images.
    """
    with one_thread():
        return [_fit(run, job, make_probe) for run in job.runs]


def image_shape(data: Dataset) -> tuple[int, int, int]:
    """(channels, height, width) of its images."""
    channels, height, width = data.train.x.shape[1:]
    return channels, height, width


def data_of(run: Run, images: str) -> Dataset:
    """What a run trains on.

    Raises:
        ArgumentError: it does not train on images.
    """
    training = run.training
    if not isinstance(training, ImageTraining):
        raise ArgumentError(f"expected a run on images, got {training}")
    return load_images(images, rows=training.rows, side=training.side, inputs=training.inputs)


def network_of(run: Run, data: Dataset) -> nn.Module:
    """The network of a run with its initial weights.

    Raises:
        ArgumentError: the run describes none for images, or the user's does not fit the data.
    """
    if isinstance(run.network, OwnNetwork):
        return build_own(run.network, image_shape(data), data.classes, seed=run.seed)
    if not isinstance(run.network, ImageNetwork):
        raise ArgumentError(f"expected a network for images, got {run.network}")
    return build(run.network, image_shape(data), data.classes, seed=run.seed)


def accuracy_and_loss(network: nn.Module, part: Split) -> tuple[float, float]:
    """Share of images that are put into their class, and mean loss; in the mode in which the network is."""
    right, loss = 0, 0.0
    with torch.no_grad():
        for start in range(0, len(part.y), _CHUNK):
            y = torch.from_numpy(part.y[start : start + _CHUNK])
            logits = network(_pixels_last(torch.from_numpy(part.x[start : start + _CHUNK])))
            right += int((logits.argmax(dim=1) == y).sum())
            loss += float(functional.cross_entropy(logits, y, reduction="sum"))
    return right / len(part.y), loss / len(part.y)


def batches(part: Split, *, size: int, seed: int, order: str = "shuffled") -> Iterator[tuple[Tensor, Tensor]]:
    """Mini-batches without end; each pass is shuffled anew, and the rest that does not fill a batch is left out."""
    generator = np.random.default_rng((seed, ORDER_STREAM))
    x, y = torch.from_numpy(part.x), torch.from_numpy(part.y)
    while True:
        shuffled = generator.permutation(len(part.y))
        if order == "by_class":  # whole batches of one class each, the batches shuffled
            sorted_rows = shuffled[np.argsort(part.y[shuffled], kind="stable")]
            full = [
                rows[start : start + size]
                for rows in np.split(sorted_rows, np.flatnonzero(np.diff(part.y[sorted_rows])) + 1)
                for start in range(0, len(rows) - size + 1, size)
            ]
            picked = [full[k] for k in generator.permutation(len(full))]
        else:
            picked = [shuffled[start : start + size] for start in range(0, len(shuffled) - size + 1, size)]
        if not picked:
            raise ArgumentError(f"{len(part.y)} training images do not fill a batch of {size}")
        for rows in picked:
            chosen = torch.from_numpy(rows)
            yield _pixels_last(x[chosen]), y[chosen]


def _pixels_last(x: Tensor) -> Tensor:
    """Channels-last: convolutions of few channels take little more than half of the time."""
    return x.contiguous(memory_format=torch.channels_last)


def _fit(run: Run, job: Job, make_probe: MakeProbe | None) -> dict[str, Any]:
    started = time.perf_counter()
    data, training = data_of(run, job.images), run.training
    assert isinstance(training, ImageTraining)
    network = network_of(run, data)
    torch.manual_seed(run.seed)  # dropout draws from the global generator
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    probe = None if make_probe is None else make_probe(run, data)
    with closing(Watcher(job.watch, (run,))) as watcher:
        curves, diverged_at = _descend(run, training, network, data, probe, watcher)
    return make_record(
        run,
        curves=curves,
        values={
            "diverged_at": diverged_at,
            "parameters": sum(one.numel() for one in network.parameters()),
            **({} if probe is None else probe.values()),
        },
        seconds=time.perf_counter() - started,
        data_sha256=data.sha256,
    )


def _descend(
    run: Run, training: ImageTraining, network: nn.Module, data: Dataset, probe: ImageProbe | None, watcher: Watcher
) -> tuple[dict[str, list[Any]], int | None]:
    optimizer = torch.optim.SGD(_groups(network, training.weight_decay), lr=run.rate)
    drawn = batches(data.train, size=training.batch_size, seed=run.seed, order=training.order)
    curves: dict[str, list[Any]] = {name: [] for name in CURVES}
    summed, since, trained = 0.0, 0, 0.0
    diverged_at: int | None = None
    for step in range(training.steps + 1):
        if step in training.evaluations:
            network.eval()
            accuracy, loss = accuracy_and_loss(network, data.validation)
            tested = accuracy_and_loss(network, data.test)[0] if step == training.steps else None
            if probe is not None:
                with torch.no_grad():
                    probe.evaluated(network, step)
            network.train()
            mean_loss = significant(summed / since) if since else None
            values = (step, mean_loss, significant(loss), significant(accuracy), tested, significant(trained, 4))
            row = dict(zip(CURVES, values, strict=True))
            for name, curve in curves.items():
                curve.append(row[name])
            watcher.evaluated(step, [{name: row[name] for name in CURVES[1:-1]}])
            summed, since = 0.0, 0
        if step == training.steps:
            break
        if diverged_at is not None:
            continue
        x, y = next(drawn)
        rate = run.rate * training.decay ** (step / training.steps)
        clock = time.perf_counter()
        value = _gradients(network, optimizer, x, y)
        if not value <= _LARGEST_LOSS:  # so that NaN counts as well
            diverged_at = step
            _stand_still(network)
            continue
        trained += time.perf_counter() - clock
        if probe is not None:
            probe.stepping(network, step, x, y, rate)
        clock = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        trained += time.perf_counter() - clock
        summed += value
        since += 1
        watcher.stepped(step, value)
    return curves, diverged_at


def _gradients(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = functional.cross_entropy(network(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of linear maps with weight decay, everything else without."""
    weights = [one for one in network.parameters() if one.ndim > 1]
    rest = [one for one in network.parameters() if one.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _stand_still(network: nn.Module) -> None:
    """A diverged network answers the same to everything from here on."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.fill_(1.0)
