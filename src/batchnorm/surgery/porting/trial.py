"""Both layers on the same numbers: outputs in inference and in training, and the statistics after the training step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from batchnorm.stats.moments import Moments
from batchnorm.surgery.porting.layer import Array, PortableLayer
from batchnorm.surgery.verification import Agreement, compare


class Trial(NamedTuple):
    """What came out; the last four are None where a training step could not be tried."""

    inference: Agreement
    training: Agreement | None
    mean_after_step: Agreement | None
    var_after_step: Agreement | None
    """Of the running variances, after what the two rules make different was taken away."""
    var_gap: float | None
    """Largest relative difference of the running variances after that step, as they are."""


def run(source: PortableLayer, target: PortableLayer, rank: int, tolerance: float, *, only_inference: bool) -> Trial:
    """Runs twins of both; neither of them is what it was afterwards."""
    batch = _batch(source.numbers().mean.shape, rank)
    inference = _compared(_output(source, batch, training=False), _output(target, batch, training=False), tolerance)
    if only_inference:
        return Trial(inference, None, None, None, None)
    training = _compared(_output(source, batch, training=True), _output(target, batch, training=True), tolerance)
    before, after = source.numbers(), target.numbers()
    gap = _gap_of_rules(source, target, batch)
    scale = np.abs(before.var).max(initial=0.0)
    return Trial(
        inference,
        training,
        _compared(before.mean, after.mean, tolerance),
        _compared(before.var + gap, after.var, tolerance),
        float(np.abs(after.var - before.var).max(initial=0.0) / scale) if scale else 0.0,
    )


def _batch(channels: tuple[int, ...], rank: int) -> npt.NDArray[np.float32]:
    """A batch with the channel axes last; means and deviations differ from channel to channel."""
    rng = np.random.default_rng(0)
    others = (12, *(3 for _ in range(rank - len(channels) - 1)))
    values = rng.standard_normal((*others, *channels)) * rng.uniform(0.5, 2.0, channels) + rng.normal(0, 1, channels)
    return values.astype(np.float32)


def _output(layer: PortableLayer, batch: npt.NDArray[np.float32], *, training: bool) -> Array:
    last = range(batch.ndim - len(layer.axis), batch.ndim)
    own = sorted(axis % batch.ndim for axis in layer.axis)
    y = layer.run(np.ascontiguousarray(np.moveaxis(batch, last, own)), training=training)
    return np.moveaxis(y, own, last)


def _gap_of_rules(source: PortableLayer, target: PortableLayer, batch: npt.NDArray[np.float32]) -> Array | float:
    """What one step puts between the running variances: momentum * var * (n / (n - 1) - 1), or less, or nothing."""
    if source.rule == target.rule:
        return 0.0
    moments = Moments.of(batch, tuple(range(batch.ndim - len(source.axis))))
    momentum = source.numbers().momentum
    assert momentum is not None  # the plain average is never ported to where the rule is another
    gap: Array = momentum * (moments.unbiased_var - moments.var)
    return gap if target.rule == "unbiased" else -gap


def _compared(before: Array, after: Array, tolerance: float) -> Agreement:
    pair = (torch.from_numpy(np.ascontiguousarray(before)), torch.from_numpy(np.ascontiguousarray(after)))
    return compare([pair], tolerance=tolerance)
