"""Effect sizes of one variable: how far two sides are apart, whatever the number of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchnorm.shift.column import Column
from batchnorm.shift.histogram import shared
from batchnorm.shift.layer import Layer

_GROUPS = 16
"""Groups of bins that the Jensen-Shannon distance is taken over, of about equal counts in both sides together."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """How far a variable has moved; None where a number means nothing for its kind.

    Attributes:
        mean_difference: (new mean - old mean) / sqrt((old var + new var) / 2).
        std_ratio: new standard deviation / old one.
        wasserstein: area between the two distribution functions, in the same unit of standard deviations; never below
            |mean_difference|, but for the width of a bin.
        jensen_shannon: distance in [0, 1]: the square root of the divergence in bits, less what two samples of one
            distribution would show on average.
        missing_change: new share of missing values - old share.
        new_categories: share of the new rows whose category the reference lacks.
        overall: the largest of |mean_difference|, wasserstein, jensen_shannon and |missing_change|. For a layer: the
            root mean square over its channels of sqrt(dmean^2 + dstd^2) / pooled std (the 2-Wasserstein distance of
            Gaussians), less what that many rows would show on average without shift.
        worst_channel: of a layer: number of the channel that has moved most.
    """

    overall: float
    mean_difference: float | None = None
    std_ratio: float | None = None
    wasserstein: float | None = None
    jensen_shannon: float | None = None
    missing_change: float | None = None
    new_categories: float | None = None
    worst_channel: int | None = None


def of_columns(old: Column, new: Column) -> Effect:
    """The effect between two columns of one kind."""
    missing = new.missing / max(new.rows, 1) - old.missing / max(old.rows, 1)
    if old.kind == "category":
        counts = _category_counts(old, new)
        distance = jensen_shannon(*_largest(*counts))
        lacking = sum(n for name, n in new.categories.counts.items() if name not in old.categories.counts)
        share = lacking / max(new.categories.total, 1) if old.categories.is_complete else None
        return Effect(
            max(distance, abs(missing)), jensen_shannon=distance, missing_change=missing, new_categories=share
        )
    edges, before, after = shared(old.histogram, new.histogram)
    distance = jensen_shannon(*_grouped(before, after))
    if not before.sum() or not after.sum():
        return Effect(max(abs(missing), distance), jensen_shannon=distance, missing_change=missing)
    difference = float(new.moments.mean[0] - old.moments.mean[0])
    old_std, new_std = math.sqrt(old.moments.var[0]), math.sqrt(new.moments.var[0])
    pooled = math.hypot(old_std, new_std) / math.sqrt(2)
    # Two constants: the same, or as far apart as can be.
    scaled = difference / pooled if pooled else math.copysign(1.0, difference) if difference else 0.0
    apart = _wasserstein(edges, before, after)
    area = apart / pooled if pooled else abs(scaled)
    ratio = new_std / old_std if old_std else None
    return Effect(max(abs(scaled), area, distance, abs(missing)), scaled, ratio, area, distance, missing)


def of_layers(old: Layer, new: Layer, *, old_rows: int = 0, new_rows: int = 0) -> Effect:
    """The effect between what enters a layer now and then; mean difference and ratio are the worst channel's.

    Args:
        old: the reference's.
        new: of the same channels.
        old_rows: rows (images, sequences) behind `old`; 0 where it is not known, as of running statistics.
        new_rows: the same of `new`.
    """
    old_std, new_std = np.sqrt(old.var), np.sqrt(new.var)
    pooled = np.sqrt((old.var + new.var) / 2 + old.eps)
    difference = (new.mean - old.mean) / pooled
    squared = difference**2 + ((new_std - old_std) / pooled) ** 2
    # Of a Gaussian with n rows: variance 1/n of the mean and 1/(2n) of the standard deviation. Positions within a row
    # resemble each other and are no rows.
    bias = 1.5 * sum(1 / rows for rows in (old_rows, new_rows) if rows)
    worst = int(np.argmax(squared))
    ratio = float(np.sqrt((new.var[worst] + new.eps) / (old.var[worst] + old.eps)))
    overall = math.sqrt(max(float(squared.mean()) - bias, 0.0))
    return Effect(overall, float(difference[worst]), ratio, worst_channel=worst)


def jensen_shannon(before: Floats, after: Floats) -> float:
    """The distance between two rows of counts, (B,) each, in [0, 1], less its bias.

    With n rows a side, two samples of one distribution have a divergence of about (B - 1) (1/n0 + 1/n1) / (8 ln 2)
    bits, which is taken off: else the distance, a square root, would be large wherever rows are few.

    Example:
        >>> import numpy as np
        >>> round(jensen_shannon(np.array([10.0, 0.0]), np.array([0.0, 1e6])), 3)
        0.991
    """
    n0, n1 = before.sum(), after.sum()
    if not n0 or not n1:
        return 0.0 if n0 == n1 else 1.0
    p, q = before / n0, after / n1
    m = (p + q) / 2
    bits = (_relative_entropy(p, m) + _relative_entropy(q, m)) / 2
    bias = (np.count_nonzero(m) - 1) * (1 / n0 + 1 / n1) / (8 * math.log(2))
    return math.sqrt(max(bits - bias, 0.0))


def _relative_entropy(p: Floats, m: Floats) -> float:
    held = p > 0
    return float((p[held] * np.log2(p[held] / m[held])).sum())


def _wasserstein(edges: Floats, before: Floats, after: Floats) -> float:
    below = np.cumsum(before / before.sum() - after / after.sum())
    return float((np.abs(below[:-1]) * np.diff(edges)).sum())


def _grouped(before: Floats, after: Floats) -> tuple[Floats, Floats]:
    """Neighbouring bins united into about `_GROUPS` groups of equal weight, each side weighing the same."""
    if before.size <= _GROUPS:
        return before, after
    weight = before / max(before.sum(), 1) + after / max(after.sum(), 1)
    middle = (np.cumsum(weight) - weight / 2) / weight.sum()
    group = np.minimum((middle * _GROUPS).astype(int), _GROUPS - 1)
    first, second = (np.bincount(group, side, _GROUPS).astype(np.float64) for side in (before, after))
    return first, second


def _category_counts(old: Column, new: Column) -> tuple[Floats, Floats]:
    bits = min(old.categories.bits, new.categories.bits)
    # Merging brings both to the same hash threshold; the rest of either side is one more category.
    names = list(old.categories.merge(new.categories).counts)
    rows = []
    for side in (old.categories, new.categories):
        kept = [float(side.counts.get(name, 0)) for name in names]
        rows.append([*kept, max(side.total - sum(kept), 0.0)] if bits < 64 else kept)
    return np.array(rows[0]), np.array(rows[1])


def _largest(before: Floats, after: Floats, most: int = 64) -> tuple[Floats, Floats]:
    """The largest categories of both, and the others united: a few rows say nothing about thousands of categories."""
    if before.size <= most:
        return before, after
    weight = before / max(before.sum(), 1) + after / max(after.sum(), 1)
    order = np.argsort(-weight, kind="stable")
    head, tail = order[: most - 1], order[most - 1 :]
    return np.append(before[head], before[tail].sum()), np.append(after[head], after[tail].sum())
