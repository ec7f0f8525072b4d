"""Panels of what results.json holds: every seed of a claim's measures, in one study or in two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.lab.claim import Figures, Measure

_MOST_ROWS = 12
"""Measures in a panel; the tables have all."""
_IN_UNIT = {"x": "ratios", "": "numbers", "%": "percent"}


def measured(claims: Sequence[Mapping[str, Any]], names: Sequence[str] = ("",)) -> Figures:
    """Every seed, mean and interval of a claim's measures, and what its source reports.

    Args:
        claims: Entries of results.json: the same claim in one study, or in two.
        names: Of these studies.

    Returns:
        A panel for the headline's unit, and one for each other unit in which the source reports a number. Measures
        that one of the studies does not have are left out.
    """
    from batchnorm.reporting.spreads import Row, rows_panel

    reported: dict[str, list[tuple[float, str]]] = {}
    for one in claims[0].get("reported", ()):
        reported.setdefault(one["measure"], []).append((one["value"], one["where"]))
    studies = [{entry["name"]: Measure(**entry) for entry in claim["measures"]} for claim in claims]
    headline = claims[0]["headline"]
    there = [one for one in studies[0].values() if all(one.name in study for study in studies)]
    there.sort(key=lambda one: one.name != headline["name"])
    figures: Figures = {}
    for unit in dict.fromkeys((headline["unit"], *(one.unit for one in there))):
        of_unit = [one for one in there if one.unit == unit]
        if unit != headline["unit"] and not any(one.name in reported for one in of_unit):
            continue
        spare = _MOST_ROWS - sum(one.name in reported for one in of_unit)
        chosen = {one.name for one in [one for one in of_unit if one.name not in reported][: max(spare, 0)]}
        rows = [
            Row(one.label, tuple(study[one.name] for study in studies), tuple(reported.get(one.name, ())))
            for one in of_unit
            if one.name in chosen or one.name in reported
        ]
        kind = _IN_UNIT.get(unit, unit)
        if rows:
            figures[f"measures_{kind}"] = rows_panel(f"Every seed: {kind}", unit, rows, names=names)
    return figures
