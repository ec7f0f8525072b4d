"""The model that stands for the user's own: gradient boosting of a target, and its loss on each row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from batchnorm.shift.boosting import Boosting

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def fitted(
    x: Floats, y: Floats, *, is_class: bool, is_category: Bools, sample_weight: Floats | None = None
) -> Boosting:
    """A model of `y`, (N,) codes of classes or numbers, from `x`, (N, D)."""
    return Boosting(
        x, y, is_class=is_class, is_category=is_category, weight=sample_weight, trees=100, leaves=15, ridge=0.0
    )


def losses(model: Boosting, x: Floats, y: Floats, *, is_class: bool) -> Floats:
    """The loss of each row, (N,): squared error, or -log of the probability of the right class."""
    if not is_class:
        return (model.predict(x) - y) ** 2
    probability = model.probabilities(x)
    place = np.searchsorted(model.classes, y)
    known = (place < model.classes.size) & (model.classes[np.minimum(place, model.classes.size - 1)] == y)
    # A class that the model never saw costs what a sure mistake costs.
    right = np.where(known, probability[np.arange(y.size), np.minimum(place, model.classes.size - 1)], 0.0)
    return -np.log(np.maximum(right, 1e-6))
