"""Three answers to the question which mean and variance a network uses at inference, each from the batches' Moments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from batchnorm.errors import ArgumentError
from batchnorm.stats.moments import Moments
from batchnorm.stats.running import Running, exponential


def mean_of_batches(batches: Iterable[Moments]) -> Running:
    """Averages over the batches: E[x] = mean of mu_B, Var[x] = mean of m / (m - 1) * var_B.

    Source: Ioffe & Szegedy 2015, Alg. 2, lines 8-10. It leaves out the variance BETWEEN the batch means: where those
        differ (small or sorted batches) it is too small, and `population` is right.

    Args:
        batches: Moments of each batch, (C,), at least 2 values a channel each.

    Returns:
        Running: mean (C,) and unbiased variance (C,).

    Raises:
        ArgumentError: there is no batch.
        ShapeError: a batch has a single value a channel.

    Example:
        >>> import numpy as np
        >>> halves = [Moments.of(np.array(half)) for half in ([0.0, 2.0], [10.0, 12.0])]
        >>> float(mean_of_batches(halves).var), float(population(halves).var)
        (2.0, 34.666666666666664)
    """
    parts = _at_least_one(batches)
    mean = sum(part.mean for part in parts)
    var = sum(part.unbiased_var for part in parts)
    return Running(mean / len(parts), var / len(parts))


def moving_average(batches: Iterable[Moments], momentum: float = 0.1, *, start: Running | None = None) -> Running:
    """Exponential moving average over the batches in their order; what the layers keep while they train.

    Source: Ioffe & Szegedy 2015, section 3.1; torch.nn.BatchNorm1d, whose start is mean 0 and variance 1.

    Args:
        batches: Moments of each batch, (C,), oldest first.
        momentum: weight of the NEW batch, in [0, 1].
        start: what the average starts from; None starts from mean 0 and variance 1, as a new layer does.

    Returns:
        Running: mean (C,) and unbiased variance (C,).

    Raises:
        ArgumentError: there is no batch, or momentum is outside of [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ArgumentError(f"momentum must be in [0, 1] (the weight of the new value), got {momentum}.")
    parts = _at_least_one(batches)
    running = start if start is not None else Running(parts[0].mean * 0, parts[0].var * 0 + 1)
    for part in parts:
        running = exponential(running, part, momentum)
    return running


def population(batches: Iterable[Moments]) -> Running:
    """Mean and variance of all the values together: one full pass over the training set, however it is split.

    Merging Moments is exact, so the answer depends on neither the size nor the order of the batches (to float64
    rounding).

    Source: the law of total variance; "population statistics" in Wu & Johnson 2021 (arXiv 2105.07576), section 3, there
    approximated, here exact.

    Args:
        batches: Moments of each batch, (C,); their sizes may differ, empty ones are fine.

    Returns:
        Running: mean (C,) and unbiased variance (C,) over all values.

    Raises:
        ArgumentError: there is no batch.
        ShapeError: there is a single value a channel in all.
    """
    parts = _at_least_one(batches)
    whole = parts[0].merge(*parts[1:])
    return Running(whole.mean, whole.unbiased_var)


def _at_least_one(batches: Iterable[Moments]) -> Sequence[Moments]:
    parts = list(batches)
    if not parts:
        raise ArgumentError("no batches came: pass the Moments of at least one batch.")
    return parts
