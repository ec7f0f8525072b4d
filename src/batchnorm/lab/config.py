"""What a run is: frozen dataclasses that say everything a training needs, and nothing that it finds out.

A `Run` gives one record. A `Job` is a stack of runs that are trained together in one process; what a run gives does
not depend on the job it was in, so only the run is part of the key under which its record is found again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Activation = Literal["sigmoid", "relu", "maxout", "identity"]
Norm = Literal["none", "batch", "layer"]
Placement = Literal["before", "after"]
Init = Literal["gaussian", "fan_in"]
Inputs = Literal["raw", "unit", "binarised", "standardised"]
Data = Literal["digits", "wine"]
Tier = Literal["quick"]


@dataclass(frozen=True)
class Network:
    """A dense network: `depth` hidden layers of `width` units and a linear output layer.

    Attributes:
        depth: Number of hidden layers; 0 is a linear model.
        width: Units in each hidden layer (a maxout unit takes the larger of two linear ones).
        activation: The nonlinearity of the hidden layers.
        norm: What normalises each hidden layer; the output layer is never normalised.
        placement: Whether the normalisation stands before the activation, as in the paper, or after it.
        init: Standard deviation of the Gaussian initial weights: "gaussian" takes `init_scale` itself, "fan_in" takes
            init_scale / sqrt(inputs of the layer), so that sqrt(2) is He's rule and 1 is LeCun's. Biases start at 0.
        init_scale: See `init`.
        momentum: Weight of the new value in the running statistics of batch normalisation.
    """

    depth: int = 3
    width: int = 100
    activation: Activation = "sigmoid"
    norm: Norm = "none"
    placement: Placement = "before"
    init: Init = "gaussian"
    init_scale: float = 0.1
    momentum: float = 0.1


@dataclass(frozen=True)
class Training:
    """Data and schedule: plain SGD on the softmax cross-entropy, without weight decay, at a constant rate.

    Attributes:
        data: Which data set.
        inputs: How its features are prepared; see `batchnorm.lab.data.load`.
        batch_size: Examples in a mini-batch; each pass through the training rows is shuffled anew, and the rest that
            does not fill a batch is left out of that pass.
        steps: Number of updates.
        evaluations: The steps after which the network is evaluated, ascending; 0 is before the first update.
    """

    data: Data = "digits"
    inputs: Inputs = "unit"
    batch_size: int = 60
    steps: int = 1000
    evaluations: tuple[int, ...] = (0, 1000)


@dataclass(frozen=True)
class Run:
    """One training: it gives one record, whatever stack it was trained in.

    Attributes:
        claim: Name of the claim that asked for it.
        arm: Which side of the comparison it is on, such as "plain" or "batch norm".
        seed: Fixes the initial weights and the order of the data; runs of two arms with the same seed are a pair.
        rate: Learning rate.
        network: The network.
        training: Data and schedule.
    """

    claim: str
    arm: str
    seed: int
    rate: float
    network: Network
    training: Training

    @property
    def config(self) -> dict[str, Any]:
        """The run as plain JSON values, nested like the dataclasses."""
        config: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return config

    @property
    def key(self) -> str:
        """A name that stays the same from session to session: 16 hexadecimal digits of a hash of `config`."""
        text = json.dumps(self.config, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def with_training(self, **changes: Any) -> Run:
        """The same run with some fields of its training replaced."""
        return replace(self, training=replace(self.training, **changes))


@dataclass(frozen=True)
class Job:
    """Runs that can be trained together as one stack: they may differ in seed, rate and initial scale only."""

    claim: str
    runs: tuple[Run, ...]


def even_steps(steps: int, every: int) -> tuple[int, ...]:
    """Evaluation steps from 0 to `steps`, `every` apart; the last step is always among them.

    >>> even_steps(10, 4)
    (0, 4, 8, 10)
    """
    return (*range(0, steps, every), steps)


def spaced_steps(steps: int, first: int, factor: float) -> tuple[int, ...]:
    """Evaluation steps 0, `first`, and then each about `factor` times the one before, up to `steps`.

    >>> spaced_steps(100, 10, 2.0)
    (0, 10, 20, 40, 80, 100)
    """
    found, exact = [0], float(first)
    while round(exact) < steps:
        if round(exact) > found[-1]:
            found.append(round(exact))
        exact *= factor
    return (*found, steps)


def at_least(seeds: Sequence[int], number: int) -> tuple[int, ...]:
    """The seeds, joined by the first natural numbers where they are fewer than `number`: for claims with cheap runs.

    >>> at_least([0, 7], 4)
    (0, 1, 2, 7)
    """
    found = dict.fromkeys(seeds)
    for seed in range(number):
        if len(found) < number:
            found.setdefault(seed)
    return tuple(sorted(found))


def stacked(runs: Iterable[Run], *, largest: int = 40) -> list[Job]:
    """Jobs of the runs that may share a stack: those of one claim, arm, training and network but for its initial scale.

    Args:
        runs: Any runs.
        largest: Runs in a job; larger stacks fall out of the processor's caches.

    Returns:
        The jobs, in the order of their first runs.
    """
    groups: dict[tuple[str, str, Training, Network], list[Run]] = {}
    for run in runs:
        alike = (run.claim, run.arm, run.training, replace(run.network, init_scale=1.0))
        groups.setdefault(alike, []).append(run)
    jobs = []
    for group in groups.values():
        parts = -(-len(group) // largest)
        size = -(-len(group) // parts)
        jobs += [Job(group[0].claim, tuple(group[start : start + size])) for start in range(0, len(group), size)]
    return jobs
