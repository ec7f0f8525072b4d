"""Importance weights: p_new(x) / p_old(x) for rows of the old side, by four estimators with scikit-learn's manners."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from batchnorm.errors import ArgumentError
from batchnorm.shift.boosting import Boosting
from batchnorm.shift.units import folds as dealt

if TYPE_CHECKING:
    from typing_extensions import Self

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_WIDTHS = (0.3, 0.6, 1.0, 2.0)
"""Kernel widths that are tried, in units of the median distance of the rows."""

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


class _Ratio(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """What the estimators share: `y` says which side a row is of, 0 old and 1 new."""

    seed: int
    _folds = 3

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:  # noqa: N803
        """Estimates the ratio.

        Args:
            X: rows of both sides, (N, D), without missing values (but see ClassifierRatio).
            y: (N,), 0 or False for the old side, 1 or True for the new one.
            groups: (N,), integers: rows of one group are never in different folds; None where each is its own.

        Raises:
            ArgumentError: y or groups holds other values, or a side has fewer than 6 rows or groups.
        """
        x = validate_data(self, X, dtype=np.float64, ensure_all_finite=self._finite())
        sides = np.asarray(y)
        if sides.shape != (x.shape[0],) or not np.isin(sides, (0, 1)).all():
            raise ArgumentError(f"y must say the side of each of the {x.shape[0]} rows: 0 (old) or 1 (new)")
        is_new = sides.astype(bool)
        unit = None if groups is None else np.asarray(groups)
        if unit is not None and (unit.shape != sides.shape or not np.issubdtype(unit.dtype, np.integer)):
            raise ArgumentError(f"groups must be {x.shape[0]} integers, got {unit.dtype} of shape {unit.shape}")
        # Few folds are enough to choose a width by; gradient boosting learns more from its rows.
        folds = dealt(unit, is_new, self._folds, self.seed)
        self._fit(x[~is_new], x[is_new], folds[~is_new], folds[is_new])
        return self

    def transform(self, X: Any) -> Floats:  # noqa: N803
        """The ratio of each row, (N, 1): as a column, so that it can stand in a Pipeline."""
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False, ensure_all_finite=self._finite())
        return np.maximum(self._ratio(x), 0.0)[:, None]

    def sample_weight(self, X: Any) -> Floats:  # noqa: N803
        """The ratio of each row of the old side, (N,), scaled to mean 1: what `fit(sample_weight=...)` takes."""
        ratio = self.transform(X)[:, 0]
        mean = ratio.mean()
        return ratio / mean if mean > 0 else np.ones_like(ratio)

    def _finite(self) -> bool | str:
        return True

    def _fit(self, old: Floats, new: Floats, folds_old: Ints, folds_new: Ints) -> None:
        raise NotImplementedError

    def _ratio(self, x: Floats) -> Floats:
        raise NotImplementedError


class ClassifierRatio(_Ratio):
    """The odds of a calibrated domain classifier (gradient boosting), clipped; takes NaN.

    Args:
        clip: ratios are kept within [1/clip, clip].
        seed: of the model.

    Source: Bickel, Brueckner & Scheffer 2009.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> x = np.concatenate([rng.normal(0, 1, 500), rng.normal(1, 1, 500)])[:, None]
        >>> weights = ClassifierRatio().fit(x, np.arange(1000) >= 500).sample_weight([[-1.0], [2.0]])
        >>> bool(weights[1] > 4 * weights[0])
        True
    """

    _folds = 5

    def __init__(self, clip: float = 50.0, seed: int = 0) -> None:
        self.clip = clip
        self.seed = seed

    def _finite(self) -> bool | str:
        return "allow-nan"

    def _fit(self, old: Floats, new: Floats, folds_old: Ints, folds_new: Ints) -> None:
        x, y = np.vstack([old, new]), np.arange(len(old) + len(new)) >= len(old)
        weight = np.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
        score, fold = np.empty(len(x)), np.concatenate([folds_old, folds_new])
        for k in np.unique(fold):
            rest, held = fold != k, fold == k
            score[held] = self._model(x[rest], y[rest], weight[rest]).log_odds(x[held])
        # Out of fold, the log-odds are too steep where the model has learned by heart: one slope puts that right.
        self.slope_ = _slope(score, y)
        self.model_ = self._model(x, y, weight)

    def _model(self, x: Floats, y: npt.NDArray[np.bool_], weight: Floats) -> Boosting:
        return Boosting(x, y, is_class=True, weight=weight, seed=self.seed)

    def _ratio(self, x: Floats) -> Floats:
        return np.asarray(np.clip(np.exp(self.slope_ * self.model_.log_odds(x)), 1 / self.clip, self.clip))


class RuLSIF(_Ratio):
    """Least squares for the relative ratio p_new / (alpha p_new + (1 - alpha) p_old), which never exceeds 1 / alpha.

    Gaussian kernels at rows of the new side; width and ridge by cross-validation of the same squared error.

    Args:
        alpha: 0 is the plain ratio (uLSIF).
        kernels: number of kernels.
        seed: of the choice of centres and folds.

    Source: Yamada et al. 2013.
    """

    def __init__(self, alpha: float = 0.1, kernels: int = 100, seed: int = 0) -> None:
        self.alpha = alpha
        self.kernels = kernels
        self.seed = seed

    def _fit(self, old: Floats, new: Floats, folds_old: Ints, folds_new: Ints) -> None:
        if not 0 <= self.alpha < 1:
            raise ArgumentError(f"alpha must be at least 0 and below 1, got {self.alpha!r}")
        rng = np.random.default_rng(self.seed)
        self.centres_ = _centres(new, self.kernels, rng)
        median = _median_distance(old, new, rng)
        best = np.inf
        for width in _WIDTHS:
            k_old, k_new = (_kernel(side, self.centres_, width * median) for side in (old, new))
            for ridge in _RIDGES:
                error = 0.0
                for fold in np.unique(folds_new):
                    theta = self._solved(k_old[folds_old != fold], k_new[folds_new != fold], ridge)
                    error += self._error(k_old[folds_old == fold] @ theta, k_new[folds_new == fold] @ theta)
                if error < best:
                    best, self.width_, self.ridge_ = error, width * median, ridge
        k_old, k_new = (_kernel(side, self.centres_, self.width_) for side in (old, new))
        self.theta_ = self._solved(k_old, k_new, self.ridge_)

    def _solved(self, k_old: Floats, k_new: Floats, ridge: float) -> Floats:
        gram = self.alpha * k_new.T @ k_new / len(k_new) + (1 - self.alpha) * k_old.T @ k_old / len(k_old)
        theta = np.linalg.solve(gram + ridge * np.eye(len(gram)), k_new.mean(axis=0))
        return np.maximum(theta, 0.0)

    def _error(self, r_old: Floats, r_new: Floats) -> float:
        squares = self.alpha * (r_new**2).mean() + (1 - self.alpha) * (r_old**2).mean()
        return float(squares / 2 - r_new.mean())

    def _ratio(self, x: Floats) -> Floats:
        return _kernel(x, self.centres_, self.width_) @ self.theta_


class ULSIF(RuLSIF):
    """Least squares for the plain ratio: RuLSIF with alpha = 0, which has no upper bound.

    Args:
        kernels: number of kernels.
        seed: of the choice of centres and folds.

    Source: Kanamori, Hido & Sugiyama 2009.
    """

    def __init__(self, kernels: int = 100, seed: int = 0) -> None:
        super().__init__(alpha=0.0, kernels=kernels, seed=seed)


class KLIEP(_Ratio):
    """The ratio that makes the weighted old side nearest to the new one, by Kullback-Leibler divergence.

    Maximises the mean log ratio over the new side, with mean ratio 1 over the old one; width by cross-validation.

    Args:
        kernels: number of kernels.
        steps: of the multiplicative updates.
        seed: of the choice of centres and folds.

    Source: Sugiyama et al. 2008. The paper ascends the gradient and projects; here the same optimum is reached by the
        EM updates of the mixture p_new = sum_j w_j K_j p_old / z_j, which need no step size.
    """

    def __init__(self, kernels: int = 100, steps: int = 200, seed: int = 0) -> None:
        self.kernels = kernels
        self.steps = steps
        self.seed = seed

    def _fit(self, old: Floats, new: Floats, folds_old: Ints, folds_new: Ints) -> None:
        rng = np.random.default_rng(self.seed)
        self.centres_ = _centres(new, self.kernels, rng)
        median = _median_distance(old, new, rng)
        best = -np.inf
        for width in _WIDTHS:
            k_old, k_new = (_kernel(side, self.centres_, width * median) for side in (old, new))
            score = 0.0
            for fold in np.unique(folds_new):
                theta = self._solved(k_old, k_new[folds_new != fold])
                score += float(np.log(np.maximum(k_new[folds_new == fold] @ theta, 1e-12)).sum())
            if score > best:
                best, self.width_ = score, width * median
        k_old, k_new = (_kernel(side, self.centres_, self.width_) for side in (old, new))
        self.theta_ = self._solved(k_old, k_new)

    def _solved(self, k_old: Floats, k_new: Floats) -> Floats:
        mass = np.maximum(k_old.mean(axis=0), 1e-12)
        parts = k_new / mass  # each a density ratio with mean 1 over the old side
        share = np.full(len(mass), 1 / len(mass))
        for _ in range(self.steps):
            whole = np.maximum(parts @ share, 1e-300)
            share = share * (parts / whole[:, None]).mean(axis=0)
            share /= max(share.sum(), 1e-300)
        return np.asarray(share / mass)

    def _ratio(self, x: Floats) -> Floats:
        return _kernel(x, self.centres_, self.width_) @ self.theta_


def effective_sample_size(weights: Floats) -> float:
    """(sum w)^2 / sum w^2 / N: the share of the rows that equal weights would need for the same variance.

    1 is equal weights, also where they are equal because all were clipped: look at the overlap, too.

    Example:
        >>> import numpy as np
        >>> effective_sample_size(np.array([1.0, 1.0, 0.0, 0.0]))
        0.5
    """
    squares = float((weights**2).sum())
    return float(weights.sum()) ** 2 / squares / weights.size if squares else 0.0


def _slope(score: Floats, y: npt.NDArray[np.bool_]) -> float:
    """Newton's method for the slope of a logistic regression through 0, each side weighing the same; within [0, 1]."""
    weight = np.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    slope = 1.0
    for _ in range(20):
        chance = 1 / (1 + np.exp(-np.clip(slope * score, -30, 30)))
        gradient = float((weight * (y - chance) * score).sum())
        curvature = float((weight * chance * (1 - chance) * score**2).sum()) + 1e-9
        slope = float(np.clip(slope + gradient / curvature, 0.0, 1.0))
    return slope


def _centres(new: Floats, number: int, rng: np.random.Generator) -> Floats:
    return new[rng.permutation(len(new))[:number]]


def _median_distance(old: Floats, new: Floats, rng: np.random.Generator) -> float:
    both = np.vstack([old, new])
    some = both[rng.permutation(len(both))[:500]]
    distances = cdist(some, some)
    positive = distances[distances > 0]
    return float(np.median(positive)) if positive.size else 1.0


def _kernel(x: Floats, centres: Floats, width: float) -> Floats:
    return np.asarray(np.exp(-cdist(x, centres, "sqeuclidean") / (2 * width**2)))
