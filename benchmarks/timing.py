"""How samples are taken: interleaved, with warm-up, as many as a time budget allows; and how they are summed up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Sample = Callable[[], Mapping[str, float]]
"""Runs once and gives the seconds of each phase ("forward", "backward", ...)."""


class Summary(NamedTuple):
    """Seconds: median, 20 and 80 percentile, and how many samples they are of."""

    median: float
    low: float
    high: float
    samples: int


def timed(function: Callable[[], object]) -> tuple[object, float]:
    """What `function` gives, and the seconds that it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def interleave(
    samplers: Mapping[str, Sample], *, budget: float, at_least: int = 7, at_most: int = 2000
) -> dict[tuple[str, str], Summary]:
    """Samples all in turn, round after round, until the budget (seconds for each of them) is spent.

    Returns:
        (name, phase) -> Summary.
    """
    for sampler in samplers.values():
        for _ in range(3):  # compilation, first touches of memory, caches
            sampler()
    taken: dict[tuple[str, str], list[float]] = {}
    end = time.perf_counter() + budget * len(samplers)
    rounds = 0
    while rounds < at_least or (time.perf_counter() < end and rounds < at_most):
        for name, sampler in samplers.items():
            for phase, seconds in sampler().items():
                taken.setdefault((name, phase), []).append(seconds)
        rounds += 1
    return {key: _summary(values) for key, values in taken.items()}


def _summary(values: list[float]) -> Summary:
    low, median, high = np.percentile(values, [20, 50, 80])
    return Summary(float(median), float(low), float(high), len(values))
