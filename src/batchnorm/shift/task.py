"""The model that stands for the user's own: gradient boosting of a target, and its loss on each row."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def fitted(x: Floats, y: Floats, *, is_class: bool, is_category: Bools, sample_weight: Floats | None = None) -> Any:
    """A model of `y`, (N,) codes of classes or numbers, from `x`, (N, D)."""
    kind = HistGradientBoostingClassifier if is_class else HistGradientBoostingRegressor
    model = kind(
        max_iter=100,
        max_leaf_nodes=15,
        min_samples_leaf=min(20, max(2, y.size // 20)),
        early_stopping=False,
        categorical_features=is_category if is_category.any() else None,
        random_state=0,
    )
    return model.fit(x, y, sample_weight=sample_weight)


def losses(model: Any, x: Floats, y: Floats, *, is_class: bool) -> Floats:
    """The loss of each row, (N,): squared error, or -log of the probability of the right class."""
    if not is_class:
        return np.asarray((model.predict(x) - y) ** 2, dtype=np.float64)
    probability = model.predict_proba(x)
    place = np.searchsorted(model.classes_, y)
    known = (place < model.classes_.size) & (model.classes_[np.minimum(place, model.classes_.size - 1)] == y)
    # A class that the model never saw costs what a sure mistake costs.
    right = np.where(known, probability[np.arange(y.size), np.minimum(place, model.classes_.size - 1)], 0.0)
    return -np.log(np.maximum(right, 1e-6))
