"""Types of shift: what has changed, the inputs, the target, or how one depends on the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

from batchnorm.shift.boosting import Boosting
from batchnorm.shift.encoding import Encoded
from batchnorm.shift.significance import Dealing

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

TypeName: TypeAlias = Literal[
    "none",
    "covariate",
    "prior",
    "concept",
    "covariate and concept",
    "covariate or prior",
    "cannot be told without labels",
    "cannot be told without overlap",
]

_OVERLAP = 0.05
"""Mass that the sides must share for their targets to be compared."""

_CLASSES = 5
"""Classes of a categorical target that are looked at, the most frequent ones; strata of a numeric one."""

_TREES = 80


@dataclass(frozen=True)
class ShiftType:
    """What kind of shift it is, and the four tests behind the answer.

    Attributes:
        name: "covariate": p(x) changes and p(y|x) stays. "prior": p(y) changes and p(x|y) stays. "concept": p(y|x)
            changes and p(x) stays. "covariate or prior": either explains the rows. "cannot be told without overlap":
            the sides share so few inputs that targets cannot be compared for the same ones. See `decide`.
        inputs: p-value of "p(x) is the same"; None where there was no test.
        target: of "p(y) is the same".
        target_given_inputs: of "p(y|x) is the same".
        inputs_given_target: of "p(x|y) is the same".
    """

    name: TypeName
    inputs: float | None = None
    target: float | None = None
    target_given_inputs: float | None = None
    inputs_given_target: float | None = None


UNKNOWN = ShiftType("cannot be told without labels")


def decide(
    inputs: float, target: float, target_given_inputs: float, inputs_given_target: float, overlap: float = 1.0
) -> ShiftType:
    """The type that follows from the four p-values at 5 %, the two conditional ones at 2.5 % each, and the overlap.

    Example:
        >>> decide(0.001, 0.2, 0.6, 0.001).name
        'covariate'
    """
    level = 0.05
    x, y = inputs < level, target < level
    y_given_x, x_given_y = target_given_inputs < level / 2, inputs_given_target < level / 2
    name: TypeName
    if overlap < _OVERLAP:
        name = "cannot be told without overlap"
    elif not (x or y or y_given_x):
        name = "none"
    elif y and not x_given_y:
        name = "prior" if y_given_x or not x else "covariate or prior"
    elif y_given_x:
        name = "covariate and concept" if x else "concept"
    else:
        name = "covariate" if x else "none"
    return ShiftType(name, inputs, target, target_given_inputs, inputs_given_target)


def target_given_inputs(data: Encoded, target: Floats, is_class: bool, fold: Ints, unit: Ints | None) -> float:
    """p-value of "the target depends on the inputs as before".

    For a model f of the target and a model e of the side, both cross-fitted on both sides' rows, the products
    (y - f(x)) (side - e(x)) have mean 0 exactly where y and side are independent given x. A second product, weighted by
    what models of either side alone say differently of x, finds changes of opposite sign.

    Args:
        data: rows of both sides.
        target: (N,); rows with NaN are left out.
        is_class: whether `target` holds codes of classes.
        fold: (N,).
        unit: (N,) or None.

    Source: generalised covariance measure, Shah & Peters 2020; weights, Scheidegger et al. 2022.
    """
    kept = ~np.isnan(target)
    x, y, side, folds = data.values[kept], target[kept], data.is_new[kept], fold[kept]
    columns = _indicators(y) if is_class else y[:, None]
    chance = _cross_fitted(x, side.astype(float), folds, data.is_category, is_class=True)
    products = []
    for column in columns.T:
        guess = _cross_fitted(x, column, folds, data.is_category, is_class=is_class)
        old, new = (
            _cross_fitted(x, column, folds, data.is_category, is_class=is_class, learned=which)
            for which in (~side, side)
        )
        product = (column - guess) * (side - chance)
        products += [product, product * (new - old - (new - old).mean())]
    return _mean_is_zero(np.column_stack(products), None if unit is None else unit[kept])


def inputs_given_target(data: Encoded, target: Floats, is_class: bool, fold: Ints, unit: Ints | None) -> float:
    """p-value of "within each class (or fifth of a numeric target) the inputs are distributed as before".

    The forward test of `classifier.joint`, with the ranks of each stratum among themselves. Arguments as above.
    """
    kept = ~np.isnan(target)
    x, y, side, folds = data.values[kept], target[kept], data.is_new[kept], fold[kept]
    strata = _strata(y, is_class)
    balance = np.ones(side.size)
    for stratum in np.unique(strata):
        for which in (True, False):
            cell = (strata == stratum) & (side == which)
            balance[cell] = 1 / max(cell.sum(), 1)
    total, square = 0.0, 0.0
    for k in range(1, int(fold.max()) + 1):
        before, held = folds < k, folds == k
        if np.unique(side[before]).size < 2:
            continue
        weight = balance[before] / balance[before].mean()
        model = Boosting(
            x[before], side[before], is_class=True, is_category=data.is_category, weight=weight, trees=_TREES
        )
        score = model.probabilities(x[held])[:, 1]
        for rows in _comparable(strata[held], side[held], None if unit is None else unit[kept][held]):
            labels = side[held][rows]
            part = math.sqrt(k * labels.sum() * (labels.size - labels.sum()) / labels.size)
            ranks = _ranks(score[rows], strata[held][rows])
            total += part * Dealing(labels, None if unit is None else unit[kept][held][rows]).z(ranks)
            square += part**2
    return float(stats.norm.sf(total / math.sqrt(square))) if square else 1.0


def _comparable(strata: Ints, side: Bools, unit: Ints | None) -> list[Ints]:
    """Rows of each stratum that has 3 rows of both sides; of all these together where units may be in several."""
    found = [np.flatnonzero(strata == one) for one in np.unique(strata)]
    found = [rows for rows in found if 3 <= side[rows].sum() <= rows.size - 3]
    return found if unit is None or not found else [np.concatenate(found)]


def _ranks(score: Floats, strata: Ints) -> Floats:
    """Ranks within each stratum, from -0.5 to 0.5."""
    found = np.empty(score.size)
    for one in np.unique(strata):
        rows = strata == one
        found[rows] = (stats.rankdata(score[rows]) - 0.5) / rows.sum() - 0.5
    return found


def _mean_is_zero(values: Floats, unit: Ints | None) -> float:
    """Hotelling's test with rows of a unit summed; chi-squared by its F distribution."""
    sums = values if unit is None else np.column_stack([np.bincount(unit, column) for column in values.T])
    if unit is not None:
        sums = sums[np.bincount(unit) > 0]
    spread = sums.std(axis=0)
    sums = sums[:, spread > 1e-12 * max(float(spread.max(initial=0)), 1e-300)]
    n, d = sums.shape
    if d == 0 or n <= d + 1:
        return 1.0
    mean = sums.mean(axis=0)
    covariance = np.atleast_2d(np.cov(sums, rowvar=False)) + 1e-10 * np.diag(sums.var(axis=0))
    t2 = n * float(mean @ np.linalg.solve(covariance, mean))
    return float(stats.f.sf(t2 * (n - d) / (d * (n - 1)), d, n - d))


def _cross_fitted(
    x: Floats, y: Floats, fold: Ints, is_category: Bools, *, is_class: bool, learned: Bools | None = None
) -> Floats:
    """What models say of each fold that have learned from the others; only from the rows `learned`, (N,), if given."""
    found = np.zeros(y.size)
    for k in np.unique(fold):
        held = fold == k
        rest = ~held if learned is None else ~held & learned
        if np.unique(y[rest]).size < 2:
            found[held] = y[rest].mean() if rest.any() else 0.0
            continue
        model = Boosting(x[rest], y[rest], is_class=is_class, is_category=is_category, trees=_TREES)
        found[held] = model.probabilities(x[held])[:, 1] if is_class else model.predict(x[held])
    return found


def _indicators(codes: Floats) -> Floats:
    """(N, classes - 1 or fewer): the most frequent classes but one."""
    found, counts = np.unique(codes, return_counts=True)
    frequent = found[np.argsort(-counts, kind="stable")][:_CLASSES]
    if frequent.size == found.size and frequent.size > 1:
        frequent = frequent[1:]
    return np.column_stack([(codes == one).astype(float) for one in frequent])


def _strata(target: Floats, is_class: bool) -> Ints:
    if is_class:
        return target.astype(np.int64)
    edges = np.unique(np.quantile(target, np.linspace(0, 1, 4 * _CLASSES + 1)[1:-1]))
    return np.searchsorted(edges, target, side="left").astype(np.int64)
