"""Tests that stay calibrated where rows come in groups: labels are dealt to whole units, and to nothing smaller."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_FEW_VALUES = 12
"""Different values up to which a number is tested as categories are."""

_DRAWS = 1999
_NUMBERS = 2 * 10**7
"""Labels that are drawn at most: fewer draws where there are many units."""

_TAIL = 20
"""Draws above a value from which on their share is its p-value; beyond, the tail is chi-squared's."""


class Dealing:
    """The labels of the sides, and what dealing them at random gives: the distribution of a score without shift.

    Units that lie on one side exchange their labels. A unit with rows of both sides (a patient seen before and after)
    is its own control: the difference within it counts, and nothing else of it; its sign is dealt.

    With a_g the sum of centred scores of the rows of one-sided unit g of G, G1 of them new, and d_g the difference of
    the other units' sides, S = sum over the new a_g + sum d_g has mean 0 and variance
    G1 (G - G1) / (G (G - 1)) sum(a_g^2) + sum(d_g^2). The tails are those of 1999 draws.

    Args:
        is_new: (N,).
        unit: (N,): numbers of groups or blocks; None where each row is its own.
        seed: of the draws.

    Source: permutation moments of linear statistics, Strasser & Weber 1999.
    """

    def __init__(self, is_new: Bools, unit: Ints | None = None, seed: int = 0) -> None:
        self._is_new, self._seed = is_new, seed
        self._unit: Ints | None = None
        self._labels: Bools = is_new
        self._two_sided: Bools = np.zeros(0, dtype=bool)
        if unit is not None:
            self._unit = np.unique(unit, return_inverse=True)[1]
            number = int(self._unit.max(initial=-1)) + 1
            self._rows = np.stack([np.bincount(self._unit[side], minlength=number) for side in (~is_new, is_new)])
            self._two_sided = np.asarray((self._rows > 0).all(axis=0))
            self._labels = self._rows[1, ~self._two_sided] > 0

    @property
    def fewer(self) -> int:
        """Units of the side that has fewer."""
        new = int(self._labels.sum())
        return min(new, self._labels.size - new) + int(self._two_sided.sum())

    def z(self, score: Floats) -> float:
        """How much higher the new side's ranks are than by dealing, in deviations: Mann-Whitney's z, with ties.

        Args:
            score: (N,), any scale.
        """
        parts, differences = self._sums(stats.rankdata(score)[:, None])
        total, covariance = self._moments(parts, differences)
        return float(total[0] / np.sqrt(covariance[0, 0])) if covariance[0, 0] > 0 else 0.0

    def chance_of_as_high(self, score: Floats) -> float:
        """The p-value of the new side's ranks being higher: uniform in (0, 1) without shift, as ties are drawn, too."""
        parts, differences = self._sums(stats.rankdata(score)[:, None] / score.size)
        total = self._moments(parts, differences)[0][0]
        drawn = self._drawn(parts, differences)[:, 0]
        near = 1e-5 * max(float(np.abs(drawn).max()), 1e-300)
        above, same = (drawn > total + near).sum(), (np.abs(drawn - total) <= near).sum()
        place = np.random.default_rng((self._seed, 1)).uniform(1e-6, 1)
        return float((above + place * (same + 1)) / (drawn.size + 1))

    def p_value(self, scores: Floats) -> float:
        """The chance of sums of the `scores`, (N, D), being as far from 0, in units of their covariance, or farther."""
        parts, differences = self._sums(scores)
        total, covariance = self._moments(parts, differences)
        variances = np.diagonal(covariance)
        held = variances > 1e-12 * max(float(variances.max(initial=0)), 1e-300)
        if not held.any():
            return 1.0
        scale = 1 / np.sqrt(variances[held])
        eigenvalues, vectors = np.linalg.eigh(covariance[np.ix_(held, held)] * np.outer(scale, scale))
        kept = eigenvalues > 1e-8 * eigenvalues.max()
        axes = scale[:, None] * vectors[:, kept] / np.sqrt(eigenvalues[kept])
        distance = float(((total[held] @ axes) ** 2).sum())
        drawn = (self._drawn(parts[:, held] @ axes, differences[:, held] @ axes) ** 2).sum(axis=1)
        as_far = int((drawn >= distance * (1 - 1e-4)).sum())
        if as_far >= _TAIL:
            return float((as_far + 1) / (drawn.size + 1))
        freedom, threshold = int(kept.sum()), float(np.partition(drawn, -_TAIL)[-_TAIL])
        beyond = stats.chi2.sf(distance, freedom) / max(stats.chi2.sf(threshold, freedom), 1e-300)
        return float(max(_TAIL / drawn.size * min(float(beyond), 1.0), as_far / drawn.size))

    def _sums(self, scores: Floats) -> tuple[Floats, Floats]:
        """Of each one-sided unit the centred sum, (G, D), and of the others the difference of their sides."""
        if self._unit is None:
            return scores - scores.mean(axis=0), np.zeros((0, scores.shape[1]))
        number = self._rows.shape[1]
        sums = np.stack(
            [
                np.column_stack([np.bincount(self._unit[side], column[side], number) for column in scores.T])
                for side in (~self._is_new, self._is_new)
            ]
        )
        one, two = ~self._two_sided, self._two_sided
        rows = self._rows[:, one].sum(axis=0)[:, None]
        parts = sums[:, one].sum(axis=0)
        parts = parts - rows * (parts.sum(axis=0) / max(rows.sum(), 1))
        old, new = self._rows[:, two][..., None]
        return parts, (sums[1, two] * old - sums[0, two] * new) / np.maximum(old + new, 1)

    def _moments(self, parts: Floats, differences: Floats) -> tuple[Floats, Floats]:
        n, new = self._labels.size, int(self._labels.sum())
        factor = new * (n - new) / (n * (n - 1)) if n > 1 else 0.0
        total = parts[self._labels].sum(axis=0) + differences.sum(axis=0)
        return total, factor * (parts.T @ parts) + differences.T @ differences

    def _drawn(self, parts: Floats, differences: Floats) -> Floats:
        labels, signs = self._draws
        drawn = labels @ parts.astype(np.float32) + signs @ differences.astype(np.float32)
        return drawn.astype(np.float64)

    @cached_property
    def _draws(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        number = self._labels.size + int(self._two_sided.sum())
        draws = min(_DRAWS, max(_NUMBERS // max(number, 1), 199))
        rng = np.random.default_rng((self._seed, 0))
        labels = rng.permuted(np.tile(self._labels.astype(np.float32), (draws, 1)), axis=1)
        return labels, rng.choice(np.array([-1, 1], dtype=np.float32), (draws, int(self._two_sided.sum())))


def column_p_value(values: Floats, is_category: bool, dealing: Dealing) -> float:
    """Whether a column's distribution differs between the sides: probability of as much, or more, without shift.

    Scores of each row (categories and missing values as indicators; numbers as the first three Legendre polynomials
    of their rank: place, spread, skew) are summed over the new side and compared to what dealing the units at random
    gives. For categories and single rows the distance is Pearson's.

    Args:
        values: (N,); NaN is missing.
        is_category: whether values are codes.
        dealing: of the rows' labels.

    Source: smooth tests, Neyman 1937.
    """
    return dealing.p_value(_scores(values, is_category, max(1, dealing.fewer // 5)))


def benjamini_hochberg(p_values: list[float]) -> list[float]:
    """q-values: the smallest false discovery rate at which each would be a discovery.

    Example:
        >>> [round(q, 3) for q in benjamini_hochberg([0.01, 0.04, 0.03, 0.5])]
        [0.04, 0.053, 0.053, 0.5]
    """
    return [float(q) for q in stats.false_discovery_control(p_values)] if p_values else []


def _scores(values: Floats, is_category: bool, most: int) -> Floats:
    missing = np.isnan(values)
    found, codes, counts = np.unique(values[~missing], return_inverse=True, return_counts=True)
    columns: list[Floats] = []
    if is_category or found.size <= _FEW_VALUES:
        # Rare categories go together, as what no indicator is for: alone each says little and costs a degree.
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
