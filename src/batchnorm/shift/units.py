"""Units: what may be dealt to either side on its own: rows, groups, or blocks of time."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

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


def folds(unit: Ints | None, is_new: Bools, number: int, seed: int) -> Ints:
    """A fold for each row, (N,): no unit is in two, and the units of each side are spread evenly over all.

    Units are dealt whatever their size. Folds that even out rows, as StratifiedGroupKFold's do, are a choice that looks
    at the labels: with groups of very unequal size, tests in such folds raised 15 % false alarms at nominal 5 %.
    Fewer folds where a side has few units.

    Args:
        unit: (N,), or None where each row is its own.
        is_new: (N,).
        number: of folds at most.
        seed: of the dealing.

    Raises:
        ArgumentError: a side has too few rows or units for two folds.
    """
    own = np.arange(is_new.size) if unit is None else np.unique(unit, return_inverse=True)[1]
    old, new = (np.bincount(own[side], minlength=own.max(initial=-1) + 1) > 0 for side in (~is_new, is_new))
    usable = min(number, min(int(old.sum()), int(new.sum())) // _FEWEST)
    if usable < 2:
        what = "rows" if unit is None else "groups or time blocks"
        raise ArgumentError(
            f"a comparison needs at least {2 * _FEWEST} {what} on each side; the new side has {new.sum()}, the "
            f"reference {old.sum()}: give more{'' if unit is None else ', or shorter blocks'}"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(old.size)
    # One after the other in turn: those of the reference, those of the new side, those of both.
    order = order[np.argsort((old + 2 * new)[order], kind="stable")]
    result = np.empty(old.size, dtype=np.int64)
    result[order] = (np.arange(old.size) + rng.integers(usable)) % usable
    return result[own]
