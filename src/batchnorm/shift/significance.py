"""Tests that stay calibrated where rows come in groups: labels are dealt to whole units, and to nothing smaller."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_FEW_VALUES = 12
"""Different values up to which a number is tested as categories are."""


def z_score(score: Floats, is_new: Bools, unit: Ints | None = None) -> float:
    """How much higher the new side's ranks are than if the units' labels had been dealt at random, in deviations.

    With S the sum of centred ranks over the new side, and a_g their sum over unit g of G, G1 of them new:
    var(S) = G1 (G - G1) / (G (G - 1)) * sum(a_g^2). Where each row is a unit, this is the Mann-Whitney test with ties.

    Args:
        score: (N,), any scale.
        is_new: (N,).
        unit: (N,), each on one side only; None where each row is its own.
    """
    total, covariance = _dealt(stats.rankdata(score)[:, None], is_new, unit)
    return float(total[0] / math.sqrt(covariance[0, 0])) if covariance[0, 0] > 0 else 0.0


def column_p_value(values: Floats, is_category: bool, is_new: Bools, unit: Ints | None = None) -> float:
    """Whether a column's distribution differs between the sides: probability of as much, or more, without shift.

    Scores of each row (categories and missing values as indicators; numbers as the first three Legendre polynomials
    of their rank: place, spread, skew) are summed over the new side and compared to what dealing the units at random
    gives: chi-squared. For categories and single rows this is Pearson's test.

    Args:
        values: (N,); NaN is missing.
        is_category: whether values are codes.
        is_new: (N,).
        unit: as in `z_score`.

    Source: smooth tests, Neyman 1937; permutation moments of linear statistics, Strasser & Weber 1999.
    """
    number = is_new.size if unit is None else int(unit.max()) + 1
    sides = np.unique(unit[is_new]).size if unit is not None else int(is_new.sum())
    most = max(1, min(sides, number - sides) // 5)
    scores = _scores(values, is_category, most)
    total, covariance = _dealt(scores, is_new, unit)
    variances = np.diagonal(covariance)
    held = variances > 1e-12 * max(float(variances.max(initial=0)), 1e-300)
    if not held.any():
        return 1.0
    total, covariance = total[held], covariance[np.ix_(held, held)]
    scale = 1 / np.sqrt(np.diagonal(covariance))
    eigenvalues, vectors = np.linalg.eigh(covariance * np.outer(scale, scale))
    kept = eigenvalues > 1e-8 * eigenvalues.max()
    parts = (vectors[:, kept].T @ (total * scale)) ** 2 / eigenvalues[kept]
    return float(stats.chi2.sf(parts.sum(), kept.sum()))


def benjamini_hochberg(p_values: list[float]) -> list[float]:
    """q-values: the smallest false discovery rate at which each would be a discovery.

    Example:
        >>> [round(q, 3) for q in benjamini_hochberg([0.01, 0.04, 0.03, 0.5])]
        [0.04, 0.053, 0.053, 0.5]
    """
    return [float(q) for q in stats.false_discovery_control(p_values)] if p_values else []


def _dealt(scores: Floats, is_new: Bools, unit: Ints | None) -> tuple[Floats, Floats]:
    """Sum of centred `scores`, (N, D), over the new side, (D,), and its covariance over random labels, (D, D)."""
    centred = scores - scores.mean(axis=0)
    if unit is None:
        sums, labels = centred, is_new
    else:
        number = int(unit.max()) + 1
        sums = np.column_stack([np.bincount(unit, column, number) for column in centred.T])
        labels = np.zeros(number, dtype=bool)
        labels[unit] = is_new
        present = np.bincount(unit, minlength=number) > 0
        sums, labels = sums[present], labels[present]
    n, new = labels.size, int(labels.sum())
    factor = new * (n - new) / (n * (n - 1)) if n > 1 else 0.0
    return sums[labels].sum(axis=0), factor * (sums.T @ sums)


def _scores(values: Floats, is_category: bool, most: int) -> Floats:
    missing = np.isnan(values)
    found, codes, counts = np.unique(values[~missing], return_inverse=True, return_counts=True)
    columns: list[Floats] = []
    if is_category or found.size <= _FEW_VALUES:
        # Rare categories share an indicator: chi-squared needs about 5 expected rows on each side.
        frequent = np.argsort(-counts, kind="stable")[: max(most - 1, 1)]
        for code in frequent[counts[frequent] >= 10]:
            column = np.zeros(values.size)
            column[~missing] = codes == code
            columns.append(column)
    else:
        place = np.zeros(values.size)
        place[~missing] = 2 * (stats.rankdata(values[~missing]) - 0.5) / max((~missing).sum(), 1) - 1
        polynomials = (place, (3 * place**2 - 1) / 2, (5 * place**3 - 3 * place) / 2)
        columns += [np.where(missing, 0.0, polynomial) for polynomial in polynomials[:most]]
    columns.append(missing.astype(float))
    return np.column_stack(columns)
