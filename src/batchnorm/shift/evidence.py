"""Evidence that a treatment helps: a paired test on rows that nothing has learned from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from batchnorm.errors import ArgumentError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEVEL = 0.05
"""Probability, over all candidates together, of adopting one where none helps."""

FEWEST = 10
"""Labelled rows that a paired test needs at least."""


@dataclass(frozen=True)
class Evidence:
    """What labelled rows say about a candidate, against doing nothing.

    Attributes:
        loss: mean over the rows: squared error, or cross-entropy.
        change: (loss - loss of doing nothing) / loss of doing nothing; below 0 is better.
        low: lower end of its 95 % interval.
        high: upper end.
        p_value: of "it does not help": one-sided paired t-test of the rows' losses, or of the units'.
    """

    loss: float
    change: float
    low: float
    high: float
    p_value: float


def paired(nothing: Floats, treated: Floats, unit: Ints | None = None) -> Evidence:
    """The evidence in the losses of the same rows, (N,) each.

    Args:
        nothing: of doing nothing.
        treated: of the candidate.
        unit: (N,): groups or blocks, whose rows' differences are summed: the test then counts units and not rows.

    Raises:
        ArgumentError: there are fewer than 10 rows or units, or losses are not finite.

    Example:
        >>> import numpy as np
        >>> round(paired(np.linspace(1, 2, 20), np.linspace(0.8, 1.9, 20)).change, 3)
        -0.1
    """
    if nothing.size < FEWEST:
        raise ArgumentError(f"a paired test needs at least {FEWEST} labelled rows, got {nothing.size}")
    own = np.arange(nothing.size) if unit is None else np.unique(unit, return_inverse=True)[1]
    rows = np.bincount(own)
    if rows.size < FEWEST:
        raise ArgumentError(
            f"a paired test needs labelled rows of at least {FEWEST} groups or time blocks, got {rows.size}"
        )
    if not (np.isfinite(nothing).all() and np.isfinite(treated).all()):
        raise ArgumentError("losses on the labelled rows are not finite: look for missing or infinite predictions")
    difference = treated - nothing
    base = max(float(nothing.mean()), 1e-300)
    mean = float(difference.mean())
    around = np.bincount(own, difference - mean)
    error = math.sqrt(rows.size / (rows.size - 1) * float(around @ around)) / difference.size
    half = float(stats.t.ppf(0.975, rows.size - 1)) * error
    p_value = float(stats.t.cdf(mean / error, rows.size - 1)) if error > 0 else float(mean >= 0)
    return Evidence(float(treated.mean()), mean / base, (mean - half) / base, (mean + half) / base, p_value)


def adopted(evidence: dict[str, Evidence]) -> str | None:
    """The candidate with the lowest loss among those that Bonferroni's correction leaves; None is: do nothing."""
    level = LEVEL / max(len(evidence), 1)
    sure = {name: one for name, one in evidence.items() if one.p_value < level and one.change < 0}
    return min(sure, key=lambda name: sure[name].loss) if sure else None
