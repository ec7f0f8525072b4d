"""port(): batch normalization layers of one model become those of another, whatever the frameworks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from batchnorm.errors import ArgumentError, VerificationError
from batchnorm.surgery.porting import trial
from batchnorm.surgery.porting.checks import problems, rank_for
from batchnorm.surgery.porting.layer import Numbers, PortableLayer
from batchnorm.surgery.porting.matching import ambiguous, framework_of, pairs
from batchnorm.surgery.porting.report import PortedLayer, PortReport

Model = TypeVar("Model")


def port(
    source: Any, target: Model, *, layers: Mapping[str, str] | None = None, tolerance: float = 1e-5
) -> tuple[Model, PortReport]:
    """Carries batch normalization over: statistics, gamma, beta, eps and momentum, from `source` into `target`.

    Each may be a layer or a model of PyTorch (torch.nn's layers or ours), Keras 3 (its own layer or ours) or Flax NNX.
    Everything is tried on copies first: the outputs of both layers in inference and in training, and their statistics
    after a training step. Only if all of that agrees in all layers is anything written.

    The running variance goes over as it is, so that inference stays the same function. From the next training step on
    the target follows its framework's rule: PyTorch averages the unbiased variances of the batches, Keras and Flax the
    biased ones; the report has the difference after one step, and whether n / (n - 1) is all of it. The channel axis
    is part of the target's layout and stays. Other layers (dense, convolutional) are not touched.

    Args:
        source: is read.
        target: is written, in place: it has the layers already.
        layers: source name -> target name, for the layers that are meant. None means all: by name where both models
            have the same names, else in the order in which they are defined; the report lists the pairs.
        tolerance: largest difference, relative to the largest value, that passes.

    Returns:
        The target itself, and the report.

    Raises:
        ArgumentError: something has no counterpart in the other framework; all that was found is listed.
        VerificationError: the layers would not compute the same. In both cases nothing was written.

    Example:
        >>> import keras
        >>> import torch
        >>> source = keras.layers.BatchNormalization(epsilon=1e-3, momentum=0.99)
        >>> source.build((None, 8, 8, 3))
        >>> target, report = port(source, torch.nn.BatchNorm2d(3))
        >>> target.eps, target.momentum, report.holds
        (0.001, 0.01, True)
    """
    from_framework, to_framework = framework_of(source, "source"), framework_of(target, "target")
    read, written = from_framework.layers(source), to_framework.layers(target)
    matched = pairs(read, written, layers)
    if not matched:
        raise ArgumentError("source and target have no batch normalization layer: there is nothing to port.")
    found = [problem for pair in matched for problem in problems(*pair)]
    if found:
        raise ArgumentError("cannot port, and nothing was written: " + "; ".join(found) + ".")
    notes = []
    if layers is None and ambiguous(matched) and [a.name for a, _ in matched] != [b.name for _, b in matched]:
        notes.append(
            f"the layers were matched in order, and {ambiguous(matched)} of them share their shape with another, so "
            "that a wrong order cannot be seen in the shapes: compare the pairs above, or name them with layers={...}"
        )
    report = PortReport(
        tuple(_tried(*pair, tolerance) for pair in matched),
        dict(to_framework.others(target)),
        (_left_out(read, [a for a, _ in matched]), _left_out(written, [b for _, b in matched])),
        tuple(notes),
    )
    if not report.holds:
        raise VerificationError(f"the layers do not compute the same, and nothing was written.\n{report}", report)
    _write(matched)
    to_framework.refresh(target)
    return target, report


def _write(matched: list[tuple[PortableLayer, PortableLayer]]) -> None:
    """Writes all layers, or puts back what was there.

    Raises:
        VerificationError: a layer cannot hold the numbers, as in half precision.
    """
    before = [other.numbers() for _, other in matched]
    try:
        for one, other in matched:
            other.write(one.numbers())
            _check_arrived(one.numbers(), other)
    except BaseException:
        for numbers, (_, other) in zip(before, matched, strict=True):
            other.write(numbers)
        raise


def _tried(source: PortableLayer, target: PortableLayer, tolerance: float) -> PortedLayer:
    """The pair on copies."""
    rank = rank_for(source, target)
    assert rank is not None  # a problem, and found before
    numbers, have = source.numbers(), target.numbers()
    twin = target.twin(rank)
    twin.write(numbers)
    not_tried = source.only_inference or target.only_inference
    return PortedLayer(
        source.name,
        target.name,
        (source.kind, target.kind),
        numbers.mean.shape,
        numbers.eps,
        numbers.momentum,
        (source.axis, target.axis),
        (source.rule, target.rule),
        trial.run(source.twin(rank), twin, rank, tolerance, only_inference=bool(not_tried)),
        not_tried,
        _note(numbers, have),
    )


def _check_arrived(numbers: Numbers, layer: PortableLayer) -> None:
    """Raises VerificationError where the target holds something else than what was written."""
    there = layer.numbers()
    for field in dataclasses.fields(Numbers):
        before, after = getattr(numbers, field.name), getattr(there, field.name)
        if (
            before is not None
            and after is not None
            and not np.allclose(after, before, rtol=1e-6, atol=0, equal_nan=True)
        ):
            raise VerificationError(
                f"{layer.kind} {layer.name!r} cannot hold {field.name} as it is in the source; nothing was written. "
                "Convert the target to float32 first."
            )


def _note(numbers: Numbers, have: Numbers) -> str:
    added = [
        f"{name} is {neutral} now and trains, which the source's did not"
        for name, given, place, neutral in (
            ("gamma", numbers.gamma, have.gamma, 1),
            ("beta", numbers.beta, have.beta, 0),
        )
        if given is None and place is not None
    ]
    return "; ".join(added)


def _left_out(every: list[PortableLayer], used: list[PortableLayer]) -> tuple[str, ...]:
    return tuple(layer.name for layer in every if all(layer is not one for one in used))
