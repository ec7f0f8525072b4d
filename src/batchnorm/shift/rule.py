"""Rule: what counts as a shift, as in --fail-on "effect>0.1"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchnorm.errors import ArgumentError

if TYPE_CHECKING:
    from batchnorm.shift.classifier import Separation
    from batchnorm.shift.compare import Variable

MEASURES = ("effect", "mean_difference", "wasserstein", "jensen_shannon", "missing_change", "new_categories", "auc")

_LEVEL = 0.05


@dataclass(frozen=True)
class Rule:
    """A measure and a threshold: a variable has shifted if its measure is above, and its q-value, if any, below 5 %.

    "effect" and "auc" are asked of all columns together, too.

    Attributes:
        measure: one of `MEASURES`; signs are left aside.
        threshold: not negative.
    """

    measure: str
    threshold: float

    @staticmethod
    def parse(text: str) -> Rule:
        """The rule that `text` says.

        Raises:
            ArgumentError: it says none.

        Example:
            >>> Rule.parse("auc > 0.6")
            Rule(measure='auc', threshold=0.6)
        """
        found = re.fullmatch(r"\s*([a-z_]+)\s*>\s*(\d*\.?\d+(?:e-?\d+)?)\s*", text)
        if not found or found[1] not in MEASURES:
            raise ArgumentError(f"fail_on must be MEASURE>NUMBER with one of {', '.join(MEASURES)}; got {text!r}")
        return Rule(found[1], float(found[2]))

    def is_over(self, variable: Variable) -> bool:
        """Whether a variable has shifted."""
        value = self._value(variable)
        return value is not None and abs(value) > self.threshold and not _is_chance(variable.q_value)

    def is_over_jointly(self, joint: Separation | None, effect: float | None, q_value: float | None) -> bool:
        """Whether all columns together have."""
        if joint is None or effect is None or self.measure not in ("effect", "auc"):
            return False
        return (joint.auc if self.measure == "auc" else effect) > self.threshold and not _is_chance(q_value)

    def _value(self, variable: Variable) -> float | None:
        if self.measure == "auc":
            return None if variable.separation is None else variable.separation.auc
        name = "overall" if self.measure == "effect" else self.measure
        value: float | None = getattr(variable.effect, name)
        return value

    def __str__(self) -> str:
        return f"{self.measure}>{self.threshold:g}"


def _is_chance(q_value: float | None) -> bool:
    return q_value is not None and q_value >= _LEVEL
