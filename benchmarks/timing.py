"""How samples are taken and summed up."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

Sample = Callable[[int], Mapping[str, float]]
"""Runs each phase so many times in a row and gives the seconds of one call of each ("forward", "backward", ...)."""

_SHORTEST = 300e-6  # seconds: what a phase must last for the clock and the loop around it not to count
_LONG = 50e-3  # seconds: from here on what another contender left in the caches does not count


class Summary(NamedTuple):
    """Seconds: median, 20 and 80 percentile, and how many samples they are of."""

    median: float
    low: float
    high: float
    samples: int


class Contender:
    """A sampler warmed up, which knows how many calls make a sample and how many samples a turn."""

    def __init__(self, sample: Sample, warm: float = 0.0) -> None:
        """Runs `sample` a few times: compilation, first touches of memory, caches.

        A turn runs for `warm` seconds, and one sample at least, before its samples count.
        """
        self._sample, self._warm = sample, warm
        for _ in range(2):
            seconds = sample(1)
        shortest = max(min(seconds.values()), 1e-7)
        if shortest < _SHORTEST:
            seconds = sample(4)
            shortest = max(min(seconds.values()), 1e-7)
        self.calls = max(1, min(200, round(_SHORTEST / shortest)))
        self._is_long = sum(seconds.values()) * self.calls > _LONG

    def turn(self) -> list[dict[str, float]]:
        """Samples, one after another: one if it is long, else three that follow some that are not counted.

        Those find in the caches what another contender left there, and threads asleep; the others what their own kind
        left.
        """
        gc.disable()
        try:
            if self._is_long:
                return [dict(self._sample(self.calls))]
            end = time.perf_counter() + self._warm
            self._sample(self.calls)
            while time.perf_counter() < end:
                self._sample(self.calls)
            return [dict(self._sample(self.calls)) for _ in range(3)]
        finally:
            gc.enable()


def per_call(function: Callable[[], object], calls: int) -> float:
    """Seconds of one call, of `calls` in a row; the result of each is dropped before the next."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def summary(seconds: Iterable[float]) -> Summary:
    """What a row of results shows."""
    taken = list(seconds)
    low, median, high = np.percentile(taken, [20, 50, 80])
    return Summary(float(median), float(low), float(high), len(taken))
