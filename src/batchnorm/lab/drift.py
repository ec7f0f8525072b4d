"""What the last hidden layer of a stack gets while it trains: percentiles, their drift, a typical unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.lab.config import Job
from batchnorm.lab.models import Stack
from batchnorm.lab.record import significant
from batchnorm.lab.train import features_of

PERCENTILES = (0.15, 0.5, 0.85)
"""Those of the paper's figure 1."""
_BINS = 30


class Looks:
    """Collects the last hidden layer's inputs on the validation images; see `train.Probe`."""

    def __init__(self, job: Job) -> None:
        training = job.runs[0].training
        self._x = torch.from_numpy(features_of(job).validation.x)[None]
        self._shown = (training.evaluations[len(training.evaluations) // 2], training.evaluations[-1])
        self._percentiles: dict[str, list[NDArray[np.float64]]] = {"drift": [], "drift_before": []}
        self._seen: list[tuple[int, NDArray[np.float64]]] = []

    def __call__(self, stack: Stack, step: int) -> None:
        """Look at what the images give with statistics of their own: what the layer sees in training."""
        trace = stack.trace(self._x, "batch")
        self._percentiles["drift"].append(_percentiles(trace.activation_inputs[-1]))
        self._percentiles["drift_before"].append(_percentiles(trace.linear[-1]))
        if step in self._shown:
            self._seen.append((step, trace.activation_inputs[-1].double().numpy()))

    def values(self) -> Sequence[Mapping[str, Any]]:
        """Drift and the typical unit of each run."""
        looks = np.stack(self._percentiles["drift"])
        moves = drift(looks)
        before = drift(np.stack(self._percentiles["drift_before"])).mean(axis=-1)
        values = []
        for k in range(looks.shape[1]):
            unit = int(np.argsort(moves[:, k].sum(axis=0), kind="stable")[looks.shape[-1] // 2])
            values.append(
                {
                    "drift": [significant(value) for value in moves[:, k].mean(axis=-1)],
                    "drift_before": [significant(value) for value in before[:, k]],
                    "typical": {
                        "unit": unit,
                        "percentiles": [[significant(value, 4) for value in look] for look in looks[:, k, :, unit]],
                        "histograms": [_histogram(step, inputs[k, :, unit]) for step, inputs in self._seen],
                    },
                }
            )
        return values


def drift(percentiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far distributions move from look to look, in units of their own spread.

    drift = mean over the percentiles of |q(t + 1) - q(t)|, over the mean over ALL looks of the spread q85 - q15.

    A shift and a widening count alike, and multiplying all inputs of a unit by one number changes nothing: so a layer
    that merely has larger inputs does not seem to drift more. The spread is one number for the whole training because
    the units of a plain network are nearly constant at first: in units of the spread of the moment their first steps
    would outweigh everything (in trials the ratio between the arms was then ten times as large).

    Args:
        percentiles: The 15th, 50th and 85th, (looks, networks, 3, units).

    Returns:
        (looks - 1, networks, units); 0 for a unit that is constant and stays where it is.
    """
    moved = np.abs(np.diff(percentiles, axis=0)).mean(axis=2)
    spread = (percentiles[:, :, 2] - percentiles[:, :, 0]).mean(axis=0)
    # A unit that moves without ever having a spread is dead; its drift is large but not infinite.
    return np.asarray(moved / np.maximum(spread, np.maximum(1e-9, 1e-3 * moved)))


def _percentiles(inputs: Tensor) -> NDArray[np.float64]:
    """(networks, rows, units) -> (networks, 3, units)."""
    return np.asarray(np.quantile(inputs.double().numpy(), PERCENTILES, axis=1).swapaxes(0, 1))


def _histogram(step: int, inputs: NDArray[np.float64]) -> dict[str, Any]:
    low, high = float(inputs.min()), float(inputs.max())
    if high - low < 1e-6:
        low, high = low - 1e-6, high + 1e-6
    counts, _ = np.histogram(inputs, bins=_BINS, range=(low, high))
    return {
        "step": step,
        "low": low,
        "high": high,
        "counts": counts.tolist(),
        "mean": significant(inputs.mean()),
        "std": significant(max(inputs.std(), 1e-9)),
    }
