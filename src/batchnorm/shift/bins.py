"""Bins: the shares of both sides that a figure draws, a few numbers whatever the number of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchnorm.shift.column import Column
from batchnorm.shift.histogram import shared

_MOST = 32
_CATEGORIES = 8


@dataclass(frozen=True)
class Bins:
    """Shares of the rows in each bin.

    Attributes:
        edges: (B + 1,), of numbers, cut where the outermost 0.5 % of both sides begin; () for categories.
        labels: (B,), of categories, the most frequent first; () for numbers. Missing values are the last.
        old: (B,), share of the reference's rows.
        new: (B,), share of the new rows.
    """

    edges: tuple[float, ...]
    labels: tuple[str, ...]
    old: tuple[float, ...]
    new: tuple[float, ...]


def bins_of(old: Column, new: Column) -> Bins | None:
    """Bins of two columns of one kind; None where there is nothing to draw."""
    rows = np.array([[max(old.rows, 1)], [max(new.rows, 1)]])
    if old.kind == "category":
        weight = {
            name: old.categories.counts.get(name, 0) / rows[0, 0] + new.categories.counts.get(name, 0) / rows[1, 0]
            for name in {**old.categories.counts, **new.categories.counts}
        }
        names = sorted(weight, key=lambda name: (-weight[name], name))[:_CATEGORIES]
        counts = np.array([[side.categories.counts.get(name, 0) for name in names] for side in (old, new)], dtype=float)
        rest = np.array([[side.categories.total] for side in (old, new)]) - counts.sum(axis=1, keepdims=True)
        missing = np.array([[side.missing] for side in (old, new)])
        for label, extra in (("others", rest), ("missing", missing)):
            if extra.any():
                names, counts = [*names, label], np.hstack([counts, extra])
        shares = counts / rows
        return Bins((), tuple(names), tuple(shares[0].tolist()), tuple(shares[1].tolist()))
    edges, before, after = shared(old.histogram, new.histogram)
    if not edges.size:
        return None
    weight_of = before / max(before.sum(), 1) + after / max(after.sum(), 1)
    below = np.cumsum(weight_of) / weight_of.sum()
    width = max(old.histogram.width, new.histogram.width)
    first, last = np.minimum(np.searchsorted(below, [0.005, 0.995]), edges.size - 1)
    low, high = edges[first], edges[last] + width
    # Bars as wide as a whole number of steps: else whole numbers would fall two into one bar and one into the next.
    inside = edges[(edges >= low) & (edges < high)]
    step = max(float(np.diff(inside).min()), width) if inside.size > 1 else high - low
    step *= max(1.0, np.ceil((high - low) / step / _MOST))
    cuts = low + step * np.arange(int(np.ceil((high - low) / step)) + 1)
    which = np.clip(np.searchsorted(cuts, edges, side="right") - 1, 0, cuts.size - 2)
    counts = np.stack([np.bincount(which, side, cuts.size - 1) for side in (before, after)]) / rows
    return Bins(tuple(cuts.tolist()), (), tuple(counts[0].tolist()), tuple(counts[1].tolist()))
