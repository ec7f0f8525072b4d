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
Data = Literal["digits", "wine", "images"]
Tier = Literal["quick", "standard", "full", "network"]
OwnNorm = Literal["own", "none", "group"]
ImageNorm = Literal["none", "batch", "group", "layer", "instance", "renorm", "ghost", "decorrelated", "noisy"]
ImageKind = Literal["dense", "vgg", "inception", "plain", "residual"]


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
class ImageNetwork:
    """A network for images, one of those that `batchnorm.lab.networks` builds.

    Attributes:
        kind: "dense": `depth` hidden layers of `width` units; "vgg": six 3x3 convolutions, pooled after every second
            one; "inception": three inception modules as the paper has them (its 5x5 made of two 3x3); "plain" and
            "residual": `depth` 3x3 convolutions of `width` channels, the latter with a shortcut around every two.
        norm: What normalises the output of each convolution or hidden layer, before its activation. "noisy" is batch
            normalisation followed by noise whose mean and scale change at every step.
        activation: After each normalisation.
        depth: For the kinds that have one.
        width: Channels or units; of "vgg" and "inception" the first, on which the others depend.
        dropout: Share of the units in front of the output layer that are dropped in training ("dense": in front of
            every layer but the first).
        responses: Whether local response normalisation follows the first activations, as in plain Inception.
        momentum: Weight of the new value in the running statistics of batch normalisation.
    """

    kind: ImageKind = "vgg"
    norm: ImageNorm = "none"
    activation: Literal["relu", "sigmoid", "identity"] = "relu"
    depth: int = 6
    width: int = 16
    dropout: float = 0.0
    responses: bool = False
    momentum: float = 0.1


@dataclass(frozen=True)
class OwnNetwork:
    """A network of the user's, as it is or with something else in the place of its batch normalization.

    Attributes:
        factory: package.module:factory, which makes it; "" until the study is told.
        norm: "own" leaves it as it is; "none" puts nothing in the place of each batch normalization layer; "group"
            puts group normalization there.
    """

    factory: str = ""
    norm: OwnNorm = "own"


@dataclass(frozen=True)
class ImageTraining:
    """Images and schedule: plain SGD on the softmax cross-entropy.

    Attributes:
        rows: How many of the training images are used, the first ones of a fixed shuffled order; 0 for all of them.
        side: Images are averaged down to so many pixels a side; 0 leaves them as they are.
        inputs: How pixels are prepared; see `batchnorm.lab.data.load`. "standardised" is by colour channel.
        batch_size: Images in a mini-batch.
        steps: Number of updates.
        evaluations: The steps after which the network is evaluated, ascending.
        weight_decay: L2 penalty on all weights but those of normalisations and biases.
        decay: What the learning rate is multiplied by over the whole training, a little at each step.
        order: "shuffled" anew in each pass, or "by_class": each batch holds images of one class.
        data: Always the images that the study was given.
    """

    rows: int = 0
    side: int = 0
    inputs: Inputs = "standardised"
    batch_size: int = 64
    steps: int = 1000
    evaluations: tuple[int, ...] = (0, 1000)
    weight_decay: float = 0.0
    decay: float = 1.0
    order: Literal["shuffled", "by_class"] = "shuffled"
    data: Data = "images"


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
    network: Network | ImageNetwork | OwnNetwork
    training: Training | ImageTraining

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
class Watch:
    """Where a run tells how far it is while it trains; see `batchnorm.lab.watching`.

    Attributes:
        folder: Folder on this machine for what the display shows; "" tells nothing.
        tensorboard: Folder for TensorBoard's event files; "" writes none.
    """

    folder: str = ""
    tensorboard: str = ""


@dataclass(frozen=True)
class Job:
    """Runs that one process trains: as one stack, if they differ in seed, rate and initial scale only, or in turn.

    Attributes:
        claim: Name of the claim.
        runs: What is trained.
        images: Folder of the stored images that "images" means; "" where there are none. No part of a run's key:
            records name the images by their hash.
        watch: Where its runs tell how far they are; no part of a run's key either.
    """

    claim: str
    runs: tuple[Run, ...]
    images: str = ""
    watch: Watch = Watch()

    def given(self, images: str, factory: str, watch: Watch | None = None) -> Job:
        """The same job on these images, with the user's network where it has one, and watched."""
        runs = tuple(
            replace(run, network=replace(run.network, factory=factory)) if isinstance(run.network, OwnNetwork) else run
            for run in self.runs
        )
        return replace(self, runs=runs, images=images, watch=watch or self.watch)


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
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        network = replace(run.network, init_scale=1.0) if isinstance(run.network, Network) else run.network
        alike = (run.claim, run.arm, run.training, network)
        groups.setdefault(alike, []).append(run)
    jobs = []
    for group in groups.values():
        parts = -(-len(group) // largest)
        size = -(-len(group) // parts)
        jobs += [Job(group[0].claim, tuple(group[start : start + size])) for start in range(0, len(group), size)]
    return jobs
