"""Gradient boosting as everything here uses it: of scikit-learn, without early stopping, whatever the columns hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from batchnorm.shift.encoding import quantile_edges

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
_BINS = 255
"""As many as scikit-learn's own."""


class Boosting:
    """A fitted model of `y` from `x`.

    Columns without any value in these rows are left out: scikit-learn's binning breaks on them. Numbers are put into
    bins here: where rows have weights, scikit-learn takes longer for that than for the trees.

    Args:
        x: (N, D), NaN where missing, codes of categories.
        y: (N,): numbers, or classes.
        is_class: whether y holds classes.
        is_category: (D,): which columns hold codes.
        weight: (N,), of the rows; None weighs them alike.
        trees: number of them.
        leaves: of each tree.
        ridge: penalty of the leaves' values.
        seed: of the model.
    """

    def __init__(
        self,
        x: Floats,
        y: Any,
        *,
        is_class: bool,
        is_category: Bools | None = None,
        weight: Floats | None = None,
        trees: int = 60,
        leaves: int = 8,
        ridge: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._held: Bools = np.asarray(~np.isnan(x).all(axis=0))
        categories = None if is_category is None else is_category[self._held]
        kind = HistGradientBoostingClassifier if is_class else HistGradientBoostingRegressor
        self._model = kind(
            max_iter=trees,
            max_leaf_nodes=leaves,
            min_samples_leaf=min(20, max(2, len(x) // 20)),
            l2_regularization=ridge,
            early_stopping=False,
            categorical_features=categories if categories is not None and categories.any() else None,
            random_state=seed,
        )
        if not self._held.any():
            self._held[:] = True
            x = np.zeros_like(x)
        numbers = self._held if is_category is None else self._held & ~is_category
        self._edges = {int(column): quantile_edges(x[:, column], _BINS) for column in np.flatnonzero(numbers)}
        self._model.fit(self._binned(x), y, sample_weight=weight)

    def _binned(self, x: Floats) -> Floats:
        codes = x.copy()
        for column, edges in self._edges.items():
            codes[:, column] = np.searchsorted(edges, x[:, column], side="left")
        return np.asarray(np.where(np.isnan(x), np.nan, codes)[:, self._held])

    @property
    def classes(self) -> Any:
        """The classes, ascending."""
        return self._model.classes_

    def predict(self, x: Floats) -> Floats:
        """(N,): expected values; only where y held numbers."""
        return np.asarray(self._model.predict(self._binned(x)), dtype=np.float64)

    def probabilities(self, x: Floats) -> Floats:
        """(N, classes)."""
        return np.asarray(self._model.predict_proba(self._binned(x)), dtype=np.float64)

    def log_odds(self, x: Floats) -> Floats:
        """(N,): of the second of two classes."""
        return np.asarray(self._model.decision_function(self._binned(x)), dtype=np.float64)
