"""How much a model of the target needs each column: those that drift and do not matter may be left alone or dropped."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from batchnorm.shift.encoding import Encoded
from batchnorm.shift.task import fitted, losses

Floats = npt.NDArray[np.float64]

_FEWEST = 20


def importances(data: Encoded, target: str, seed: int = 0) -> dict[str, float]:
    """By how much the error of a model grows when a column is shuffled, as a share of the error; 0 is not at all.

    A model learns on one half of the rows that have a target, and is asked about the other.

    Args:
        data: rows of the reference, with the target among the columns.
        target: its name.
        seed: of halves and shuffling.

    Returns:
        name -> importance; empty with fewer than 20 rows or a constant target.

    Source: permutation importance, Breiman 2001, section 10.
    """
    inputs = data.only([name for name in data.names if name != target])
    index = data.names.index(target)
    y, is_class = data.values[:, index], bool(data.is_category[index])
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.flatnonzero(~np.isnan(y)))
    train, test = rows[: rows.size // 2], rows[rows.size // 2 :]
    if rows.size < _FEWEST or np.unique(y[train]).size < 2:
        return {}
    model = fitted(inputs.values[train], y[train], is_class=is_class, is_category=inputs.is_category)
    held = inputs.values[test]
    error = losses(model, held, y[test], is_class=is_class).mean()
    found = {}
    for column, name in enumerate(inputs.names):
        shuffled = held.copy()
        shuffled[:, column] = rng.permutation(shuffled[:, column])
        grown = losses(model, shuffled, y[test], is_class=is_class).mean() - error
        found[name] = float(max(grown / max(error, 1e-12), 0.0))
    return found
