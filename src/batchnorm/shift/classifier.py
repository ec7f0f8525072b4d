"""The domain classifier: can the side of a row be told from its values? AUC with an interval, and a calibrated test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from batchnorm.shift.boosting import Boosting
from batchnorm.shift.encoding import Encoded, quantile_edges
from batchnorm.shift.significance import Dealing

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_GROUPS = 32
"""Quantile groups of a number in the classifier of a single column."""


@dataclass(frozen=True)
class Separation:
    """How well the sides can be told apart.

    Attributes:
        auc: mean over the folds; 0.5 is not at all.
        low: lower end of the 95 % interval (Nadeau-Bengio).
        high: upper end.
        p_value: of the calibrated test; None for single columns, which have one of their own.
        overlap: mass that the sides share, estimated from the probabilities, in [0, 1]; None for single columns.
    """

    auc: float
    low: float
    high: float
    p_value: float | None = None
    overlap: float | None = None


def joint(data: Encoded, fold: Ints, unit: Ints | None, seed: int = 0) -> Separation:
    """Gradient boosting on all columns together.

    The AUC is that of cross-validation. The test is not: folds of a cross-validation learn from each other's rows, and
    what that does to the variance can only be guessed. It goes forward instead: fold k is scored by a model of the
    folds before it, so that without shift the chance of as high a score, by dealing labels to units, is uniform in each
    fold given all before it, whatever the model has learned. Normal quantiles of these chances are added up with
    weights (Stouffer). (In trials, fold-mean AUC with Nadeau-Bengio variance raised too few false alarms and pooled
    out-of-fold AUC too many.)

    Args:
        data: rows of both sides.
        fold: (N,), as `units.folds` deals them.
        unit: (N,): groups or blocks; None where each row is its own.
        seed: of the models.
    """
    number = int(fold.max()) + 1
    aucs, probability = [], np.zeros(fold.size)
    forward: list[float] = []
    for k in range(number):
        held = fold == k
        score = probability[held] = _fitted(data, ~held, seed).probabilities(data.values[held])[:, 1]
        aucs.append(auc(score, data.is_new[held]))
        if 0 < k < number - 1:
            score = _fitted(data, fold < k, seed).probabilities(data.values[held])[:, 1]
        if k:
            dealing = Dealing(data.is_new[held], None if unit is None else unit[held], seed + k)
            forward.append(float(stats.norm.isf(dealing.chance_of_as_high(score))))
    # A model's rows grow with k, and with them what it can find.
    weights = np.arange(1.0, number)
    z = float(weights @ np.array(forward)) / float(np.linalg.norm(weights))
    return Separation(*interval(aucs), float(stats.norm.sf(z)), overlap(probability, data.is_new))


def single(values: Floats, is_category: bool, is_new: Bools, fold: Ints) -> Separation:
    """A classifier of one column: shares of both sides in quantile groups or categories; NaN is a group of its own."""
    groups = _groups(values, is_category)
    number, width = int(fold.max()) + 1, int(groups.max()) + 1
    table = np.zeros((number, 2, width))
    np.add.at(table, (fold, is_new.astype(int), groups), 1.0)
    aucs = []
    for k in range(number):
        rest = table.sum(axis=0) - table[k]
        share = (rest + 0.5) / (rest.sum(axis=1, keepdims=True) + 0.5 * width)
        aucs.append(_auc_of_table(np.log(share[1] / share[0]), table[k]))
    return Separation(*interval(aucs))


def auc(score: Floats, is_new: Bools) -> float:
    """The probability that a new row scores higher than one of the reference, ties counting half."""
    ranks = stats.rankdata(score)
    new = int(is_new.sum())
    return float((ranks[is_new].sum() - new * (new + 1) / 2) / (new * (is_new.size - new)))


def interval(aucs: list[float]) -> tuple[float, float, float]:
    """Mean of the folds' AUCs and its 95 % interval, within [0, 1].

    The variance is that of the folds times (1/K + 1/(K - 1)), as they share their training rows.

    Source: Nadeau & Bengio 2003, "Inference for the generalization error".

    Example:
        >>> [round(x, 3) for x in interval([0.5, 0.6, 0.55, 0.52, 0.58])]
        [0.55, 0.473, 0.627]
    """
    number = len(aucs)
    mean = float(np.mean(aucs))
    half = float(stats.t.ppf(0.975, number - 1) * np.std(aucs, ddof=1) * math.sqrt(1 / number + 1 / (number - 1)))
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)


def overlap(probability: Floats, is_new: Bools) -> float:
    """Mass that both sides share: mean of 2 min(e, 1 - e), each side weighing the same; 0 is disjoint support."""
    prior = is_new.mean()
    odds = probability / np.maximum(1 - probability, 1e-12) * (1 - prior) / prior
    e = odds / (1 + odds)
    common = 2 * np.minimum(e, 1 - e)
    return float((common[is_new].mean() + common[~is_new].mean()) / 2)


def _fitted(data: Encoded, rows: Bools, seed: int) -> Boosting:
    new = data.is_new[rows]
    weight = np.where(new, 0.5 / max(new.mean(), 1e-12), 0.5 / max(1 - new.mean(), 1e-12))
    return Boosting(data.values[rows], new, is_class=True, is_category=data.is_category, weight=weight, seed=seed)


def _groups(values: Floats, is_category: bool) -> Ints:
    missing = np.isnan(values)
    groups = np.zeros(values.size, dtype=np.int64)
    held = values[~missing]
    if is_category:
        groups[~missing] = held.astype(np.int64) + 1
    elif held.size:
        groups[~missing] = np.searchsorted(quantile_edges(held, _GROUPS), held, side="left") + 1
    return groups


def _auc_of_table(score: Floats, table: Floats) -> float:
    """AUC where all rows of a group have its score; `table` holds counts, (2, groups)."""
    _, level = np.unique(score, return_inverse=True)
    old, new = np.bincount(level, table[0]), np.bincount(level, table[1])
    below = np.cumsum(old) - old
    return float((new * (below + old / 2)).sum() / (old.sum() * new.sum()))
