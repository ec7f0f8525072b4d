"""Units: what may be dealt to either side on its own: rows, groups, or blocks of time."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from batchnorm.errors import ArgumentError

_SECONDS = {"s": 1, "min": 60, "h": 3600, "D": 86_400, "W": 7 * 86_400}
_FEWEST = 3
"""Units of a side in each fold that a test needs at least."""

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def block_seconds(text: str) -> float:
    """The length of a block in seconds.

    Args:
        text: a number and a unit: s, min, h, D or W.

    Raises:
        ArgumentError: it is something else.

    Example:
        >>> block_seconds("7D")
        604800.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h|D|W)", text.strip())
    if not found or not float(found[1]):
        raise ArgumentError(f"block must be a number and one of {', '.join(_SECONDS)}, as in 7D; got {text!r}")
    return float(found[1]) * _SECONDS[found[2]]


def distinct_per_side(unit: Ints, is_new: Bools) -> Ints:
    """Units for tests: one that has rows of both sides is cut in two. Numbered from 0, (N,)."""
    _, numbers = np.unique(unit * 2 + is_new, return_inverse=True)
    return numbers.astype(np.int64)


def folds(unit: Ints | None, is_new: Bools, number: int, seed: int) -> Ints:
    """A fold for each row, (N,): no unit is in two, and both sides are spread over all.

    Fewer folds where a side has few units.

    Args:
        unit: (N,), or None where each row is its own.
        is_new: (N,).
        number: of folds at most.
        seed: of the dealing.

    Raises:
        ArgumentError: a side has too few rows or units for two folds.
    """
    sides = [is_new, ~is_new]
    counts = [int(side.sum()) if unit is None else np.unique(unit[side]).size for side in sides]
    usable = min(number, min(counts) // _FEWEST)
    if usable < 2:
        what = "rows" if unit is None else "groups or time blocks"
        raise ArgumentError(
            f"a domain classifier needs at least {2 * _FEWEST} {what} on each side; the new side has {counts[0]}, the "
            f"reference {counts[1]}: give more{'' if unit is None else ', or shorter blocks'}"
        )
    result = np.zeros(is_new.size, dtype=np.int64)
    if unit is None:
        splits = StratifiedKFold(usable, shuffle=True, random_state=seed).split(is_new, is_new)
    else:
        splits = StratifiedGroupKFold(usable, shuffle=True, random_state=seed).split(is_new, is_new, unit)
    for fold, (_, rows) in enumerate(splits):
        result[rows] = fold
    present = [np.unique(result[side]).size for side in sides]
    if min(present) < usable:
        raise ArgumentError(
            "groups or time blocks are too unequal: some fold has rows of one side only; use other ones"
        )
    return result
